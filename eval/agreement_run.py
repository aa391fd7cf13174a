"""How is `agreement` run as a task? Two local models answer the same prompts and are compared on all answers.

A distillation run measures it on its held-out prompts by itself; here it is any two models on any file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.models import Local, Opened, open_model, opened_local
from eval.runner import fitting, prepare
from eval.scoring import write_records
from eval.settings import TaskSettings, refuse_unused
from eval.suites import Job
from shared.errors import ConfigError, UserError
from shared.models.loading import check_model_folder
from shared.models.references import SERVER_SCHEME, ModelRef
from shared.progress import Speaker
from shared.types import Request, Response, Sample, Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eval.records import Record
    from eval.tasks.agreement import Agreement
    from shared.models.vocabulary import SharedVocabulary

USED = (
    "data.path", "data.images", "teacher", "limit", "max_new_tokens", "temperature", "top_p", "top_k", "seed",
    "over_length",
)  # fmt: skip


class AgreementRunner:
    """Runs the task (`eval.task.Runner`)."""

    def check(self, settings: TaskSettings, *, starting: bool) -> None:
        """Refuse a run without a teacher, or with one of which only words can be had."""
        del starting
        refuse_unused(settings, "agreement", USED)
        if settings.teacher is None:
            raise ConfigError(
                "agreement compares with a teacher: set agreement.teacher=MODEL, a local model."
            )
        if settings.teacher.startswith(SERVER_SCHEME):
            raise UserError(f"agreement.teacher: {_no_server(settings.teacher)}")
        check_model_folder(ModelRef(name=settings.teacher))

    def run(
        self, settings: TaskSettings, opened: Opened, folder: Path, *, batch_tokens: int, speaker: Speaker
    ) -> dict[str, Any]:
        """Ask both models, compare."""
        from eval.tasks.agreement import TASK, agreement, micro_batches
        from shared.data.pairs import make_groups
        from shared.models.teachers import LocalTeacher

        if opened.local is None:
            raise UserError(f"agreement: {_no_server(opened.name)}")
        assert settings.teacher is not None, "checked before"
        prepared = prepare(Job(TASK, settings), folder.parent)
        speaker.stage(f"Comparing {opened.name} with {settings.teacher}")
        theirs = open_model(
            settings.teacher, {}, dtype=opened.details["dtype"], device=opened.details["device"]
        )
        assert theirs.local is not None, "a server was refused before"
        model, teacher, vocabulary = _alike(opened, theirs)
        sampling = settings.sampling(TASK)
        kept = fitting(prepared, model, sampling, speaker)
        kept = fitting(prepared._replace(questions=kept), teacher, sampling, speaker)
        samples = [question.sample(TASK.family) for question in kept]

        def answers(one: Opened, name: str, how: Sampling) -> list[Response]:
            return _answers(one, name, samples, how, folder, batch_tokens, speaker)

        greedy = Sampling(max_new_tokens=sampling.max_new_tokens, temperature=0.0)
        said = {
            name: (answers(one, f"{name}-sampled", sampling), answers(one, f"{name}-greedy", greedy))
            for name, one in (("teacher", teacher), ("own", model))
        }
        tokens = opened.prompt_tokens
        batches = {
            name: micro_batches(
                make_groups(samples, {"student": sampled}, ("student",), truncated="keep").groups,
                tokens,
                batch_tokens=batch_tokens,
            )
            for name, (sampled, _) in said.items()
        }
        found = agreement(
            LocalTeacher(theirs.local.model, theirs.local.adapter, vocabulary),
            LocalTeacher(opened.local.model, opened.local.adapter, vocabulary),
            teacher_batches=batches["teacher"],
            own_batches=batches["own"],
            teacher_greedy=said["teacher"][1],
            model_greedy=said["own"][1],
        )
        clusters = dict(zip([q.id for q in prepared.questions], prepared.clusters, strict=True))
        replies = {response.sample_id: response.text for response in said["teacher"][1]}
        records = [
            record._replace(
                references=(replies[record.sample_id],),
                note="reference: the teacher's own reply",
                cluster=clusters[record.sample_id],
            )
            for record in reply_records(samples, found, said["own"][1])
        ]
        return write_records(folder, TASK, records, {"teacher": teacher.engine.fingerprint})


def reply_records(samples: Sequence[Sample], found: Agreement, greedy: Sequence[Response]) -> list[Record]:
    """One for each prompt: a model's greedy reply to read, and the values of all metrics."""
    from eval.records import Record

    values: dict[str, dict[str, float]] = {}
    for metric, column in found.columns().items():
        for sample_id, value in zip(column.sample_ids, column.values, strict=True):
            values.setdefault(sample_id, {})[metric] = value
    return [
        Record(
            sample_id=sample.id,
            draw=0,
            prompt="\n\n".join(message.text for message in sample.messages if message.role != "system"),
            images=sample.images,
            references=() if sample.reference is None else (sample.reference,),
            replies=(reply.text,),
            finish_reasons=(reply.finish_reason,),
            answer=reply.text,
            values=values.get(sample.id, {}),
            note="",
            cluster=None,
            prompt_tokens=reply.usage.prompt_tokens if reply.usage else None,
            reply_tokens=len(reply.token_ids),
            seconds=reply.usage.seconds if reply.usage else None,
        )
        for sample, reply in zip(samples, greedy, strict=True)
    ]


def _no_server(name: str) -> str:
    return (
        f"{name} is behind a server, which tells its words alone, not its distribution. Name a local model."
    )


def _alike(opened: Opened, theirs: Opened) -> tuple[Opened, Opened, SharedVocabulary]:
    """Both models behind engines that sample only tokens which both have, and what they share."""
    from shared.generation.transformers_engine import TransformersEngine
    from shared.models.heads import logit_width
    from shared.models.teachers import fingerprint_of_model
    from shared.models.vocabulary import shared_vocabulary

    assert opened.local is not None and theirs.local is not None
    vocabulary = shared_vocabulary(
        theirs.local.adapter.vocabulary,
        opened.local.adapter.vocabulary,
        teacher_width=logit_width(theirs.local.model),
        student_width=logit_width(opened.local.model),
    )

    def again(name: str, local: Local) -> Opened:
        engine = TransformersEngine(
            local.model,
            local.adapter,
            fingerprint=fingerprint_of_model(local.model),
            width=vocabulary.width,
            excluded_ids=vocabulary.excluded_ids,
        )
        return opened_local(name, local, engine)

    return again(opened.name, opened.local), again(theirs.name, theirs.local), vocabulary


def _answers(
    opened: Opened,
    name: str,
    samples: Sequence[Sample],
    sampling: Sampling,
    folder: Path,
    batch_tokens: int,
    speaker: Speaker,
) -> list[Response]:
    from shared.generation.collect import collect_responses

    with speaker.bar(f"agreement, {name}") as bar:
        return collect_responses(
            opened.engine,
            [Request(sample, "student", 0) for sample in samples],
            sampling,
            folder=folder / "replies" / name,
            prompt_tokens=opened.prompt_tokens,
            batch_tokens=batch_tokens,
            progress=lambda p: bar(p.batches_done, p.batches_total, f"{p.tokens_per_second:.0f} tokens/s"),
        )
