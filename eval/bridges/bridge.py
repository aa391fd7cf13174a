"""How does another harness's evaluation become a task's folder, with records, scores and metrics?"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from eval.bridges import HARNESSES, bridged_task
from eval.bridges.asking import Asked, Asker, Document
from eval.models import Opened
from eval.records import Record
from eval.runner import pin
from eval.scores import Metric
from eval.scoring import total, write_records
from eval.settings import TaskSettings, refuse_unused
from eval.task import Quotient, Task
from shared.durable import write_atomically
from shared.progress import Speaker

USED = ("data.path", "limit", "num_fewshot", "max_new_tokens", "temperature", "top_p", "top_k", "seed")
METRICS = "metrics.json"  # what the values showed of them; not part of what two runs must share


class Found(NamedTuple):
    """What a harness's evaluation gave. Metrics are named METRIC,FILTER, or METRIC for the filter `none`."""

    versions: Mapping[str, Any]  # of each of its tasks
    values: Mapping[Document, Mapping[str, object]]  # of each document
    answers: Mapping[Document, str]  # as it read them
    targets: Mapping[Document, str]
    totals: Mapping[str, Mapping[str, float]]  # of each of its tasks, over all documents
    errors: Mapping[str, Mapping[str, float]]  # their standard errors, where it gives them
    higher_is_better: Mapping[str, bool]


@dataclass(frozen=True)
class Bridge:
    """Runs a task of another harness (`eval.task.Runner`)."""

    harness: str
    name: str

    def check(self, settings: TaskSettings, *, starting: bool) -> None:
        """Refuse settings without effect; before a start also a name that the harness does not know."""
        refuse_unused(settings, f"{self.harness}:{self.name}", USED)
        if starting:
            self._side().load(self.name, settings)

    def run(
        self, settings: TaskSettings, opened: Opened, folder: Path, *, batch_tokens: int, speaker: Speaker
    ) -> dict[str, Any]:
        """Let the harness ask and score; write records and scores."""
        task = bridged_task(f"{self.harness}:{self.name}")
        asker = Asker(
            opened,
            task.family,
            settings,
            folder=folder,
            identity={"task": task.name, "version": str(task.version)},
            batch_tokens=batch_tokens,
            speaker=speaker,
        )
        chosen = {
            "task": task.name,
            "version": task.version,
            "sampling": settings.model_dump(
                include={"max_new_tokens", "temperature", "top_p", "top_k", "seed"}
            ),
            "num_fewshot": settings.num_fewshot,
        }
        folder.mkdir(parents=True, exist_ok=True)
        pin(folder / "chosen.json", {**chosen, "limit": settings.limit})  # before anything is asked
        found: Found = self._side().evaluate(self.name, settings, asker, folder)
        task = _with_metrics(task, found)
        records = _records(found, asker, task)
        pinned = {
            **chosen,
            "harness_versions": dict(found.versions),
            "questions": len(records),
            "sample_set": _digest([[r.sample_id, r.prompt, r.references, r.cluster] for r in records]),
        }
        pin(folder / "task.json", pinned)
        found_metrics = {
            "metrics": {name: metric._asdict() for name, metric in task.metrics.items()},
            "quotients": {name: quotient._asdict() for name, quotient in task.quotients.items()},
        }
        write_atomically(folder / METRICS, json.dumps(found_metrics, indent=1))
        write_atomically(folder / "harness.json", json.dumps(dict(found.totals), indent=1))
        write_atomically(folder / "settings.json", settings.model_dump_json(indent=1))
        return write_records(folder, task, records, {}, more=_totals(task, found, len(records)))

    def _side(self) -> Any:
        return importlib.import_module(HARNESSES[self.harness].module)


def task_in(folder: Path) -> Task:
    """The task of a finished folder, with its metrics; the harness need not be installed."""
    pinned, found = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("task.json", METRICS)
    )
    return replace(
        bridged_task(pinned["task"], of_version=pinned["version"]),
        metrics={key: Metric(**values) for key, values in found["metrics"].items()},
        quotients={key: Quotient(**values) for key, values in found["quotients"].items()},
    )


def found_in(results: Mapping[str, Any]) -> Found:
    """What both harnesses' `simple_evaluate` returns, which is of one origin."""
    values: dict[Document, dict[str, object]] = {}
    answers: dict[Document, str] = {}
    targets: dict[Document, str] = {}
    totals, errors = {}, {}
    higher: dict[str, bool] = {}
    for name, samples in results["samples"].items():
        found = results["results"][name]
        keys = [
            key
            for key, value in found.items()
            if "," in key and isinstance(value, int | float) and math.isfinite(value)
        ]
        totals[name] = {_short(key): float(found[key]) for key in keys if "_stderr," not in key}
        errors[name] = {
            _short(key.replace("_stderr,", ",")): float(found[key]) for key in keys if "_stderr," in key
        }
        higher |= {k: v is not False for k, v in results["higher_is_better"].get(name, {}).items()}
        filters = list(dict.fromkeys(key.partition(",")[2] for key in keys))
        seen: dict[Document, int] = {}
        for sample in samples:
            document = (name, int(sample["doc_id"]))
            turn = seen[document] = seen.get(document, -1) + 1
            filter_name = sample.get("filter", filters[turn] if turn < len(filters) else "none")
            row = values.setdefault(document, {})
            for key in keys:
                metric, _, of_filter = key.partition(",")
                if of_filter == filter_name and metric in sample:
                    row[_short(key)] = sample[metric]
            if turn == 0:
                answers[document] = _text(sample["filtered_resps"])
                targets[document] = str(sample["target"])
    return Found(results["versions"], values, answers, targets, totals, errors, higher)


def _short(key: str) -> str:
    return key.removesuffix(",none")


def _text(filtered: Sequence[object]) -> str:
    """The first answer that is a text; log-likelihoods are none."""
    first = filtered[0] if filtered else ""
    if isinstance(first, list | tuple) and first and isinstance(first[0], str):
        first = first[0]
    return first if isinstance(first, str) else ""


def _with_metrics(task: Task, found: Found) -> Task:
    """Means over documents become metrics, which compare can resample; other sums do not."""
    metrics, quotients = {}, {}
    for key in dict.fromkeys(key for totals in found.totals.values() for key in totals):
        higher = found.higher_is_better.get(key.split(",")[0], True)
        if all(
            _is_mean(key, name, totals[key], found) for name, totals in found.totals.items() if key in totals
        ):
            numbers = [float(values[key]) for values in found.values.values() if key in values]  # type: ignore[arg-type]
            unit = "share" if all(0 <= number <= 1 for number in numbers) else key
            metrics[key] = Metric(key, unit, higher)
        elif len(found.totals) == 1:
            quotients[key] = Quotient(key, "", "", higher)
    return replace(task, metrics=metrics, quotients=quotients)


def _is_mean(key: str, name: str, total: float, found: Found) -> bool:
    values = [values.get(key) for (task, _), values in found.values.items() if task == name]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    if not numbers or len(numbers) < len(values):
        return False
    return math.isclose(sum(numbers) / len(numbers), total, rel_tol=1e-6, abs_tol=1e-9)


def _totals(task: Task, found: Found, count: int) -> dict[str, Any]:
    """The harness's own figures where they are no means over documents."""
    return {
        key: {
            "value": totals[key],
            "stderr": found.errors.get(name, {}).get(key),
            "n": count,
            "higher_is_better": quotient.higher_is_better,
        }
        for name, totals in found.totals.items()
        for key, quotient in task.quotients.items()
    }


def _records(found: Found, asker: Asker, task: Task) -> list[Record]:
    several = len(found.totals) > 1
    records = []
    for document, values in found.values.items():
        name, number = document
        asked = asker.asked[document]
        said = _said(asked)
        images = tuple(dict.fromkeys(image for one in asked for image in one.images))
        usages = [one.usage for one in asked]
        records.append(
            Record(
                sample_id=f"{name}/{number}" if several else str(number),
                draw=0,
                prompt=asked[0].prompt,
                images=images,
                references=(found.targets[document],),
                replies=tuple(one.reply for one in said),
                finish_reasons=tuple(one.finish_reason for one in said),
                answer=found.answers[document] or said[0].reply,
                values={key: float(values[key]) for key in task.metrics if key in values},  # type: ignore[arg-type]
                note=_note(asked),
                cluster=" ".join(Path(image).stem for image in images) or None,
                prompt_tokens=total(usage and usage.prompt_tokens for usage in usages),
                reply_tokens=total(usage and usage.response_tokens for usage in usages),
                seconds=total(usage and usage.seconds for usage in usages),
            )
        )
    return records


def _said(asked: Sequence[Asked]) -> Sequence[Asked]:
    """Replies as they are; of continuations that were given, the likeliest."""
    likely = [one for one in asked if one.log_likelihood is not None]
    if len(likely) < len(asked):
        return asked
    return [max(likely, key=lambda one: one.log_likelihood or -math.inf)]


def _note(asked: Sequence[Asked]) -> str:
    likely = [one for one in asked if one.log_likelihood is not None]
    return "; ".join(f"{one.reply.strip()}: {one.log_likelihood:.2f} nats" for one in likely)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
