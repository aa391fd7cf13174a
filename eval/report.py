"""What does a comparison put into report.json and report.html? Retention, figures by task, all samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from eval.browser import Seen, samples_section
from eval.compare import Compared
from eval.controls import Control
from eval.scores import Metric
from eval.sections import (
    GAP_CLOSED,
    RETENTION,
    ROLES,
    Line,
    difference_text,
    quotient_panel,
    score_panel,
    score_text,
    share_text,
)
from eval.task import Task
from eval.thumbnails import Gallery
from shared.report.formats import MISSING, axis_number, percent
from shared.report.sections import (
    BarPanel,
    Bars,
    Cell,
    KeyValues,
    Report,
    RoleName,
    Section,
    Summary,
    Table,
    Tile,
)

INTERVALS = (
    "Scores with 95 % intervals from their standard errors; retention and gap closed with those of 10,000 "
    "paired resamples of whole images or questions. Start is the student before distillation."
)
WITHOUT = "without images"


def report_data(compared: Compared) -> dict[str, Any]:
    """As it stands in report.json: the first student's comparison, then those of the others."""
    first, *others = compared.evaluations
    return {
        "models": {
            role: {"folder": str(run.folder), **run.model}
            for role, run in zip(compared.roles, compared.runs, strict=True)
        },
        "tasks": {name: dict(compared.runs[0].pinned[name]) for name in compared.tasks},
        "left_out": list(compared.left_out),
        **compared.evaluations[first].data(),
        "students": {role: compared.evaluations[role].data() for role in others},
        "controls": {
            role: {
                "folder": str(control.run.folder),
                "scores": dict(control.scores),
                "added_by_images": dict(control.added),
            }
            for role, control in compared.controls.items()
        },
    }


def page(compared: Compared, *, gallery: Gallery | None = None) -> Report:
    """The page of a comparison."""
    names = {role: run.model["name"] for role, run in zip(compared.roles, compared.runs, strict=True)}
    return Report(
        title=f"How much is kept of {names['teacher']}",
        subtitle=". ".join(f"{label(role)}: {name}" for role, name in names.items() if role != "teacher"),
        sections=(
            _glance(compared),
            _bars(compared),
            *(_table(compared, name, task) for name, task in compared.tasks.items()),
            _samples(compared, gallery or Gallery()),
            _setup(compared),
        ),
    )


def label(role: str) -> str:
    """A role as a reader knows it: Student 2."""
    return role.capitalize().replace("-", " ")


def headline(compared: Compared, task: str) -> str | None:
    """The first metric that has a score everywhere: without references there is no ROUGE-L, for one."""
    names = [f"{task}/{key}" for key in compared.tasks[task].metrics]
    every = [scores for found in compared.evaluations.values() for scores in found.scores.values()]
    return next((name for name in names if all(name in scores for scores in every)), None)


def _glance(compared: Compared) -> Summary:
    tiles = []
    for task in compared.tasks:
        if (name := headline(compared, task)) is None:
            continue
        for role, found in compared.evaluations.items():
            show = percent if compared.metrics[name].unit == "share" else axis_number
            values = {r: show(found.scores[r][name]["value"]) for r in ROLES}
            kept = found.retention.get(name)
            whose = f", {label(role).lower()}" if len(compared.evaluations) > 1 else ""
            tiles.append(
                Tile(
                    compared.metrics[name].title + whose,
                    MISSING if kept is None or kept["value"] is None else percent(kept["value"]),
                    f"{values['student']} of the teacher's {values['teacher']}; start {values['start']}",
                )
            )
    return Summary("Retention at a glance", tuple(tiles), "The student's share of the teacher's score.")


def _bars(compared: Compared) -> Bars:
    metrics = compared.metrics
    panels = []
    for (title, unit), of in ((RETENTION, "retention"), (GAP_CLOSED, "gap_closed")):
        students = [Line(label(r), _colour(r), getattr(e, of)) for r, e in compared.evaluations.items()]
        if students[0].found:
            panels.append(quotient_panel(title, unit, students, metrics))
    scores = {role: Line(label(role), _colour(role), found) for role, found in _scores(compared).items()}
    panels += _panels("Scores", list(scores.values()), metrics)
    for role, control in _controls(compared):
        shown = scores[role]._replace(found={name: scores[role].found[name] for name in control.scores})
        panels += _panels(f"{label(role)} {WITHOUT}", [shown, Line(WITHOUT, None, control.scores)], metrics)
    return Bars("Retention and scores", tuple(panels), INTERVALS)


def _panels(title: str, lines: Sequence[Line], metrics: Mapping[str, Metric]) -> Iterator[BarPanel]:
    """One for each unit."""
    names = [name for name in metrics if any(name in line.found for line in lines)]
    for unit in dict.fromkeys(metrics[name].unit for name in names):
        of_unit = [name for name in names if metrics[name].unit == unit]
        yield score_panel(lines, metrics, of_unit, unit, title if unit == "share" else f"{title}: {unit}")


def _table(compared: Compared, name: str, task: Task) -> Table:
    """A column for each model; for each metric its score, and what is made of it."""
    facts: list[tuple[str, Mapping[str, Mapping[str, Any]], Callable[[Any], str | None]]] = [
        ("", _scores(compared), score_text),
        ("retention", {r: found.retention for r, found in compared.evaluations.items()}, share_text),
        ("gap closed", {r: found.gap_closed for r, found in compared.evaluations.items()}, share_text),
        ("less teacher", {r: found.difference for r, found in compared.evaluations.items()}, difference_text),
        (WITHOUT, {r: control.scores for r, control in compared.controls.items()}, score_text),
        ("added by images", {r: control.added for r, control in compared.controls.items()}, difference_text),
    ]
    rows: list[tuple[Cell, ...]] = []
    for key, title in _titles(compared, name, task).items():
        for fact, by_role, text in facts:
            cells = [text(by_role.get(role, {}).get(key)) for role in compared.roles]
            if any(cell is not None for cell in cells):
                rows.append((f"… {fact}" if fact else title, *cells))
    summaries = [run.scores[name] for run in compared.runs]
    rows.append(
        ("Replies cut at the length limit", *(s["finish_reasons"].get("length", 0) for s in summaries))
    )
    for what, total in (("Tokens", "reply_tokens"), ("Seconds", "seconds")):
        means = [None if s[total] is None else s[total] / s["replies"] for s in summaries]
        if any(mean is not None for mean in means):
            rows.append((f"{what} of a reply, on average", *means))
    note = f"{task.summary[0].upper()}{task.summary[1:]}. Score ± standard error; 95 % intervals in brackets."
    return Table(name, ("Metric", *map(label, compared.roles)), tuple(rows), note)


def _titles(compared: Compared, name: str, task: Task) -> dict[str, str]:
    """The task's metrics and quotients by TASK/METRIC; in its own table without its name."""
    titles = {
        key: metric.title.removeprefix(f"{name}: ")
        for key, metric in compared.metrics.items()
        if key.startswith(f"{name}/")
    }
    return titles | {f"{name}/{key}": quotient.title for key, quotient in task.quotients.items()}


def _scores(compared: Compared) -> dict[str, Mapping[str, Any]]:
    """Scores by role, those of the students too."""
    first = next(iter(compared.evaluations.values()))
    students = {role: found.scores["student"] for role, found in compared.evaluations.items()}
    return {"teacher": first.scores["teacher"], "start": first.scores["start"], **students}


def _controls(compared: Compared) -> list[tuple[str, Control]]:
    """In the order of the roles."""
    return [(role, compared.controls[role]) for role in compared.roles if role in compared.controls]


def _colour(role: str) -> RoleName | None:
    return next((name for name in ROLES if name == role), None)


def _samples(compared: Compared, gallery: Gallery) -> Section:
    seen = [
        Seen(label(role), _colour(role), run.records)
        for role, run in zip(compared.roles, compared.runs, strict=True)
    ]
    seen += [Seen(f"{label(role)} {WITHOUT}", None, c.run.records) for role, c in _controls(compared)]
    students = range(2, len(compared.roles))
    return samples_section(seen, compared.tasks, students=students, gallery=gallery)


def _setup(compared: Compared) -> KeyValues:
    entries: dict[str, Cell] = {}
    for role, run in zip(compared.roles, compared.runs, strict=True):
        entries[label(role)] = f"{run.model['name']} ({run.folder})"
    for role, control in _controls(compared):
        entries[f"{label(role)} {WITHOUT}"] = f"{control.run.model['name']} ({control.run.folder})"
    for name in compared.tasks:
        pinned = compared.runs[0].pinned[name]
        entries[name] = (
            f"version {pinned['version']}, {pinned['questions']:,} questions, temperature "
            f"{pinned['sampling']['temperature']}, up to {pinned['sampling']['max_new_tokens']:,} tokens"
        )
    if compared.left_out:
        entries["Left out, since not all did them"] = ", ".join(compared.left_out)
    return KeyValues("Runs", entries)
