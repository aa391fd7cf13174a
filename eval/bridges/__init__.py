"""Which tasks of other harnesses can be named? `lm_eval:NAME` and `lmms_eval:NAME`, if those are installed.

Their data, prompts and scoring; our models, stores, records and reports.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple, NoReturn

from eval.task import Task
from shared.errors import UserError
from shared.types import Sampling, TaskName


class Harness(NamedTuple):
    """What must be known of a harness before it is imported."""

    package: str  # as pip names it
    module: str  # our side of the bridge
    family: TaskName
    images: bool


HARNESSES: dict[str, Harness] = {
    "lm_eval": Harness("lm-eval", "eval.bridges.lm_harness", "instruction", images=False),
    "lmms_eval": Harness("lmms-eval", "eval.bridges.lmms_harness", "vqa", images=True),
}


def is_bridged(name: str) -> bool:
    """Whether a task's name is one of another harness."""
    harness, colon, task = name.partition(":")
    return bool(colon and task) and harness in HARNESSES


def bridged_task(name: str, *, of_version: str | None = None) -> Task:
    """The task of another harness. Its metrics are known once it has run.

    Args:
        name: HARNESS:NAME.
        of_version: As a finished folder has it; None for that of the harness that is installed.

    Raises:
        UserError: the harness is not installed.
    """
    from eval.bridges.bridge import Bridge

    key, _, task = name.partition(":")
    harness = HARNESSES[key]
    return Task(
        name=name,
        version=of_version or f"{harness.package} {_installed(harness, name)}",
        family=harness.family,
        summary=f"{task} of {key}",
        data=None,
        columns="YAML files of that harness's own, in a folder",
        read=_not_ours,
        metrics={},
        score=_not_ours,
        sampling=Sampling(max_new_tokens=256, temperature=0.0),
        images=harness.images,
        runner=Bridge(key, task),
    )


def _installed(harness: Harness, name: str) -> str:
    try:
        return version(harness.package)
    except PackageNotFoundError:
        raise UserError(
            f"{name} is a task of {harness.package}, which is not installed: pip install {harness.package}"
        ) from None


def _not_ours(*_: object) -> NoReturn:
    raise AssertionError("the other harness reads and scores its tasks itself")
