"""What came out of a sweep? Its figures as JSON, a table for the terminal, a page with error bars."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.progress import Speaker
from shared.report.formats import cell, percent, plus_minus
from shared.report.html import write_report
from shared.report.sections import Bar, BarPanel, Bars, BarSeries, KeyValues, Report, Table
from shared.sweep import Result, Sweep, chosen_rate

START = "before distillation"
NAME = "sweep"


def write_sweep(sweep: Sweep[Any], results: Sequence[Result]) -> dict[str, Any]:
    """Write `sweep.json` and `sweep.html` of the runs so far; returns what the first holds."""
    data = sweep_data(sweep, results)
    config = sweep.config
    chosen_by = "" if len(config.learning_rates) == 1 else f", {len(config.learning_rates)} learning rates"
    report = Report(
        title=config.name,
        subtitle=f"{len(config.settings)} settings, {len(config.seeds)} seeds{chosen_by}, "
        f"{len(results)} of {sweep.total} runs",
        sections=(
            Bars("Settings", tuple(_panel(data, metric) for metric in data["metrics"]), note=data["rule"]),
            Table("All figures", *_table(data), note="Mean ± standard deviation over seeds."),
            Table("Learning rates, first seed", *_rates_table(data)),
            KeyValues("The runs", {"folder": str(sweep.folder), "seeds": ", ".join(map(str, config.seeds))}),
        ),
    )
    write_report(sweep.folder, report, data, name=NAME)
    return data


def say_sweep(data: Mapping[str, Any], speaker: Speaker, folder: Path | None) -> None:
    """The table, and where the page is, if one was written."""
    columns, rows = _table(data)
    speaker.table(columns, [[cell(value) for value in row] for row in rows])
    if folder is not None:
        speaker.stage(f"Report: {folder / NAME}.html")


def sweep_data(sweep: Sweep[Any], results: Sequence[Result]) -> dict[str, Any]:
    """All figures, as JSON: of every setting at its learning rate over seeds, and of every run."""
    config = sweep.config
    names = (*config.metrics, *config.shown)
    settings = {}
    for setting in config.settings:
        rate = chosen_rate(results, setting, config)
        mine = [r for r in results if r.combination[:2] == (setting, rate) and r.report is not None]
        settings[setting] = {
            "learning_rate": rate,
            "seeds": [result.combination.seed for result in mine],
            "scores": {metric: _spread([result.score(metric) for result in mine]) for metric in names},
            "same": _mean(share for result in mine for share in _shares(result)),
            "seconds": _mean(_seconds(result) for result in mine),
        }
    by_seed = {r.combination.seed: r for r in results if r.report is not None}
    return {
        "name": config.name,
        "rule": _rule(config.metrics[0], len(config.learning_rates)),
        "metrics": list(config.metrics),
        "shown": list(config.shown),
        START: {metric: _spread([r.score(metric, "start") for r in by_seed.values()]) for metric in names},
        "settings": settings,
        "runs": [
            {
                **result.combination._asdict(),
                "folder": result.combination.label,
                "finite": result.report is not None,
                "scores": {metric: result.score(metric) for metric in names},
                "pairs": (result.report or {}).get("pairs"),
                "seconds": _seconds(result),
            }
            for result in results
        ],
    }


def _rule(metric: str, rates: int) -> str:
    bars = "Bars are means over seeds, their ends one standard deviation."
    if rates == 1:
        return bars
    return f"Each setting was tried at {rates} learning rates; {metric} with the first seed chose. {bars}"


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    return {
        "mean": _mean(known),
        "sd": statistics.stdev(known) if len(known) > 1 else None,
        "values": known,
    }


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _shares(result: Result) -> list[float | None]:
    return [facts["same"] for facts in (result.report or {}).get("pairs", []) if facts]


def _seconds(result: Result) -> float | None:
    return sum(result.report["timing_s"].values()) if result.report else None


def _panel(data: Mapping[str, Any], metric: str) -> BarPanel:
    scores = {START: data[START][metric], **{k: v["scores"][metric] for k, v in data["settings"].items()}}
    bars = tuple(
        Bar(s["mean"], *((s["mean"] - s["sd"], s["mean"] + s["sd"]) if s["sd"] is not None else (None, None)))
        for s in scores.values()
    )
    return BarPanel(metric, metric, tuple(scores), (BarSeries("student", bars, "student"),))


def _table(data: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[tuple[str | None, ...], ...]]:
    names = (*data["metrics"], *data["shown"])

    def scores(of: Mapping[str, Any]) -> list[str | None]:
        return [None if of[m]["mean"] is None else plus_minus(of[m]["mean"], of[m]["sd"]) for m in names]

    rows = [(START, None, None, *scores(data[START]), None, None)]
    for setting, found in data["settings"].items():
        rate, same, seconds = found["learning_rate"], found["same"], found["seconds"]
        rows.append(
            (
                setting,
                None if rate is None else f"{rate:g}",
                str(len(found["seeds"])),
                *scores(found["scores"]),
                None if same is None else percent(same),
                None if seconds is None else f"{seconds:.0f} s",
            )
        )
    return ("setting", "learning rate", "seeds", *names, "y_t = y_s", "a run"), tuple(rows)


def _rates_table(
    data: Mapping[str, Any],
) -> tuple[tuple[str, ...], tuple[tuple[str | float | None, ...], ...]]:
    first, metrics = data["runs"][0]["seed"], data["metrics"]
    rows = tuple(
        (run["setting"], f"{run['learning_rate']:g}", *(run["scores"][metric] for metric in metrics))
        for run in data["runs"]
        if run["seed"] == first
    )
    return ("setting", "learning rate", *metrics), rows
