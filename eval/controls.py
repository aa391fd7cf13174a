"""What do the images add? The same questions asked without them, beside the real scores of the same model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from eval.records import columns
from eval.runner import differences
from eval.scores import Metric, Score, sample_clusters, sample_means, score
from eval.sections import Bounds, bounds
from eval.statistics import paired_bootstrap
from eval.task import Task
from shared.errors import StoreError

if TYPE_CHECKING:
    from eval.compare import EvaluatedRun

REMOVED = "removed"
# What a control may differ in: it hashes no images, so its set of samples has another name.
EXPECTED = ("images", "sample_set")


class Control(NamedTuple):
    """A run without images, held against the run of the same model with them."""

    run: EvaluatedRun
    scores: Mapping[str, Score]  # by TASK/METRIC
    added: Mapping[str, Bounds]  # the score with images - the score without


def hold_against(
    runs: Mapping[str, EvaluatedRun],
    control: EvaluatedRun,
    tasks: Mapping[str, Task],
    metrics: Mapping[str, Metric],
    *,
    seed: int = 0,
) -> dict[str, Control]:
    """A control beside the run of its model, by role; two roles where one model has both.

    Raises:
        StoreError: the control is not of a model that is compared, shows images, or differs from its model's
            run in more than the images; says in what.
    """
    fingerprint = control.model["fingerprint"]
    roles = [role for role, run in runs.items() if run.model["fingerprint"] == fingerprint]
    if not roles:
        known = "\n  ".join(
            f"{role}: {run.model['name']} ({run.model['fingerprint']})" for role, run in runs.items()
        )
        raise StoreError(
            f"{control.folder} is a control of {control.model['name']} ({fingerprint}), and none of the runs "
            f"is that model's:\n  {known}\nA control is the same model's run with images=removed."
        )
    found = {}
    for role in roles:
        _refuse_unlike(runs[role], control)
        found[role] = _compared(runs[role], control, tasks, metrics, seed)
    return found


def _refuse_unlike(run: EvaluatedRun, control: EvaluatedRun) -> None:
    lines = []
    for name, pinned in control.pinned.items():
        if pinned["images"] != REMOVED:
            lines.append(f"{name}: images is {pinned['images']} in {control.folder}, not {REMOVED}")
        if run.pinned[name]["images"] == REMOVED:
            lines.append(f"{name}: images is {REMOVED} in {run.folder}, which is to show them")
        for key, one, two in differences(run.pinned[name], pinned):
            if key not in EXPECTED:
                lines.append(f"{name}: {key} is {one} in {run.folder} and {two} in {control.folder}")
        asked, without = (
            {(r.sample_id, r.draw): (r.prompt, r.references) for r in of_run.records[name]}
            for of_run in (run, control)
        )
        if unlike := sorted(
            key for key in asked.keys() | without.keys() if asked.get(key) != without.get(key)
        ):
            lines.append(
                f"{name}: {len(unlike)} samples are in one run only or differ in prompt or references, "
                f"such as {unlike[0][0]!r}"
            )
    if lines:
        raise StoreError(
            "\n  ".join([f"{control.folder} is no control of {run.folder}:", *lines])
            + "\nRun it as that run was, with images=removed and another --output."
        )


def _compared(
    run: EvaluatedRun,
    control: EvaluatedRun,
    tasks: Mapping[str, Task],
    metrics: Mapping[str, Metric],
    seed: int,
) -> Control:
    scores, added = {}, {}
    for name in control.pinned:
        shown, without = (columns(tasks[name], of_run.records[name]) for of_run in (run, control))
        for key in (key for key in without if key in shown):
            full = f"{name}/{key}"
            scores[full] = score(metrics[full], without[key])
            with_them, without_them = sample_means([shown[key], without[key]])
            compared = paired_bootstrap(
                teacher=without_them, student=with_them, clusters=sample_clusters(shown[key]), seed=seed
            )
            added[full] = bounds(compared.difference)
    return Control(control, scores, added)
