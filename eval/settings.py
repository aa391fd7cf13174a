"""What can be set for a task in a run, and how do `key=value` words and YAML files say it?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, ValidationError

from eval.task import Task
from shared.config_section import Section
from shared.errors import ConfigError, nearest
from shared.types import Sampling
from shared.yaml_text import read_yaml


class DataSettings(Section):
    """Where a task's rows are, if not where the task itself says."""

    path: str | None = Field(None, description="a local file, or pkg://PACKAGE/FILE")
    annotations: str | None = Field(None, description="a second file, joined by question_id, as VQA has")
    images: str | None = Field(None, description="folder that image names start from; default: the file's")
    split: str | None = Field(None, description="of the hub data set, in place of the task's own")


class JudgeChoice(Section):
    """A model that grades instruction replies, beside ROUGE-L."""

    model: str = Field(description="as models are named on the command line, servers too")
    mode: Literal["pairwise", "single"] = Field(
        "pairwise", description="against the reference answer where there is one, or graded from 1 to 10"
    )
    max_new_tokens: int = Field(2048, ge=1)
    temperature: float = Field(0.0, ge=0.0)
    draws: int = Field(3, ge=1, description="the first, and retries where a verdict cannot be read")
    seed: int = Field(0, ge=0)


class TaskSettings(Section):
    """One task in one run. What is left out is the task's own."""

    data: DataSettings = DataSettings()
    limit: int | None = Field(None, ge=1, description="the first rows only")
    max_new_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0.0)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=0)
    samples: int = Field(1, ge=1, description="replies to each question, for pass@k and smaller errors")
    images: Literal["shown", "removed"] = Field(
        "shown", description="removed: the control that shows what a model knows without looking"
    )
    over_length: Literal["fail", "drop"] = Field("fail", description="prompts that do not fit the context")
    teacher: str | None = Field(None, description="a local model that agreement compares with")
    num_fewshot: int | None = Field(
        None, ge=0, description="worked examples, of lm_eval's and lmms_eval's tasks"
    )
    judge: JudgeChoice | None = None
    clip_model: str | None = Field(None, description="open_clip model for CLIPScore of captions")

    def sampling(self, task: Task) -> Sampling:
        """The task's sampling with what is set here in its place."""
        own = task.sampling
        return Sampling(
            max_new_tokens=self.max_new_tokens or own.max_new_tokens,
            temperature=own.temperature if self.temperature is None else self.temperature,
            top_p=own.top_p if self.top_p is None else self.top_p,
            top_k=own.top_k if self.top_k is None else self.top_k,
            seed=own.seed if self.seed is None else self.seed,
        )


def task_settings(task: Task, values: dict[str, Any], *, source: str) -> TaskSettings:
    """Checked settings for a task.

    Raises:
        ConfigError: an unknown key, a value that cannot be, or a setting without effect on this task.
    """
    try:
        settings = TaskSettings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(map(_explain, error.errors()))) from None
    idle = []
    if settings.images == "removed" and not task.images:
        idle.append("images=removed (it has none)")
    if settings.judge is not None and not task.judged:
        idle.append("judge (its answers are checked without one)")
    if settings.clip_model is not None and task.family != "caption":
        idle.append("clip_model (it is no captioning task)")
    if settings.num_fewshot is not None and task.runner is None:
        idle.append("num_fewshot (its prompt has no worked examples)")
    if settings.teacher is not None and task.runner is None:
        idle.append("teacher (it compares with no model)")
    if settings.samples > 1 and settings.sampling(task).temperature == 0:
        idle.append("samples at temperature 0 (all would be the same): set a temperature such as 0.2")
    if settings.data.annotations is not None and settings.data.path is None:
        idle.append("data.annotations without data.path")
    if settings.data.split is not None and (settings.data.path is not None or isinstance(task.data, str)):
        idle.append("data.split (the data is a file)")
    if idle:
        raise ConfigError(f"{source}: no effect of {'; '.join(idle)} on {task.name}. Remove it.")
    if task.runner is not None:
        task.runner.check(settings, starting=False)
    return settings


def refuse_unused(settings: TaskSettings, name: str, used: Iterable[str]) -> None:
    """Refuse every setting that differs from its default and is not used.

    Raises:
        ConfigError: names them.
    """
    given, default = settings.model_dump(), TaskSettings().model_dump()
    pairs = {key: (given[key], default[key]) for key in given if key != "data"}
    pairs |= {f"data.{key}": (given["data"][key], default["data"][key]) for key in given["data"]}
    idle = [key for key, (now, before) in pairs.items() if now != before and key not in set(used)]
    if idle:
        raise ConfigError(f"no effect of {', '.join(idle)} on {name}. Remove it.")


def nested(words: list[str]) -> dict[str, Any]:
    """`a.b=value` words as nested settings; values are YAML.

    Raises:
        ConfigError: a word that is not of that form.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        steps = key.split(".")
        if not equals or not all(steps):
            raise ConfigError(f"{word!r}: expected key=value, such as limit=100 or data.path=FILE")
        node = values
        for step in steps[:-1]:
            node = node.setdefault(step, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{word!r}: {step!r} was given a value already")
        node[steps[-1]] = read_yaml(text, f"setting {word!r}")
    return values


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with others in their place."""
    result = dict(base)
    for key, value in over.items():
        inner = result.get(key)
        both = isinstance(value, dict) and isinstance(inner, dict)
        result[key] = merged(inner, value) if both else value  # type: ignore[arg-type]
    return result


def _explain(problem: Any) -> str:
    where = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        sections: dict[str, type[Section]] = {"data": DataSettings, "judge": JudgeChoice}
        nested_in = str(problem["loc"][0]) if len(problem["loc"]) > 1 else ""
        fields = sections.get(nested_in, TaskSettings).model_fields
        guess = nearest(str(problem["loc"][-1]), fields)
        return f"unknown setting {where!r}; " + (
            f"did you mean {guess!r}?" if guess else f"known here: {', '.join(fields)}"
        )
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}; got {problem.get('input')!r}"
