"""What does `distill-eval run` do, from the words of the command line to the table of scores?"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from eval.judging import check_judge, make_judging
from eval.metrics.clip_score import find_model
from eval.models import Opened, open_model, require_images
from eval.runner import predict, prepare
from eval.scoring import sandbox_maker, score_task
from eval.settings import TaskSettings, nested
from eval.suites import Job, Registry
from eval.task import Task
from shared.durable import write_atomically
from shared.errors import StoreError, UserError
from shared.progress import Speaker
from shared.report.formats import cell, plus_minus

Scores = dict[str, dict[str, Any]]  # of each task, as its scores.json


def evaluate(
    model: str,
    words: Sequence[str],
    *,
    output: Path | None,
    dtype: str,
    device: str | None,
    batch_tokens: int,
    includes: Sequence[Path],
    allow_unsafe_execution: bool,
    speaker: Speaker,
) -> Scores:
    """Prepare all data, ask the model everything, let it go, then score.

    Raises:
        UserError: whatever in names, settings, data or model cannot be used; before the model is loaded
            where that can be known.
    """
    names = [word for word in words if "=" not in word]
    options = nested([word for word in words if word.startswith("model.")]).get("model", {})
    settings = [word for word in words if "=" in word and not word.startswith("model.")]
    if not names:
        raise UserError("no task named. `distill-eval list` shows tasks and suites.")
    registry = Registry(includes)
    jobs = registry.jobs(names, settings)
    sandbox = sandbox_maker(allow_unsafe_execution=allow_unsafe_execution)
    if any(job.task.runs_code for job in jobs):
        speaker.say(f"  sandbox: {sandbox().description}")  # refuses now, not after hours of sampling
    if any(job.task.images and job.settings.images == "shown" for job in jobs):
        require_images(model, options)
    folder = output or Path("evaluations") / slug(model)

    def opened() -> Opened:
        speaker.stage(f"Asking {model}")
        return open_model(model, options, dtype=dtype, device=device)

    results = run_jobs(jobs, folder, opened, sandbox, batch_tokens=batch_tokens, speaker=speaker)
    show_scores(results, {name: registry.task_in(folder / name) for name in results}, speaker)
    speaker.say(f"Records and scores are in {folder}")
    return results


def run_jobs(
    jobs: Sequence[Job],
    folder: Path,
    opened: Callable[[], Opened],
    sandbox: Callable[[], Any],
    *,
    batch_tokens: int,
    speaker: Speaker,
) -> Scores:
    """Read the data, open the model, ask it everything, let it go, score.

    Raises:
        UserError: data that cannot be used, a folder of another model or of other settings.
    """
    with _alone_in(folder):
        for task, settings in jobs:
            if task.runner is not None:
                task.runner.check(settings, starting=True)
            if settings.clip_model is not None:
                find_model(settings.clip_model)
            if settings.judge is not None:
                check_judge(settings.judge)
        prepared = [prepare(job, folder) for job in jobs if job.task.runner is None]
        model = opened()
        pin_model(folder, model)
        results: Scores = {}
        for each in prepared:
            predict(each, model, batch_tokens=batch_tokens, speaker=speaker)
        for task, settings in jobs:
            if task.runner is not None:
                place = folder / task.name
                results[task.name] = task.runner.run(
                    settings, model, place, batch_tokens=batch_tokens, speaker=speaker
                )
        del model  # a judge may need its memory
        speaker.stage("Scoring")
        for each in prepared:
            task, settings = each.job
            judging = make_judging(settings.judge, speaker)
            results[task.name] = score_task(
                each.folder, task, settings, sandbox, speaker=speaker, judging=judging
            )
        return {job.task.name: results[job.task.name] for job in jobs}


def score_again(
    folder: Path, *, includes: Sequence[Path], allow_unsafe_execution: bool, speaker: Speaker
) -> Scores:
    """Score every task of a run's folder anew, from its replies.

    Raises:
        StoreError: no run in the folder, or replies to another version of a task.
    """
    registry = Registry(includes)
    sandbox = sandbox_maker(allow_unsafe_execution=allow_unsafe_execution)
    tasks = {each.name: registry.task_in(each) for each in task_folders(folder)}
    results = {}
    with _alone_in(folder):
        for name, task in tasks.items():
            if task.runner is not None:
                speaker.say(f"  {name} scores when it is run: the same distill-eval run command does it anew")
                continue
            text = (folder / name / "settings.json").read_text(encoding="utf-8")
            settings = TaskSettings.model_validate_json(text)
            results[name] = score_task(
                folder / name,
                task,
                settings,
                sandbox,
                speaker=speaker,
                judging=make_judging(settings.judge, speaker),
                anew=True,
            )
    show_scores(results, tasks, speaker)
    return results


def task_folders(folder: Path) -> list[Path]:
    """The tasks in a run's folder.

    Raises:
        StoreError: none.
    """
    found = sorted(path.parent for path in folder.glob("*/task.json"))
    if not found:
        raise StoreError(
            f"{folder} holds no evaluation. `distill-eval run MODEL TASK --output {folder}` makes one."
        )
    return found


def slug(model: str) -> str:
    """A folder's name for a model."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.removeprefix("pkg://")).strip("-.")
    return name or "model"


def show_scores(results: Scores, tasks: Mapping[str, Task], speaker: Speaker) -> None:
    """A table of every metric with its standard error."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
    for title in ("Task", "Metric", "Score ± standard error", "n"):
        table.add_column(title, justify="right" if title == "n" else "left")
    for name, result in results.items():
        task = tasks[name]
        titles = {key: metric.title for key, metric in task.metrics.items()}
        titles |= {key: quotient.title for key, quotient in task.quotients.items()}
        for metric, found in result["scores"].items():
            value = plus_minus(found["value"], found["stderr"])
            table.add_row(Text(name), Text(titles[metric]), value, cell(found["n"]))
        cut = result["finish_reasons"].get("length", 0)
        if cut:
            table.add_row(
                "", Text(f"{cut} of {result['replies']} replies cut by the length limit", style="dim")
            )
        for doubt in result.get("judge", {}).get("doubts", ()):
            table.add_row("", Text(f"judge: {doubt}", style="yellow"))
    speaker.console.print(table)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system gives it back when the process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "evaluation.lock").open("a")
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror}. Give another --output.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"another process evaluates into {folder}. Wait for it, or give another --output."
            ) from None
        yield


def pin_model(folder: Path, opened: Opened) -> None:
    """A folder is one model's."""
    path = folder / "model.json"
    wanted = {"name": opened.name, "fingerprint": opened.engine.fingerprint, **opened.details}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["fingerprint"] != wanted["fingerprint"]:
            raise StoreError(
                f"{folder} holds an evaluation of another model: {found} there, {wanted} now. "
                "Use another --output."
            )
        return
    write_atomically(path, json.dumps(wanted, indent=1))
