"""Which training prompts are also in the evaluation: found by n-grams of words, left out, and named.

A prompt goes if it shares an n-gram with any text of an evaluation row (n = 13 as in GPT-3, arXiv 2005.14165,
appendix C), or if a shorter text is there word for word. Prompts with images are not compared: the same
question about another picture is another question.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from shared.data.tables import read_file
from shared.data.words import ngrams, words
from shared.errors import DataError
from shared.models.references import resolve_path
from shared.types import Sample

SHORTEST = 4  # words; "yes" and "thank you" are in every data set
LISTED = 5


class Text(NamedTuple):
    """A text of the evaluation, and the file and row that it stands in."""

    text: str
    file: str
    row: str


class Removed(NamedTuple):
    """A prompt that is in the evaluation, where, and by which words."""

    sample: Sample
    file: str
    row: str
    words: str


class Decontaminated(NamedTuple):
    """Prompts that are not in the evaluation, and those that are."""

    kept: list[Sample]
    removed: list[Removed]
    unseen: int  # with images, so not compared

    def notes(self) -> list[str]:
        """What went, for the log: counts by file, the first with their words."""
        counts = Counter(item.file for item in self.removed)
        by_file = ", ".join(f"{count} are in {file}" for file, count in sorted(counts.items()))
        total = len(self.kept) + len(self.removed)
        lines = [
            f"decontamination: {len(self.removed)} of {total} prompts left out{by_file and ': '}{by_file}"
        ]
        lines += [f"  {item.sample.id} ({item.row}): {item.words!r}" for item in self.removed[:LISTED]]
        if self.unseen:
            lines.append(f"  {self.unseen} prompts with images were not compared")
        return lines


def decontaminate(samples: Sequence[Sample], against: Iterable[Text], *, n: int = 13) -> Decontaminated:
    """Leave out the samples whose user turns or reference share n words in a row with the evaluation.

    Raises:
        DataError: nothing is left.
    """
    where: dict[tuple[str, ...], Text] = {}
    for text in against:
        for gram in _grams(text.text, n):
            where.setdefault(gram, text)
    found = Decontaminated([], [], sum(bool(sample.images) for sample in samples))
    for sample in samples:
        hit = None if sample.images else next((g for g in _sample_grams(sample, n) if g in where), None)
        if hit is None:
            found.kept.append(sample)
        else:
            found.removed.append(Removed(sample, where[hit].file, where[hit].row, " ".join(hit)))
    if samples and not found.kept:
        raise DataError("\n".join([*found.notes(), "No prompt is left to train on. Give others."]))
    return found


def evaluation_texts(names: Sequence[str]) -> Iterator[Text]:
    """All texts of evaluation files: every value of every row.

    Raises:
        DataError: not a file, or one that cannot be read.
    """
    for name in names:
        path = resolve_path(name)
        if path is None or not path.is_file():
            raise DataError(f"evaluation file {name!r} is not a file. Give one as prompt sources take it.")
        yield from _texts_of(path)


def prompt_texts(samples: Iterable[Sample], name: str) -> Iterator[Text]:
    """Prompts and references as texts of the evaluation, for those that are held out."""
    for sample in samples:
        if not sample.images:
            for text in _asked_and_answered(sample):
                yield Text(text, name, sample.source)


def _texts_of(path: Path) -> Iterator[Text]:
    for number, row in read_file(path):
        if isinstance(row, bytes):
            try:
                row = json.loads(row)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON: {error}") from None
        for text in _strings(row):
            yield Text(text, path.name, f"{path.name}:{number}")


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _sample_grams(sample: Sample, n: int) -> Iterator[tuple[str, ...]]:
    for text in _asked_and_answered(sample):
        yield from _grams(text, n)


def _asked_and_answered(sample: Sample) -> Iterator[str]:
    yield from (message.text for message in sample.messages if message.role != "system")
    if sample.reference:
        yield sample.reference


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    found = words(text)
    return ngrams(found, n) if len(found) >= min(n, SHORTEST) else []
