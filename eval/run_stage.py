"""What does a run's evaluation measure? Teacher, start and student, by `agreement` and by tasks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from transformers import PreTrainedModel

from eval.agreement_run import reply_records
from eval.browser import Seen, samples_section
from eval.models import Local
from eval.run_tasks import Comparison, ask, compare_tasks, samples_without_teacher, scores_of
from eval.sections import ROLES, Evaluation, comparison, comparison_sections, summary_section
from eval.task import Task
from eval.tasks.agreement import METRICS, TASK, Agreement, Record, agreement, micro_batches
from eval.thumbnails import Gallery
from shared.data.pairs import make_groups
from shared.durable import write_atomically
from shared.generation.transformers_engine import TransformersEngine
from shared.models.references import ModelRef
from shared.models.teachers import LocalTeacher, fingerprint_of_model
from shared.progress import Bar
from shared.report.formats import plus_minus
from shared.report.sections import Browser, KeyValues, RoleName, Section
from shared.run import Outcome, Run
from shared.session import sampling_dtype
from shared.types import Group, Response, Sample

RECORDS = 1  # raise it where the same responses get other figures, so that older ones are measured again
HEADLINES = ("kl_teacher_model", "top1_agreement", "expected_acceptance", "rouge_l")


def evaluate_run(run: Run) -> Outcome:
    """Compare the exported student, and the student before distillation, with the teacher.

    Then the tasks that the configuration names. Responses are stores below `evaluation/`, so an interrupted
    evaluation goes on where it was.
    """
    session = run.session
    if session.models.teacher is None:
        return _without_teacher(run)
    samples = session.heldout_samples[: run.config.evaluation.limit]
    ids = {sample.id for sample in samples}
    teacher_groups = [group for group in run.heldout_groups if group.sample.id in ids]
    folder = run.workspace.folder / "evaluation"
    teacher = session.teacher_engine()
    greedy: dict[RoleName, list[Response]] = {
        "teacher": _responses(run, teacher, samples, "teacher", "greedy")
    }
    ask(run, "teacher", Local(session.models.teacher, session.models.teacher_adapter), teacher)
    records: dict[RoleName, Agreement] = {}
    for name, load in _students(run).items():
        model = load()
        engine = session.engine(model, session.models.student_adapter, fingerprint_of_model(model))
        own = _responses(run, engine, samples, name, "sampled")
        greedy[name] = _responses(run, engine, samples, name, "greedy")
        if (known := _known_records(run, name)) is None:
            own_groups = make_groups(samples, {"student": own}, ("student",), truncated="keep").groups
            known = _agreement(run, model, teacher_groups, own_groups, greedy["teacher"], greedy[name], name)
            _write_records(run, name, known)
        records[name] = known
        ask(run, name, Local(model, session.models.student_adapter), engine)

    compared = comparison(
        METRICS,
        teacher=records["student"].of_teacher().columns(),
        start=records["start"].columns(),
        student=records["student"].columns(),
    )
    write_atomically(folder / "scores.json", json.dumps(compared.data(), indent=1))
    tasks = compare_tasks(run)
    return Outcome(
        data=compared.data() if tasks is None else _together(compared, tasks),
        sections=(
            *(tasks.sections if tasks else ()),
            summary_section(compared, METRICS, HEADLINES),
            _held_out_answers(samples, records | {"teacher": records["student"].of_teacher()}, greedy),
            *comparison_sections(compared, METRICS),
        ),
        figures=[*(tasks.figures if tasks else ()), *_figures(records["start"], records["student"])],
    )


def _without_teacher(run: Run) -> Outcome:
    """Start and student on the run's tasks, and nothing to compare them with."""
    session, scores = run.session, {}
    for role, load in _students(run).items():
        model = load()
        engine = session.engine(model, session.models.student_adapter, fingerprint_of_model(model))
        ask(run, role, Local(model, session.models.student_adapter), engine)
        scores[role] = scores_of(run, role)
    figures = [
        (name, f"{plus_minus(score['value'], score['stderr'])} (start {plus_minus(before['value'], None)})")
        for (name, score), before in zip(scores["student"].items(), scores["start"].values(), strict=True)
    ]
    sections: list[Section] = []
    if figures:
        sections = [KeyValues("Tasks", dict(figures)), samples_without_teacher(run)]
    return Outcome({"scores": scores, "retention": {}, "gap_closed": {}}, sections, figures)


def _students(run: Run) -> dict[RoleName, Callable[[], PreTrainedModel]]:
    return {"start": run.session.start_model, "student": lambda: _exported(run)}


def _held_out_answers(
    samples: Sequence[Sample],
    found: Mapping[RoleName, Agreement],
    greedy: Mapping[RoleName, Sequence[Response]],
) -> Browser:
    """Every held-out prompt with its images and the greedy responses of all three."""
    records = {role: reply_records(samples, found[role], greedy[role]) for role in ROLES}
    tasks: dict[str, Task] = {
        name: replace(TASK, name=name) for name in dict.fromkeys(sample.task for sample in samples)
    }
    task_of = {sample.id: sample.task for sample in samples}
    seen = [
        Seen(
            role.capitalize(),
            role,
            {name: [r for r in records[role] if task_of[r.sample_id] == name] for name in tasks},
        )
        for role in ROLES
    ]
    return samples_section(
        seen,
        tasks,
        students=[ROLES.index("student")],
        gallery=Gallery(),
        title="Held-out answers",
        note="Greedy responses. Score: ROUGE-L against the teacher's response.",
    )


def _together(agreement: Evaluation, tasks: Comparison) -> dict[str, Any]:
    """One entry of report.json for both: tasks' metrics are named TASK/METRIC, agreement's have no task."""
    data, more = agreement.data(), tasks.compared.evaluations["student"].data()
    data["scores"] = {role: {**scores, **more["scores"][role]} for role, scores in data["scores"].items()}
    for name in ("retention", "gap_closed", "difference"):
        data[name] = {**data[name], **more[name]}
    return {
        **data,
        "tasks": {name: dict(tasks.compared.runs[0].pinned[name]) for name in tasks.compared.tasks},
    }


def _responses(
    run: Run,
    engine: TransformersEngine,
    samples: Sequence[Sample],
    name: RoleName,
    how: Literal["sampled", "greedy"],
) -> list[Response]:
    session = run.session
    return session.collect(
        engine,
        "teacher" if name == "teacher" else "student",
        samples,
        run.workspace.folder / "evaluation" / "responses" / f"{name}-{how}",
        sampling=session.sampling() if how == "sampled" else session.greedy(),
        what=f"{name}, {how}",
        alone=True,  # the other processes of a run have ended by now
    )


def _exported(run: Run) -> PreTrainedModel:
    """The student as a user will load it."""
    ref = ModelRef(name=str(run.workspace.folder / "student"))
    model = run.kind.load(ref, dtype=sampling_dtype(run.config))
    return model.to(run.session.accelerator.device)  # type: ignore[return-value]


def _agreement(
    run: Run,
    model: PreTrainedModel,
    teacher_groups: Sequence[Group],
    own_groups: Sequence[Group],
    teacher_greedy: Sequence[Response],
    model_greedy: Sequence[Response],
    name: RoleName,
) -> Agreement:
    models, budget = run.session.models, run.config.training.micro_batch_tokens
    assert models.teacher is not None, "a run without a teacher has no agreement"
    tokens = models.student_adapter.prompt_tokens
    batches = [micro_batches(groups, tokens, batch_tokens=budget) for groups in (teacher_groups, own_groups)]
    total = sum(map(len, batches))
    with run.speaker.bar(f"{name}, agreement with the teacher") as bar:
        return agreement(
            LocalTeacher(models.teacher, models.teacher_adapter, models.vocabulary),
            LocalTeacher(model, models.student_adapter, models.vocabulary),
            teacher_batches=_told(batches[0], bar, 0, total),
            own_batches=_told(batches[1], bar, len(batches[0]), total),
            teacher_greedy=teacher_greedy,
            model_greedy=model_greedy,
        )


def _write_records(run: Run, name: RoleName, found: Agreement) -> None:
    path = run.workspace.folder / "evaluation" / f"{name}.jsonl"
    write_atomically(path, "".join(json.dumps(record.row()) + "\n" for record in found.records))
    write_atomically(path.with_suffix(".key"), _records_key(run, name))


def _known_records(run: Run, name: RoleName) -> Agreement | None:
    """What this run, or another of its sweep, has measured on the very same responses."""
    key = _records_key(run, name)
    keys = run.workspace.folder / "evaluation" / f"{name}.key"
    for path in (keys, *run.workspace.beside(keys)):
        lines = path.with_suffix(".jsonl")
        if path.exists() and lines.exists() and path.read_text(encoding="utf-8") == key:
            rows = map(json.loads, lines.read_text(encoding="utf-8").splitlines())
            found = Agreement(tuple(map(Record.of_row, rows)))
            if path != keys:
                run.speaker.say(f"  {name}, agreement with the teacher: taken from {path.parent}")
                _write_records(run, name, found)
            return found
    return None


def _records_key(run: Run, name: RoleName) -> str:
    """Figures follow from the responses and the weights that made them, and a store holds or names both."""
    folder, key = run.workspace.folder, hashlib.sha256(f"{RECORDS}".encode())
    of_this = (f"evaluation/responses/{of}" for of in ("teacher-greedy", f"{name}-sampled", f"{name}-greedy"))
    for store in ("heldout", *of_this):
        for file in sorted((folder / store).iterdir()):
            key.update(file.read_bytes())
    return key.hexdigest()


def _told(batches: Sequence[Sequence[Group]], bar: Bar, before: int, total: int) -> Iterator[Sequence[Group]]:
    for index, batch in enumerate(batches):
        bar(before + index, total)
        yield batch


def _figures(start: Agreement, student: Agreement) -> list[tuple[str, str]]:
    """Each metric of the student, and from where it came."""
    before = start.scores()
    figures = []
    for name, score in student.scores().items():
        title, unit = METRICS[name].title, METRICS[name].unit
        came_from = plus_minus(before[name]["value"], None)
        label = title if unit in title.lower() else f"{title}, {unit}"
        figures.append((label, f"{plus_minus(score['value'], score['stderr'])} (start {came_from})"))
    return figures
