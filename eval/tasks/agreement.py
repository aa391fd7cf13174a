"""How closely does a model follow its teacher's distribution, and its words?

On responses to held-out prompts, some sampled from the teacher and some from the model itself, the two
distributions are compared at every token, over the shared vocabulary. Tokens are averaged within a response;
responses count equally. Greedy responses are compared as texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

from eval.agreement_run import AgreementRunner
from eval.metrics.rouge_l import rouge_l_f1
from eval.scores import Column, Metric, Score, score
from eval.task import Question, Row, Task
from shared.errors import DataError
from shared.types import Group, Response, Sample, Sampling

if TYPE_CHECKING:
    from shared.models.teachers import Teacher

Source = Literal["teacher", "own", "greedy"]

NATS = "nats per token"
METRICS: dict[str, Metric] = {  # the two that objectives are compared by come first
    "rouge_l": Metric("ROUGE-L of greedy responses", "share", True),
    "expected_acceptance": Metric("Expected acceptance on own responses", "share", True),
    "expected_acceptance_teacher": Metric("Expected acceptance on teacher responses", "share", True),
    "top1_agreement": Metric("Top-1 agreement on teacher responses", "share", True),
    "top1_agreement_own": Metric("Top-1 agreement on own responses", "share", True),
    "kl_teacher_model": Metric("KL(teacher ‖ model) on teacher responses", NATS, False),
    "kl_model_teacher": Metric("KL(model ‖ teacher) on teacher responses", NATS, False),
    "kl_teacher_model_own": Metric("KL(teacher ‖ model) on own responses", NATS, False),
    "kl_model_teacher_own": Metric("KL(model ‖ teacher) on own responses", NATS, False),
    "perplexity": Metric("Perplexity of teacher responses", "perplexity", False, exponential=True),
}
# Where a metric's values stand: which responses, and the field of their records.
FIELDS: dict[str, tuple[Source, str]] = {
    "rouge_l": ("greedy", "rouge_l"),
    "expected_acceptance": ("own", "expected_acceptance"),
    "expected_acceptance_teacher": ("teacher", "expected_acceptance"),
    "top1_agreement": ("teacher", "top1_agreement"),
    "top1_agreement_own": ("own", "top1_agreement"),
    "kl_teacher_model": ("teacher", "kl_teacher_model"),
    "kl_model_teacher": ("teacher", "kl_model_teacher"),
    "kl_teacher_model_own": ("own", "kl_teacher_model"),
    "kl_model_teacher_own": ("own", "kl_model_teacher"),
    "perplexity": ("teacher", "nll_model"),
}


class Record(NamedTuple):
    """One response: its figures, named as in `ResponseFigures`; for a greedy one, ROUGE-L."""

    sample_id: str
    source: Source
    draw: int
    tokens: int
    figures: Mapping[str, float]

    def row(self) -> dict[str, Any]:
        """A flat JSON-able row."""
        row = self._asdict()
        return row | row.pop("figures")

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Record:
        """The record of such a row."""
        own = {name: row[name] for name in cls._fields if name != "figures"}
        return cls(**own, figures={name: value for name, value in row.items() if name not in own})


class Agreement(NamedTuple):
    """A model's records against one teacher."""

    records: tuple[Record, ...]

    def columns(self) -> dict[str, Column]:
        """Values per sample of every metric that has records."""
        columns = {}
        for name, (source, field) in FIELDS.items():
            records = [record for record in self.records if record.source == source]
            if records:
                values = tuple(record.figures[field] for record in records)
                columns[name] = Column(tuple(record.sample_id for record in records), values)
        return columns

    def scores(self) -> dict[str, Score]:
        """Means with standard errors."""
        return {name: score(METRICS[name], column) for name, column in self.columns().items()}

    def of_teacher(self) -> Agreement:
        """The teacher against itself, without another pass: its likelihoods and texts are in the records.

        Its own responses are the teacher's; each KL is 0, top-1 agreement and expected acceptance are 1.
        ROUGE-L of a text with itself is 1, but 0 where it has no token.
        """
        from eval.distributions import ResponseFigures

        records = []
        for record in self.records:
            if record.source == "teacher":
                nll = record.figures["nll_teacher"]
                figures = ResponseFigures(0.0, 0.0, 1.0, 1.0, nll, nll)._asdict()
                records += [record._replace(source=source, figures=figures) for source in ("teacher", "own")]
            elif record.source == "greedy":
                itself = record.figures["rouge_l_teacher"]
                records.append(record._replace(figures={"rouge_l": itself, "rouge_l_teacher": itself}))
        return Agreement(tuple(records))


def agreement(
    teacher: Teacher,
    model: Teacher,
    *,
    teacher_batches: Iterable[Sequence[Group]],
    own_batches: Iterable[Sequence[Group]],
    teacher_greedy: Sequence[Response] = (),
    model_greedy: Sequence[Response] = (),
    chunk_bytes: int | None = None,
) -> Agreement:
    """Compare a model with its teacher on held-out prompts.

    Args:
        teacher: gives p; its adapter encodes the groups, as the model's does for the model.
        model: gives q: anything with a dense signal, such as a student in a `LocalTeacher`.
        teacher_batches: micro-batches of groups with responses sampled from the teacher; see `micro_batches`.
        own_batches: the same with responses sampled from the model.
        teacher_greedy: the teacher's greedy responses, for ROUGE-L.
        model_greedy: the model's, to the same samples.
        chunk_bytes: what full logits and all that is computed from them may take at a time; None for 256 MiB.

    Raises:
        AlignmentError: the two signals have other rows than the responses have tokens, or other vocabularies.
        DataError: greedy responses to different samples.
    """
    records = [
        *_sampled_records(teacher, model, teacher_batches, "teacher", chunk_bytes),
        *_sampled_records(teacher, model, own_batches, "own", chunk_bytes),
        *_greedy_records(teacher_greedy, model_greedy),
    ]
    return Agreement(
        tuple(sorted(records, key=lambda record: (record.source, record.sample_id, record.draw)))
    )


def micro_batches(
    groups: Sequence[Group], prompt_tokens: Callable[[Sample], int], *, batch_tokens: int
) -> list[list[Group]]:
    """Groups of similar length together, the longest first, within a budget of padded tokens.

    A group that alone exceeds the budget is a batch of its own.
    """
    lengths = [
        prompt_tokens(group.sample) + max((len(r.token_ids) for r in group.responses), default=0)
        for group in groups
    ]
    batches: list[list[Group]] = []
    room = 0  # rows that still fit the last batch
    for index in sorted(range(len(groups)), key=lambda i: -lengths[i]):
        rows = len(groups[index].responses)
        if not batches or rows > room:
            batches.append([])
            room = max(rows, batch_tokens // max(1, lengths[index]))
        batches[-1].append(groups[index])
        room -= rows
    return batches


def _sampled_records(
    teacher: Teacher,
    model: Teacher,
    batches: Iterable[Sequence[Group]],
    source: Source,
    chunk_bytes: int | None,
) -> Iterator[Record]:
    from eval.distributions import (
        CHUNK_BYTES,
        compare_distributions,
    )  # with it comes torch, which `list` does without

    for groups in batches:
        responses = [response for group in groups for response in group.responses]
        comparisons = compare_distributions(teacher, model, groups, chunk_bytes=chunk_bytes or CHUNK_BYTES)
        for response, figures in zip(responses, comparisons, strict=True):
            tokens = len(response.token_ids)
            yield Record(response.sample_id, source, response.draw, tokens, figures._asdict())


def _greedy_records(teacher: Sequence[Response], model: Sequence[Response]) -> Iterator[Record]:
    texts = {response.sample_id: response.text for response in teacher}
    if lonely := texts.keys() ^ {response.sample_id for response in model}:
        raise DataError(
            f"greedy responses to different samples: {min(lonely)!r} has one from one model only. "
            f"Generate both models' for the same prompts."
        )
    for response in model:
        reference = texts[response.sample_id]
        figures = {
            "rouge_l": rouge_l_f1(response.text, [reference]),
            "rouge_l_teacher": rouge_l_f1(reference, [reference]),
        }
        yield Record(response.sample_id, "greedy", response.draw, len(response.token_ids), figures)


def read(row: Row) -> Question:
    """A prompt, perhaps on an image."""
    images = (row.image("image"),) if row.get("image") else ()
    return Question(row.id("id"), row.text("prompt", "instruction", "question"), images=images)


def _score(*_: object) -> NoReturn:
    raise AssertionError("the runner scores")


TASK = Task(
    name="agreement",
    version=1,
    family="instruction",
    summary="how closely a model follows a teacher's distribution: both local, agreement.teacher=MODEL",
    data=None,
    columns="prompt (or instruction, or question), perhaps id and image",
    read=read,
    metrics=METRICS,
    score=_score,
    sampling=Sampling(max_new_tokens=256, temperature=0.8, top_p=0.95),
    runner=AgreementRunner(),
)
