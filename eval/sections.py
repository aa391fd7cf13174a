"""What does an evaluation put into a report? Teacher, start and student compared, as data and as charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np

from eval.scores import Columns, Metric, Score, sample_clusters, sample_means, score
from eval.statistics import Interval, paired_bootstrap
from shared.report.formats import axis_number, percent, plus_minus
from shared.report.sections import (
    Bar,
    BarPanel,
    Bars,
    BarSeries,
    RoleName,
    Section,
    Summary,
    Table,
    Tile,
)

ROLES: tuple[RoleName, ...] = ("teacher", "start", "student")
Z_95 = 1.96  # standard errors on either side of a mean in a 95 % interval

# Panel titles for metrics of one unit; a unit that is not listed is its own title.
PANEL_TITLES = {"share": "Agreement with the teacher", "nats per token": "Divergence from the teacher"}
# Titles and units of panels of quotients.
RETENTION = ("Retention: the student's share of the teacher's score", "student / teacher")
GAP_CLOSED = (
    "Gap closed: the share of the way from start to teacher",
    "(student − start) / (teacher − start)",
)


class Bounds(TypedDict):
    """A statistic with its 95 % interval in report.json; None where it is undefined."""

    value: float | None
    low: float | None
    high: float | None


class Evaluation(NamedTuple):
    """The part of report.json that an evaluation gives."""

    scores: Mapping[RoleName, Mapping[str, Score]]
    retention: Mapping[str, Bounds]  # the student's share of the teacher's score, where higher is better
    gap_closed: Mapping[str, Bounds]  # the share of the way from start to teacher
    difference: Mapping[str, Bounds]  # student - teacher

    def data(self) -> dict[str, Any]:
        """As it stands in report.json."""
        return self._asdict()


def comparison(
    metrics: Mapping[str, Metric], *, teacher: Columns, start: Columns, student: Columns, seed: int = 0
) -> Evaluation:
    """Scores of the three models, retention and gap closed by a paired bootstrap over samples.

    Metrics that not all three were scored on are in `scores` alone.

    Raises:
        ValueError: a metric's values for different samples.
    """
    columns: dict[RoleName, Columns] = {"teacher": teacher, "start": start, "student": student}
    scores = {
        role: {name: score(metrics[name], column) for name, column in of_role.items()}
        for role, of_role in columns.items()
    }
    retention, gap_closed, difference = {}, {}, {}
    for name, metric in metrics.items():
        if not all(name in of_role for of_role in columns.values()):
            continue
        p, s, q = sample_means([columns[role][name] for role in ROLES])
        compared = paired_bootstrap(
            teacher=p,
            start=s,
            student=q,
            clusters=sample_clusters(teacher[name]),
            transform=np.exp if metric.exponential else None,
            seed=seed,
        )
        if metric.higher_is_better:
            retention[name] = bounds(compared.ratio)
        assert compared.gap_closed is not None
        gap_closed[name] = bounds(compared.gap_closed)
        difference[name] = bounds(compared.difference)
    return Evaluation(scores, retention, gap_closed, difference)


def summary_section(
    compared: Evaluation, metrics: Mapping[str, Metric], names: Sequence[str], *, title: str = "At a glance"
) -> Summary:
    """A tile for each of the metrics that the student was scored on: its score, and where it came from."""
    tiles = []
    for name in names:
        if (found := compared.scores["student"].get(name)) is None:
            continue
        show = percent if metrics[name].unit == "share" else axis_number
        details = [metrics[name].unit] if metrics[name].unit != "share" else []
        for role in ("start", "teacher"):
            if (other := compared.scores[role].get(name)) is not None:
                details.append(f"{role} {show(other['value'])}")
        tiles.append(Tile(metrics[name].title, show(found["value"]), ", ".join(details)))
    return Summary(title, tuple(tiles))


def comparison_sections(compared: Evaluation, metrics: Mapping[str, Metric]) -> list[Section]:
    """Bars of all scores, of retention and of the gap closed, and a table with every figure.

    Retention has no bars where the teacher's scores are all 1, since it is then the student's score itself.
    """
    names = [name for name in metrics if any(name in scores for scores in compared.scores.values())]
    units = dict.fromkeys(metrics[name].unit for name in names)
    panels = [
        score_panel(
            [Line(role, role, compared.scores[role]) for role in ROLES],
            metrics,
            [name for name in names if metrics[name].unit == unit],
            unit,
            PANEL_TITLES.get(unit, unit.capitalize()),
        )
        for unit in units
    ]
    count = max((s["n"] for scores in compared.scores.values() for s in scores.values()), default=0)
    if any(compared.scores["teacher"][name]["value"] != 1 for name in compared.retention):
        panels.append(quotient_panel(*RETENTION, [Line("student", "student", compared.retention)], metrics))
    if compared.gap_closed:
        panels.append(quotient_panel(*GAP_CLOSED, [Line("student", "student", compared.gap_closed)], metrics))
    note = (
        f"Means over up to {count} held-out responses, with 95 % intervals; those of quotients are a paired "
        "bootstrap over prompts. Start is the student before distillation."
    )
    return [Bars("Scores", tuple(panels), note), _table(compared, metrics, names)]


def bounds(interval: Interval) -> Bounds:
    """As it stands in report.json."""
    return Bounds(value=interval.value, low=interval.low, high=interval.high)


class Line(NamedTuple):
    """A model's scores or quotients in a panel of bars."""

    name: str
    role: RoleName | None
    found: Mapping[str, Any]  # Score or Bounds, by metric


def score_panel(
    lines: Sequence[Line], metrics: Mapping[str, Metric], names: Sequence[str], unit: str, title: str
) -> BarPanel:
    """Scores of some models in metrics of one unit, with 95 % intervals."""

    def bar(found: Score | None) -> Bar:
        if found is None or found["stderr"] is None:
            return Bar(None if found is None else found["value"])
        value, half = found["value"], Z_95 * found["stderr"]
        return Bar(value, value - half, value + half)

    better = {metrics[name].higher_is_better for name in names}
    direction = {True: "higher is better", False: "lower is better"}[better.pop()] if len(better) == 1 else ""
    return BarPanel(
        title,
        f"{unit}, {direction}" if direction else unit,
        tuple(metrics[name].title for name in names),
        tuple(
            BarSeries(line.name, tuple(bar(line.found.get(n)) for n in names), line.role) for line in lines
        ),
        percent=unit == "share",
    )


def quotient_panel(title: str, unit: str, lines: Sequence[Line], metrics: Mapping[str, Metric]) -> BarPanel:
    """Retention or gap closed of one or more students, in the metrics of the first."""
    names = list(lines[0].found)
    series = (BarSeries(line.name, tuple(Bar(**line.found[n]) for n in names), line.role) for line in lines)
    return BarPanel(title, unit, tuple(metrics[name].title for name in names), tuple(series), percent=True)


def _table(compared: Evaluation, metrics: Mapping[str, Metric], names: Sequence[str]) -> Table:
    rows = [
        (
            metrics[name].title,
            *(score_text(compared.scores[role].get(name)) for role in ROLES),
            share_text(compared.retention.get(name)),
            share_text(compared.gap_closed.get(name)),
        )
        for name in names
    ]
    columns = ("Metric", "Teacher", "Start", "Student", "Retention", "Gap closed")
    note = "Mean ± standard error; retention and gap closed with their 95 % intervals."
    return Table("All figures", columns, tuple(rows), note)


def score_text(found: Score | None) -> str | None:
    """A score with its standard error."""
    return None if found is None else plus_minus(found["value"], found["stderr"])


def share_text(found: Bounds | None) -> str | None:
    """A share with its interval: 75.0 % (60.1 to 90.2)."""
    if found is None or found["value"] is None:
        return None
    low, high = found["low"], found["high"]
    interval = "no interval" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"
    return f"{percent(found['value'])} ({interval})"


def difference_text(found: Bounds | None) -> str | None:
    """A difference with its interval: -0.200 (-0.500 to 0.000)."""
    if found is None or found["value"] is None:
        return None
    low, high = found["low"], found["high"]
    interval = "no interval" if low is None or high is None else f"{low:+.3f} to {high:+.3f}"
    return f"{found['value']:+.3f} ({interval})"
