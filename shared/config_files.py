"""How does a YAML file become a checked configuration, and what is said where it cannot?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from shared.config import RunConfig
from shared.errors import ConfigError, nearest
from shared.yaml_text import read_yaml

Config = TypeVar("Config", bound=BaseModel)


def load_config(path: Path, config_class: type[Config], overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides, check everything at once.

    Raises:
        ConfigError: missing file, not YAML, unknown keys, wrong types; one message lists all of them.
    """
    return parse_values(load_values(path, overrides), config_class, str(path))


def load_values(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a YAML file holds, overrides applied, nothing checked yet.

    Raises:
        ConfigError: missing file, not YAML, no sections, an override that has no place.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise ConfigError(
            f"no configuration file at {path}. Write one to edit with `init TEMPLATE`, or check the path."
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Give a file of yours.") from None
    return _values(text, overrides, str(path))


def parse_config(
    text: str, config_class: type[Config], overrides: Sequence[str] = (), *, source: str = "configuration"
) -> Config:
    """As `load_config`, from YAML text; `source` names it in messages."""
    return parse_values(_values(text, overrides, source), config_class, source)


def parse_values(values: dict[str, Any], config_class: type[Config], source: str) -> Config:
    """Check everything at once.

    Raises:
        ConfigError: unknown keys, wrong types; one message lists all of them.
    """
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        lines = _explain(error, config_class)
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise ConfigError("\n  ".join([f"{source}: {count}", *lines])) from None


def _values(text: str, overrides: Sequence[str], source: str) -> dict[str, Any]:
    values = read_yaml(text, source)
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise ConfigError(f"{source} must hold sections (`name:`, `teacher:` ...); it holds {found}.")
    for override in overrides:
        apply_override(values, override)
    return values


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, defaults included, in the order of the sections."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set what `key.sub=value` says, in place.

    Raises:
        ConfigError: not of that form, or a place that is not there.
    """
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {override!r}: expected key.sub=value, e.g. training.learning_rate=1e-4")
    set_value(values, key, read_yaml(text, f"override {override!r}"), f"override {override!r}")


def set_value(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a dotted key in place; sections that are absent are made.

    Raises:
        ConfigError: a list's entry that is not there, or a key below a plain value; begins with `where`.
    """
    steps = key.split(".")
    node: dict[Any, Any] | list[Any] = values
    for depth, step in enumerate(steps):
        place = _place(node, step, f"{where}: {'.'.join(steps[:depth])!r}")
        if depth == len(steps) - 1:
            node[place] = value
            return
        inner = node[place] if isinstance(node, list) else node.get(place)
        if inner is None:  # an absent section, or an empty one
            inner = node[place] = {}
        if not isinstance(inner, dict | list):
            place_of_it = ".".join(steps[: depth + 1])
            raise ConfigError(
                f"{where}: {place_of_it!r} is {inner!r}, which has no keys. Give it whole, as in "
                f"{place_of_it}='{{KEY: VALUE, ...}}'."
            )
        node = inner


def _place(node: dict[Any, Any] | list[Any], step: str, where: str) -> Any:
    if isinstance(node, dict):
        return step
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in node]
    if step in names:  # stages and tasks have names
        return names.index(step)
    if not step.isdecimal() or int(step) >= len(node):
        allowed = f"give an index from 0 to {len(node) - 1}" if node else "it is empty"
        raise ConfigError(f"{where} is a list of {len(node)}, and has no entry {step!r}; {allowed}.")
    return int(step)


def _explain(error: ValidationError, config_class: type[BaseModel]) -> list[str]:
    """One line for each place with a problem."""
    problems = error.errors()
    messages: dict[str, list[str]] = {}
    for problem in problems:
        if problem["type"] == "too_short" and any(_is_below(other, problem) for other in problems):
            continue  # pydantic counts the entries without those that have a problem of their own
        *parents, last = problem["loc"] or ("",)
        # a union adds the member that it tried, such as "tuple[str, ...]", which is no key of the file
        parents = [part for part in parents if "[" not in str(part)]
        if "[" not in str(last) or problem["type"] == "extra_forbidden":
            parents.append(last)
        where = ".".join(map(str, parents))
        messages.setdefault(where, []).append(_message(problem, config_class))
    return [
        f"{where}: {', or '.join(dict.fromkeys(texts))}" if where else " ".join(texts)
        for where, texts in messages.items()
    ]


def _is_below(problem: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    depth = len(other["loc"])
    return len(problem["loc"]) > depth and problem["loc"][:depth] == other["loc"]


def _message(problem: Mapping[str, Any], config_class: type[BaseModel]) -> str:
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key; {_suggest(problem['loc'], config_class)}"
        case "missing":
            return "required, and not given"
        case "value_error":
            return str(problem["ctx"]["error"])
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"needs keys below it; got {problem['input']!r}"
        case "too_short":
            return f"needs at least {problem['ctx']['min_length']}; got {len(problem['input'])}"
        case _:
            message = problem["msg"].replace("a valid tuple", "a list")
            return f"{message[0].lower()}{message[1:]}; got {problem['input']!r}"


def _suggest(location: Sequence[str | int], config_class: type[BaseModel]) -> str:
    """The nearest key of that section, or the place where a key of that very name stands."""
    *parents, key = location
    known = _model_at(config_class, parents).model_fields
    guess = nearest(str(key), known)
    if guess is None:
        guess = next((path for path in _paths(config_class) if path.endswith(f".{key}")), None)
    return f"did you mean {guess!r}?" if guess else f"known here: {', '.join(sorted(known))}"


def _model_at(model: type[BaseModel], location: Iterable[str | int]) -> type[BaseModel]:
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation) or model
    return model


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        inner = _model_in(field.annotation)
        # inside a list, a key has no single place
        if inner is not None and get_origin(field.annotation) is not tuple:
            yield from _paths(inner, f"{prefix}{name}.")


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is None:
        return None
    return next((found for argument in get_args(annotation) if (found := _model_in(argument))), None)
