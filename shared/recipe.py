"""How do stages follow each other: what one makes, the next one takes, and nothing is made twice?

A recipe is one file with `stages`. Each has a folder; `stage:NAME` anywhere in a later stage stands for what
that one makes. Beside its folder a stage leaves `NAME.stage.json`: its settings, and those of the stages it
took from. Started again, a recipe passes over what is finished and goes on where it was; a stage that was
made with other settings stops it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import Field, model_validator

from shared.config import RunConfig
from shared.config_section import Section
from shared.durable import write_atomically
from shared.errors import ConfigError, StoreError, nearest
from shared.progress import Speaker

REFERENCE = "stage:"
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Stage(Section):
    """One step of a recipe: a name and exactly one thing to do."""

    name: str = Field(pattern=NAME)
    output: str | None = Field(None, description="the stage's folder; default RECIPE/NAME")

    @model_validator(mode="after")
    def _exactly_one(self) -> Stage:
        kinds = [key for key in type(self).model_fields if key not in Stage.model_fields]
        given = [key for key in kinds if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(kinds)}; got {', '.join(given) or 'none'}")
        return self

    @property
    def kind(self) -> str:
        """Which of the things to do it has."""
        return next(
            key
            for key in type(self).model_fields
            if key not in Stage.model_fields and getattr(self, key) is not None
        )


class RecipeConfig(Section):
    """Stages in order. Modality packages give the stages that they have."""

    name: str = Field(pattern=NAME)
    output: str | None = Field(None, description="folder of all stages; default runs/NAME")
    seed: int = Field(0, ge=0, description="of every stage that names none")
    stages: tuple[Any, ...] = Field(min_length=1)

    @property
    def folder(self) -> Path:
        """The recipe's folder."""
        return Path(self.output or f"runs/{self.name}")


class StageKind(NamedTuple):
    """What a modality can do in a stage."""

    product: str  # what it makes, below its folder
    execute: Callable[[Any, Path, int, Speaker], None]  # settings, folder, seed; starts again where it was
    smoke: Callable[[Any], Any] = lambda settings: settings  # the same on a handful of samples


RUN_PRODUCT, RUN_FINISHED = "student", "report.json"
Recipe = TypeVar("Recipe", bound=RecipeConfig)


def is_recipe(values: object) -> bool:
    """Whether a configuration file holds stages."""
    return isinstance(values, dict) and "stages" in values


def expand(values: dict[str, Any], products: Mapping[str, str], source: str, *, smoke: bool = False) -> None:
    """Write out in place what stages leave open: folders, names and seeds of runs, and `stage:` references.

    Args:
        values: a recipe as its file has it.
        products: what each kind of stage makes, below its folder.
        source: for messages.
        smoke: all in folders of their own.

    Raises:
        ConfigError: a reference to no earlier stage, or two stages of one name.
    """
    stages = values.get("stages")
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise ConfigError(f"{source}: stages must be a list of stages (`- name: ...`); got {stages!r}")
    root = f"{values.get('output') or 'runs/' + str(values.get('name'))}{'-smoke' if smoke else ''}"
    made: dict[str, str] = {}
    for stage in stages:
        name = str(stage.get("name"))
        if name in made:
            raise ConfigError(f"{source}: two stages are called {name!r}. Give each a name of its own.")
        if smoke or not stage.get("output"):
            stage["output"] = f"{root}/{name}"
        kind = next((key for key in products if stage.get(key) is not None), None)
        for key in products:
            if stage.get(key) is not None:
                stage[key] = _resolved(stage[key], made, f"{source}: stage {name!r}")
        if kind == "run" and isinstance(stage["run"], dict):
            own = {
                "name": f"{values.get('name')}-{name}",
                "output": stage["output"],
                "seed": values.get("seed", 0),
            }
            stage["run"] = {**own, **stage["run"]}
        if kind is not None:
            made[name] = str(Path(stage["output"]) / products[kind])


def execute_recipe(
    recipe: RecipeConfig,
    kinds: Mapping[str, StageKind],
    run: Callable[[RunConfig], None],
    speaker: Speaker,
    *,
    smoke: Callable[[RunConfig], RunConfig] | None = None,
) -> None:
    """Go through the stages that are not finished.

    Args:
        recipe: expanded.
        kinds: of stages that are no runs.
        run: executes one to its report.
        speaker: says which stage it is.
        smoke: makes a small run of each.

    Raises:
        StoreError: a stage was made with other settings.
        UserError: whatever a stage meets.
    """
    done: dict[str, str] = {}  # where a stage's product lies, and the record of how it was made
    for number, stage in enumerate(recipe.stages, start=1):
        folder, settings = Path(stage.output), getattr(stage, stage.kind)
        if smoke is not None:
            small = smoke if stage.kind == "run" else kinds[stage.kind].smoke
            settings = small(settings).model_copy(
                update={"output": stage.output} if stage.kind == "run" else {}
            )
        seed = recipe.seed
        dump = settings.model_dump(mode="json")
        inputs = {path: record for path, record in done.items() if path in set(_strings(dump))}
        record = json.dumps({"settings": dump, "seed": seed, "from": inputs}, sort_keys=True)
        product = folder / (RUN_PRODUCT if stage.kind == "run" else kinds[stage.kind].product)
        finished = (folder / RUN_FINISHED if stage.kind == "run" else product).exists()
        _claim(folder, record, stage.name)
        done[str(product)] = _digest(record)
        title = f"Stage {number} of {len(recipe.stages)}: {stage.name}"
        if finished:
            speaker.stage(f"{title} is there already, in {folder}")
            continue
        speaker.stage(title)
        if stage.kind == "run":
            run(settings)
        else:
            kinds[stage.kind].execute(settings, folder, seed, speaker)


def waiting_for(stage: Stage, recipe: RecipeConfig, products: Mapping[str, str]) -> list[str]:
    """The earlier stages whose products a stage takes and that are not there yet."""
    wanted = set(_strings(getattr(stage, stage.kind).model_dump(mode="json")))
    places = {str(Path(other.output) / products[other.kind]): other.name for other in recipe.stages}
    return [name for place, name in places.items() if place in wanted and not Path(place).exists()]


def _claim(folder: Path, record: str, name: str) -> None:
    path = folder.with_name(f"{folder.name}.stage.json")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, record)
        return
    before = path.read_text(encoding="utf-8")
    if before != record:
        theirs, ours = json.loads(before), json.loads(record)
        differing = sorted(
            key
            for key in _flat(theirs).keys() | _flat(ours).keys()
            if _flat(theirs).get(key) != _flat(ours).get(key)
        )
        raise StoreError(
            f"stage {name!r}: {folder} was made with other settings: {', '.join(differing[:8])}. Delete it "
            f"and {path.name} to make it again, or give the stage another `output`."
        )


def _resolved(node: Any, made: Mapping[str, str], where: str) -> Any:
    if isinstance(node, dict):
        return {key: _resolved(value, made, where) for key, value in node.items()}
    if isinstance(node, list):
        return [_resolved(value, made, where) for value in node]
    if not isinstance(node, str) or not node.startswith(REFERENCE):
        return node
    name = node.removeprefix(REFERENCE)
    if name not in made:
        guess = nearest(name, made)
        hint = f"did you mean {guess!r}?" if guess else f"stages before it: {', '.join(made) or 'none'}."
        raise ConfigError(f"{where} takes {node!r}, and no earlier stage has that name; {hint}")
    return made[name]


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, Mapping):
        for value in node.values():
            yield from _strings(value)
    elif isinstance(node, Sequence):
        for value in node:
            yield from _strings(value)


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, dict) and node:
        return {
            k: v
            for key, value in node.items()
            for k, v in _flat(value, f"{prefix}.{key}".lstrip(".")).items()
        }
    return {prefix: node}


def _digest(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:16]
