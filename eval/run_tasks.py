"""Which tasks does a run's `evaluation:` name, and how do teacher, start and student fare on them?

Each model gets a folder as `distill-eval run` makes it, `evaluation/ROLE`, which `distill-eval compare` reads
too. What a run beside this one has found of the same model on the same questions is copied, not made again.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from eval.datasets import load_questions
from eval.evaluation import pin_model, run_jobs
from eval.judging import check_judge
from eval.metrics.clip_score import find_model
from eval.models import Local, Opened, opened_local
from eval.records import read_records
from eval.runner import prepare
from eval.scoring import sandbox_maker
from eval.sections import ROLES
from eval.suites import Job, Registry
from eval.task import Hub
from shared.config import EvaluationConfig
from shared.durable import committed_folder
from shared.errors import ConfigError
from shared.report.formats import percent, plus_minus

if TYPE_CHECKING:
    from eval.compare import Compared
    from shared.generation.engine import Engine
    from shared.report.sections import Browser, RoleName, Section
    from shared.run import Run

FINISHED = "scores.json"  # written last


def check_tasks(evaluation: EvaluationConfig, *, accepts_images: bool, starting: bool = False) -> None:
    """Refuse what would fail after training: names, settings, files, the judge.

    Args:
        evaluation: As the run's configuration has it.
        accepts_images: Whether the models of this modality see images.
        starting: The run is about to start: data sets of the hub are fetched, isolation of programs is tried.

    Raises:
        UserError: the first of them.
    """
    jobs = Registry().of_run(evaluation)
    for job in jobs:
        task, settings = job
        shown = settings.images == "shown"
        if task.images and shown and not accepts_images:
            raise ConfigError(
                f"evaluation.tasks: {task.name} shows images, and the models of this run take none. Remove "
                "it, or set images: removed for the control without images."
            )
        if settings.judge is not None:
            check_judge(settings.judge)
        if starting and settings.clip_model is not None:
            find_model(settings.clip_model)
        if task.runner is not None:
            task.runner.check(settings, starting=starting)
        elif starting or settings.data.path is not None or not isinstance(task.data, Hub):
            with tempfile.TemporaryDirectory() as images:
                load_questions(
                    task, settings.data, limit=settings.limit, image_folder=Path(images), find_images=shown
                )
    if starting and any(job.task.runs_code for job in jobs):
        sandbox_maker(allow_unsafe_execution=evaluation.allow_unsafe_execution)()


def ask(run: Run, role: RoleName, local: Local, engine: Engine) -> None:
    """Evaluate one of the run's models on the tasks that are not done yet."""
    config = run.config
    jobs = Registry().of_run(config.evaluation)
    if not jobs:
        return
    name = f"{config.name}, {role}"
    if role == "teacher" and config.teacher is not None:
        name = config.teacher.model.name
    opened = opened_local(name, local, engine)
    folder = run.workspace.folder / "evaluation" / role
    missing = [job for job in jobs if not _have(job, folder, opened, run)]
    if not missing:
        return
    run_jobs(
        missing,
        folder,
        lambda: opened,
        sandbox_maker(allow_unsafe_execution=config.evaluation.allow_unsafe_execution),
        batch_tokens=config.evaluation.batch_tokens or config.generation.batch_tokens,
        speaker=run.speaker,
    )


class Comparison(NamedTuple):
    """What the tasks add to the run's report."""

    compared: Compared
    sections: Sequence[Section]
    figures: Sequence[tuple[str, str]]


def scores_of(run: Run, role: RoleName) -> dict[str, Any]:
    """One model's scores on the run's tasks, as TASK/METRIC."""
    folder = run.workspace.folder / "evaluation" / role
    return {
        f"{job.task.name}/{metric}": score
        for job in Registry().of_run(run.config.evaluation)
        for metric, score in _read(folder / job.task.name / FINISHED)["scores"].items()
    }


def samples_without_teacher(run: Run) -> Browser:
    """Start and student side by side on the run's tasks."""
    from eval.browser import Seen, samples_section
    from eval.thumbnails import Gallery

    folder = run.workspace.folder / "evaluation"
    tasks = {job.task.name: job.task for job in Registry().of_run(run.config.evaluation)}
    seen = [
        Seen(role.capitalize(), role, {name: read_records(folder / role / name) for name in tasks})
        for role in ROLES[1:]
    ]
    return samples_section(seen, tasks, students=[1], gallery=Gallery())


def compare_tasks(run: Run) -> Comparison | None:
    """Teacher, start and student side by side; None where the run names no tasks."""
    from eval.compare import compare
    from eval.report import headline, page

    registry = Registry()
    if not registry.of_run(run.config.evaluation):
        return None
    folder = run.workspace.folder / "evaluation"
    compared = compare([folder / role for role in ROLES], registry)
    evaluation, metrics = compared.evaluations["student"], compared.metrics
    figures = []
    for metric in filter(None, (headline(compared, name) for name in compared.tasks)):
        of = {role: scores[metric] for role, scores in evaluation.scores.items()}
        text = plus_minus(of["student"]["value"], of["student"]["stderr"])
        before = ", ".join(f"{role} {plus_minus(of[role]['value'], None)}" for role in ("start", "teacher"))
        kept = evaluation.retention.get(metric)
        share = f", retention {percent(kept['value'])}" if kept and kept["value"] is not None else ""
        figures.append((metrics[metric].title, f"{text} ({before}{share})"))
    return Comparison(compared, page(compared).sections, figures)


def _have(job: Job, folder: Path, opened: Opened, run: Run) -> bool:
    """Whether the task is finished in the folder, or was in that of another run, from where it is copied."""
    name, place = job.task.name, folder / job.task.name
    folder.mkdir(parents=True, exist_ok=True)
    pin_model(folder, opened)
    if job.task.runner is None:
        prepare(job, folder)
    wanted = _identity(place, job)
    beside = sorted(run.workspace.folder.parent.glob(f"*/evaluation/*/{name}"))
    if job.task.runner is not None and job.settings.data.path is not None:
        beside = []  # nobody knows whether the files there are still the same
    for path in [place, *beside]:
        if (path / FINISHED).exists() and _identity(path, job) == wanted:
            if path != place:
                run.speaker.say(f"  {name}: taken from {path}")
                with committed_folder(place) as target:
                    shutil.copytree(path, target, dirs_exist_ok=True)
            return True
    return False


def _identity(folder: Path, job: Job) -> object:
    """All that a task's scores depend on: the model, questions and sampling, and what scored them."""
    fingerprint = _read(folder.parent / "model.json")["fingerprint"]
    if job.task.runner is not None:  # its questions are known to its settings alone
        finished = (folder / FINISHED).exists()
        version = _read(folder / "task.json")["version"] if finished else job.task.version
        settings = _read(folder / "settings.json") if finished else job.settings.model_dump(mode="json")
        return fingerprint, version, settings
    settings = _read(folder / "settings.json")
    return fingerprint, _read(folder / "task.json"), settings["judge"], settings["clip_model"]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
