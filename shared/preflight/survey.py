"""What do the two models' tokenizers, templates and processors make of the run's prompts?"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from shared.adapter import Adapter
from shared.data.rows import check_alignment
from shared.models.vocabulary import SharedVocabulary, Vocabulary
from shared.preflight.page import Findings
from shared.training.layout import made_up_group
from shared.types import Group, ImagePart, Response, Sample

SHOWN_ROWS = 3  # at either end of the response
SHOWN_PROMPTS = 5
IMAGE_PROMPTS = 16  # whose images are counted in tokens


class Readers(NamedTuple):
    """The adapters of a run."""

    teacher: Adapter | None
    student: Adapter

    def named(self) -> Iterator[tuple[str, Adapter]]:
        """Those that there are."""
        if self.teacher is not None:
            yield "teacher", self.teacher
        yield "student", self.student


def show_alignment(
    found: Findings, readers: Readers, sample: Sample, vocabulary: SharedVocabulary | None, most_tokens: int
) -> None:
    """One prompt as each model reads it, and the rows that predict an answer, side by side.

    Args:
        found: gets the topic.
        readers: of both models.
        sample: the prompt; its reference answer, or one made of its own words, is the response.
        vocabulary: None where the two have none in common: then there are no rows.
        most_tokens: of the response.

    Raises:
        AlignmentError: rows that do not correspond.
    """
    columns = {name: adapter.describe(sample) for name, adapter in readers.named()}
    lines: list[str] = []
    if vocabulary is not None:
        group = _answered(sample, readers.student, most_tokens)
        encoded = {name: adapter.encode([group], layout="separate") for name, adapter in readers.named()}
        check_alignment([group], encoded, vocabulary)
        ids = group.responses[0].token_ids
        whose = "the reference answer" if sample.reference else "an answer made of the prompt's own words"
        lines.append(f"{len(ids)} rows predict {whose}; at position of {', '.join(encoded)}:")
        ends = range(len(ids))
        if len(ids) > 2 * SHOWN_ROWS:
            ends = [*ends[:SHOWN_ROWS], *ends[-SHOWN_ROWS:]]  # type: ignore[assignment]
        for row in ends:
            places = "  ".join(f"{int(one.rows_N[row]):>7}" for one in encoded.values())
            lines.append(f"row {row:>5}: {places}   → {readers.student.vocabulary.token(ids[row])!r}")
    found.add(f"Sample {sample.id}, as each model reads it", lines, columns)


def compare_models(
    found: Findings,
    readers: Readers,
    sample: Sample,
    vocabulary: SharedVocabulary | None,
    widths: Sequence[int],
) -> None:
    """Vocabulary, template and ends of answers.

    Args:
        found: gets the topic.
        readers: of both models.
        sample: its words are rendered by both templates, images left out.
        vocabulary: what the two share, if anything.
        widths: columns of the models' logits, in the order of `readers`.
    """
    lines = []
    for (name, adapter), width in zip(readers.named(), widths, strict=True):
        stops = ", ".join(_named(adapter.vocabulary, index) for index in adapter.vocabulary.stop_ids)
        lines.append(
            f"{name}: {adapter.vocabulary.size} tokens, logits of {width} columns; ends with {stops}; its "
            f"template writes {_named(adapter.vocabulary, _turn_end(adapter))} after an answer"
        )
    if vocabulary is not None:
        lines.append(f"shared: {vocabulary.size} tokens, {len(vocabulary.excluded_ids)} left out below them")
        found.facts["shared tokens"] = vocabulary.size
    if readers.teacher is not None:
        teacher, student = readers.teacher, readers.student
        added = sum(
            one != other
            for one, other in zip(teacher.vocabulary.tokens, student.vocabulary.tokens, strict=False)
        )
        added += abs(teacher.vocabulary.size - student.vocabulary.size)
        found.facts["differing tokens"] = added
        lines.append(f"{added} tokens differ" if added else "the tokens are the same")
        template = _template_difference(teacher, student, sample)
        found.facts["template differs"] = template is not None
        lines.append(template or "both templates write the same around the same words")
        ends = [_turn_end(adapter) for adapter in (teacher, student)]
        found.facts["turn end differs"] = ends[0] != ends[1]
        if ends[0] != ends[1]:
            lines.append(
                f"the teacher's answers end with {_named(teacher.vocabulary, ends[0])}, which the student "
                f"learns in the place of its own {_named(student.vocabulary, ends[1])}"
            )
    found.add("Vocabulary, template and ends of answers", lines)


def count_tokens(
    found: Findings,
    readers: Readers,
    samples: Sequence[Sample],
    contexts: Sequence[int | None],
    *,
    answer: int,
    fails: bool,
) -> None:
    """Lengths of the prompts, tokens of their images, and prompts that do not fit.

    Args:
        found: gets the topic, and a problem where a prompt would stop the run.
        readers: of both models.
        samples: the prompts that are looked at.
        contexts: longest sequence of each model, in the order of `readers`.
        answer: tokens that a response may take.
        fails: whether a prompt that does not fit stops the run.
    """
    lines = [f"{len(samples)} prompts were looked at"]
    pictured = [sample for sample in samples if sample.images][:IMAGE_PROMPTS]
    for (name, adapter), context in zip(readers.named(), contexts, strict=True):
        tokens = [(adapter.prompt_tokens(sample), sample) for sample in samples]
        counts = [count for count, _ in tokens]
        middle = statistics.median(counts)
        found.facts[f"{name}'s prompt tokens"] = {"mean": statistics.fmean(counts), "longest": max(counts)}
        line = f"{name}: {min(counts)} to {max(counts)} tokens, median {middle:.0f}"
        if pictured:
            per_image = _image_tokens(adapter, pictured)
            found.facts[f"{name}'s tokens per image"] = per_image
            line += f"; {per_image:.0f} tokens an image"
        lines.append(line)
        if context is None:
            continue
        over = [(count, sample) for count, sample in tokens if count + answer > context]
        found.facts[f"prompts over the {name}'s limit"] = len(over)
        if not over:
            lines.append(f"{name}: all fit its context of {context} tokens beside an answer of {answer}")
            continue
        named = ", ".join(f"{sample.id} ({count} tokens)" for count, sample in over[:SHOWN_PROMPTS])
        text = (
            f"{name}: {len(over)} prompts do not fit its context of {context} tokens beside an answer of "
            f"{answer}: {named}"
        )
        if fails or len(over) == len(samples):
            advice = "" if len(over) == len(samples) else ", or set prompts.over_length: drop"
            found.problems.append(f"{text}. Shorten them, lower generation.max_new_tokens{advice}.")
        else:
            lines.append(f"{text}; they are left out")
    found.add("Prompts", lines)


def _answered(sample: Sample, adapter: Adapter, most_tokens: int) -> Group:
    if not sample.reference:
        return made_up_group(sample, adapter, most_tokens, ("student",))
    ids = adapter.encode_text(sample.reference, stop=True)[:most_tokens]
    return Group(sample, (Response(sample.id, "reference", 0, 0, ids, sample.reference, "stop", ""),))


def _turn_end(adapter: Adapter) -> int:
    return adapter.encode_text("", stop=True)[-1]


def _named(vocabulary: Vocabulary, index: int) -> str:
    return f"{vocabulary.token(index)!r} ({index})"


def _template_difference(teacher: Adapter, student: Adapter, sample: Sample) -> str | None:
    """Where the two models' prompts part, in tokens; None where they do not."""
    messages = tuple(
        replace(message, parts=tuple(part for part in message.parts if not isinstance(part, ImagePart)))
        for message in sample.messages
    )
    words = replace(sample, messages=messages)
    first, second = (
        [adapter.vocabulary.token(int(index)) for index in adapter.encode_prompts([words])["input_ids"][0]]
        for adapter in (teacher, student)
    )
    if first == second:
        return None
    at = next(
        (i for i, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
        min(len(first), len(second)),
    )
    theirs, own = (" ".join(map(str, tokens[at : at + 6])) or "nothing" for tokens in (first, second))
    return (
        f"the templates differ: {len(first)} tokens in the teacher, {len(second)} in the student, first at "
        f"token {at}: {theirs!r} in the teacher, {own!r} in the student"
    )


def _image_tokens(adapter: Adapter, samples: Sequence[Sample]) -> float:
    """The mean over images; of several placeholders, the one that stands for the picture's own cells."""
    places: Counter[int] = Counter()
    for sample in samples:
        ids = adapter.encode_prompts([sample])["input_ids"][0].tolist()
        places.update(index for index in ids if index in adapter.vocabulary.placeholder_ids)
    most = places.most_common(1)
    return most[0][1] / sum(len(sample.images) for sample in samples) if most else 0.0
