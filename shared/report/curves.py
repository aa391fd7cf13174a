"""Which curves of a training run belong together?

A panel names the keys of metrics rows that it shows. What a run did not log is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from shared.report.sections import CurvePanel, Curves, Mark, RoleName, Series

MetricsRow = Mapping[str, object]

MAX_POINTS = 1500  # of a curve; more are not seen and make the page heavy


class Curve(NamedTuple):
    """One key of the metrics rows, and how a reader knows it."""

    key: str
    name: str
    role: RoleName | None = None


class Panel(NamedTuple):
    """Curves with one unit."""

    title: str
    unit: str
    curves: tuple[Curve, ...]


TRAINING_PANELS = (
    Panel("Loss", "nats per token", (Curve("train/loss", "loss", "student"),)),
    Panel(
        "Held-out KL(teacher ‖ student)",
        "nats per token",
        (
            Curve("heldout/kl", "held-out KL", "student"),
            Curve("heldout/kl_cached", "held-out KL, as far as the cache shows it", "student"),
        ),
    ),
    Panel(
        "Held-out −log q(reference answer)", "nats per token", (Curve("heldout/nll", "held-out", "student"),)
    ),
    Panel(
        "α, the skew of each side",
        "α",
        (
            Curve("train/alpha_teacher", "teacher responses", "teacher"),
            Curve("train/alpha_student", "student responses", "student"),
        ),
    ),
    Panel("β, the weight of student responses", "β", (Curve("train/beta", "β"),)),
    Panel(
        "Gap: own probability less the other's",
        "probability",
        (
            Curve("train/gap_teacher", "teacher responses", "teacher"),
            Curve("train/gap_student", "student responses", "student"),
        ),
    ),
    Panel("Learning rate", "learning rate", (Curve("train/learning_rate", "learning rate"),)),
    Panel("Gradient norm", "norm", (Curve("train/grad_norm", "gradient norm"),)),
    Panel("Throughput", "tokens per second", (Curve("train/tokens_per_second", "throughput"),)),
)


def training_curves(
    rows: Iterable[MetricsRow], panels: Sequence[Panel] = TRAINING_PANELS, *, title: str = "Training"
) -> Curves:
    """The panels that have points, over optimiser steps, with a mark where each round after the first starts.

    A row without `step` is ignored; of rows with the same step, as a resumed run may write, the last counts.
    """
    stepped = [row for row in rows if isinstance(row.get("step"), int)]
    marks = _round_starts(stepped)
    drawn = []
    thinned = 1
    for panel in panels:
        lines = []
        for curve in panel.curves:
            points = _points(stepped, curve.key)
            if points:
                stride = math.ceil(len(points) / MAX_POINTS)
                thinned = max(thinned, stride)
                kept = points[::-1][::stride][::-1]  # the last point always stays
                x, y = zip(*kept, strict=True)
                lines.append(Series(curve.name, x, y, curve.role))
        if lines:
            drawn.append(CurvePanel(panel.title, "optimiser step", panel.unit, tuple(lines), marks))
    note = f"Long curves show one point in {thinned}." if thinned > 1 else ""
    return Curves(title, tuple(drawn), note)


def _points(rows: Iterable[MetricsRow], key: str) -> list[tuple[int, float | None]]:
    """(step, value) in order of steps; a value that is not finite is a gap."""
    points: dict[int, float | None] = {}
    for row in rows:
        step, value = row["step"], row.get(key)
        if isinstance(step, int) and isinstance(value, int | float):
            points[step] = float(value) if math.isfinite(value) else None
    return sorted(points.items())


def _round_starts(rows: Iterable[MetricsRow]) -> tuple[Mark, ...]:
    """A line before the first step of each round from the second on."""
    first: dict[int, int] = {}
    for row in rows:
        step, number = row["step"], row.get("round")
        if isinstance(step, int) and isinstance(number, int):
            first[number] = min(step, first.get(number, step))
    return tuple(Mark(step - 0.5, f"round {number}") for number, step in sorted(first.items()) if number > 1)
