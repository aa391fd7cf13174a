"""How much of the teacher does a student keep? Finished evaluations side by side, where they are comparable.

`Compared` holds everything that a page of samples needs beside the figures: the runs with their records.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from eval.controls import Control, hold_against
from eval.metrics.rouge_l import rouge_l_f1
from eval.records import Record, columns, read_records, read_scoring
from eval.runner import differences
from eval.scores import Column, Metric
from eval.sections import ROLES, Evaluation, comparison
from eval.suites import Registry
from eval.task import Task
from shared.errors import StoreError

AGREEMENT = "agreement"
LISTED = 10


@dataclass(frozen=True)
class EvaluatedRun:
    """One model's evaluation, read from its folder."""

    folder: Path
    model: Mapping[str, Any]
    pinned: Mapping[str, Mapping[str, Any]]  # of each task: version, settings, sample set, how it was scored
    scores: Mapping[str, Mapping[str, Any]]  # of each task, its scores.json
    records: Mapping[str, Sequence[Record]]  # of each task that is compared


class Compared(NamedTuple):
    """Teacher, start and students on the tasks that all of them did."""

    roles: tuple[str, ...]  # teacher, start, student, student-2, ...
    runs: tuple[EvaluatedRun, ...]
    tasks: Mapping[str, Task]
    metrics: Mapping[str, Metric]  # by TASK/METRIC
    evaluations: Mapping[str, Evaluation]  # of each student, by role
    left_out: tuple[str, ...]  # tasks that not all of them did
    controls: Mapping[str, Control] = MappingProxyType({})  # runs without images, by their model's role


def compare(
    folders: Sequence[Path], registry: Registry, *, controls: Sequence[Path] = (), seed: int = 0
) -> Compared:
    """Compare runs.

    Args:
        folders: The teacher's, the start's, then one or more students'.
        registry: Knows the tasks.
        controls: Runs of some of these models without images.
        seed: Of the bootstrap.

    Raises:
        StoreError: not finished, no common task, or runs that differ in more than the model, a control that
            differs in more than the images; says in what.
    """
    assert len(folders) >= len(ROLES), folders
    roles = (*ROLES, *(f"student-{n}" for n in range(2, len(folders) - 1)))
    names = [_task_names(folder) for folder in folders]
    common = [name for name in names[0] if all(name in others for others in names)]
    if not common:
        each = "\n  ".join(
            f"{folder}: {', '.join(found)}" for folder, found in zip(folders, names, strict=True)
        )
        raise StoreError(
            f"the runs have no task in common:\n  {each}\nEvaluate all models on the same tasks."
        )
    runs = tuple(_read_run(folder, common) for folder in folders)
    tasks = {name: registry.task_in(folders[0] / name) for name in common}
    _refuse_unlike(runs, tasks)

    metrics: dict[str, Metric] = {}
    for name, task in tasks.items():
        metrics |= {
            f"{name}/{key}": metric._replace(title=f"{name}: {metric.title}")
            for key, metric in task.metrics.items()
        }
        if task.family in ("instruction", "caption"):
            metrics[f"{name}/{AGREEMENT}"] = Metric(f"{name}: ROUGE-L against the teacher", "share", True)
    by_role = [_columns(run, runs[0], tasks) for run in runs]
    evaluations = {}
    for role, run, found in list(zip(roles, runs, by_role, strict=True))[2:]:
        evaluation = comparison(metrics, teacher=by_role[0], start=by_role[1], student=found, seed=seed)
        evaluations[role] = _with_quotients(evaluation, (runs[0], runs[1], run), tasks)
    left_out = sorted({name for found in names for name in found} - set(common))
    held: dict[str, Control] = {}
    for folder in controls:
        names_here = _task_names(folder)
        shared_here = [name for name in common if name in names_here]
        if not shared_here:
            raise StoreError(
                f"{folder}: a control of none of the compared tasks ({', '.join(common)}); it has "
                f"{', '.join(names_here)}."
            )
        of_roles = hold_against(
            dict(zip(roles, runs, strict=True)), _read_run(folder, shared_here), tasks, metrics, seed=seed
        )
        if twice := sorted(of_roles.keys() & held.keys()):
            raise StoreError(
                f"two controls of {twice[0]}: {held[twice[0]].run.folder} and {folder}. Give one of them."
            )
        held |= of_roles
    return Compared(roles, runs, tasks, metrics, evaluations, tuple(left_out), held)


def _task_names(folder: Path) -> list[str]:
    names = sorted(path.parent.name for path in folder.glob("*/task.json"))
    if not names:
        raise StoreError(
            f"{folder} holds no evaluation. `distill-eval run MODEL TASK --output {folder}` makes one."
        )
    return names


def _read_run(folder: Path, tasks: Sequence[str]) -> EvaluatedRun:
    def read(path: Path) -> Any:
        if not path.is_file():
            raise StoreError(
                f"{path} is missing: finish the run first, the same command goes on where it was."
            )
        return json.loads(path.read_text(encoding="utf-8"))

    return EvaluatedRun(
        folder=folder,
        model=read(folder / "model.json"),
        pinned={
            name: read(folder / name / "task.json") | {"scored": read_scoring(folder / name)}
            for name in tasks
        },
        scores={name: read(folder / name / "scores.json") for name in tasks},
        records={name: read_records(folder / name) for name in tasks},
    )


def _refuse_unlike(runs: Sequence[EvaluatedRun], tasks: Mapping[str, Task]) -> None:
    """All differences at once: an hour of evaluation stands behind each."""
    lines = []
    first = runs[0]
    for name, task in tasks.items():
        version = first.pinned[name]["version"]
        if version != task.version:
            lines.append(f"{name}: scored as version {version}, and it is at version {task.version} now")
        for other in runs[1:]:
            where = f"{name}: {{key}} is {{one}} in {first.folder} and {{two}} in {other.folder}"
            for key, one, two in differences(first.pinned[name], other.pinned[name]):
                lines.append(where.format(key=key, one=one, two=two))
            lines += _unlike_samples(name, first, other)
    if lines:
        more = [f"... and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
        raise StoreError(
            "\n  ".join(["the runs differ in more than the model:", *lines[:LISTED], *more])
            + "\nRun them again with one version, the same settings and the same samples."
        )


def _unlike_samples(name: str, first: EvaluatedRun, other: EvaluatedRun) -> list[str]:
    one, two = (
        {(record.sample_id, record.draw): (record.references, record.cluster) for record in run.records[name]}
        for run in (first, other)
    )
    lonely = sorted(one.keys() ^ two.keys())
    changed = [key for key in one.keys() & two.keys() if one[key] != two[key]]
    lines = []
    if lonely:
        where = first.folder if lonely[0] in one else other.folder
        lines.append(
            f"{name}: {len(lonely)} samples are in one run only, such as {lonely[0][0]!r} in {where}"
        )
    if changed:
        lines.append(
            f"{name}: {len(changed)} samples have other references or images, such as {min(changed)[0]!r}"
        )
    return lines


def _columns(run: EvaluatedRun, teacher: EvaluatedRun, tasks: Mapping[str, Task]) -> dict[str, Column]:
    found: dict[str, Column] = {}
    for name, task in tasks.items():
        records = run.records[name]
        found |= {f"{name}/{key}": column for key, column in columns(task, records).items()}
        if task.family in ("instruction", "caption"):
            found[f"{name}/{AGREEMENT}"] = _agreement(records, teacher.records[name])
    return found


def _agreement(records: Sequence[Record], teacher: Sequence[Record]) -> Column:
    """ROUGE-L of each answer against the teacher's own to the same question."""
    theirs = {(record.sample_id, record.draw): record.answer for record in teacher}
    ids = tuple(record.sample_id for record in records)
    values = tuple(rouge_l_f1(record.answer, [theirs[record.sample_id, record.draw]]) for record in records)
    return Column(ids, values, tuple(record.cluster or record.sample_id for record in records))


def _with_quotients(
    evaluation: Evaluation, runs: Sequence[EvaluatedRun], tasks: Mapping[str, Task]
) -> Evaluation:
    """Metrics that are no means, such as recall: their scores stand alone, without a bootstrap."""
    scores: dict[Any, dict[str, Any]] = {role: dict(found) for role, found in evaluation.scores.items()}
    for role, run in zip(ROLES, runs, strict=True):
        for name, task in tasks.items():
            found = run.scores[name]["scores"]
            scores[role] |= {f"{name}/{key}": found[key] for key in task.quotients if key in found}
    return evaluation._replace(scores=scores)
