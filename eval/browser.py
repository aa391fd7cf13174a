"""What did each model say to each question? All records side by side, with what one may filter them by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

from eval.records import Record
from eval.task import Task
from eval.thumbnails import Gallery
from shared.report.formats import axis_number
from shared.report.sections import Browser, Facet, Item, RoleName, Shown

RIGHT = 0.5  # a headline value from here on counts as right
TEXT_CHARACTERS = 60_000_000  # of all replies in one page
SHORTER = (20_000, 8_000, 3_000, 1_000, 300)  # characters of a reply, where all of them are too many

# columns: the first is the teacher, or in a run without one the start; -1 stands for each student's own
FIRST, START, STUDENT = 0, 1, -1
OUTCOMES: tuple[tuple[str, dict[int, bool]], ...] = (
    ("{first} right, {student} wrong", {FIRST: True, STUDENT: False}),
    ("{student} right, {first} wrong", {FIRST: False, STUDENT: True}),
    ("{first} and {student} right", {FIRST: True, STUDENT: True}),
    ("{first} and {student} wrong", {FIRST: False, STUDENT: False}),
    ("start wrong, {student} right", {START: False, STUDENT: True}),
    ("start right, {student} wrong", {START: True, STUDENT: False}),
)


class Seen(NamedTuple):
    """One model's records, of the tasks that it did."""

    label: str
    role: RoleName | None
    records: Mapping[str, Sequence[Record]]


class Row(NamedTuple):
    """A question with each model's record; None where a model was not asked."""

    task: Task
    asked: Record  # the first model's
    records: tuple[Record | None, ...]
    scores: tuple[float | None, ...]
    right: tuple[bool | None, ...]  # None where a score says how well, not whether


class Choice(NamedTuple):
    """An option of one of the browser's filters."""

    facet: str
    option: str
    holds: Callable[[Row], bool]


def samples_section(
    seen: Sequence[Seen],
    tasks: Mapping[str, Task],
    *,
    students: Sequence[int],
    gallery: Gallery,
    title: str = "Samples",
    note: str = "",
) -> Browser:
    """All samples of all models.

    Args:
        seen: The teacher, if there is one, the start, the students, runs without images.
        tasks: All that are compared, by name.
        students: Which of `seen` are held against the first.
        gallery: Takes the images.
        title: Of the section.
        note: What a reader must know before all else.
    """
    rows = [
        row for name, task in tasks.items() for row in _rows(task, [one.records.get(name) for one in seen])
    ]
    tags: list[list[int]] = [[] for _ in rows]
    facets: dict[str, list[str]] = {}
    for choice in _choices([one.label for one in seen], tasks, students):
        holding = [number for number, row in enumerate(rows) if choice.holds(row)]
        if holding:
            number = sum(map(len, facets.values()))
            facets.setdefault(choice.facet, []).append(choice.option)
            for place in holding:
                tags[place].append(number)
    longest = _reply_length(rows)
    images = _images(rows, gallery)
    items = tuple(
        Item(
            prompt=_prompt(row.asked),
            facts=(row.task.name, _name(row.asked), _references(row.asked)),
            texts=tuple(_shown(row, column, longest) for column in range(len(seen))),
            tags=tuple(held),
            keys=tuple(key for student in students for key in _leads(row, student)),
            images=places,
        )
        for row, held, places in zip(rows, tags, images, strict=True)
    )
    orders = []
    for student in students:
        first, other = seen[FIRST].label, seen[student].label
        orders += [f"{first} ahead of {other.lower()}", f"{other} ahead of {first.lower()}"]
    return Browser(
        title,
        tuple((one.label, one.role) for one in seen),
        items,
        facts=("Task", "Sample", "References"),
        text_facts=("Read as", "Score", "Ended by", "Tokens", "Note"),
        facets=tuple(Facet(facet, tuple(options)) for facet, options in facets.items()),
        orders=tuple(orders),
        images=tuple(gallery.urls),
        note=" ".join(filter(None, (note, _note(rows, longest), gallery.note))),
    )


def _rows(task: Task, records: Sequence[Sequence[Record] | None]) -> Iterator[Row]:
    """In the order of the first model's records."""
    by_key = [{(record.sample_id, record.draw): record for record in of_one or ()} for of_one in records]
    judged = task.family not in ("instruction", "caption")
    for key, asked in by_key[FIRST].items():
        found = tuple(of_one.get(key) for of_one in by_key)
        scores = tuple(_score(task, record) for record in found)
        right = tuple(score >= RIGHT if judged and score is not None else None for score in scores)
        yield Row(task, asked, found, scores, right)


def _score(task: Task, record: Record | None) -> float | None:
    """The task's headline for this reply alone."""
    if record is None:
        return None
    values = task.per_question([record.values]) if task.per_question else record.values
    return next((values[name] for name in task.metrics if name in values), None)


def _choices(labels: Sequence[str], tasks: Mapping[str, Task], students: Sequence[int]) -> Iterator[Choice]:
    if len(tasks) > 1:
        for name in tasks:
            yield Choice("Task", name, partial(_is_of, name))
    for student in students:
        for words, verdicts in OUTCOMES:
            if START in verdicts and student == START:
                continue  # the start is the first here, and said before
            by_column = {
                student if column == STUDENT else column: right for column, right in verdicts.items()
            }
            text = words.format(first=labels[FIRST].lower(), student=labels[student].lower())
            yield Choice("Outcome", text[0].upper() + text[1:], partial(_judged, by_column))
    for column in range(max(students) + 1, len(labels)):
        yield Choice("Outcome", f"{labels[column]} right", partial(_judged, {column: True}))
    for column, name in enumerate(labels):
        yield Choice("Reply", f"{name}: cut at the length limit", partial(_cut, column))
        yield Choice("Reply", f"{name}: no answer found", partial(_unread, column))


def _is_of(task: str, row: Row) -> bool:
    return row.task.name == task


def _judged(verdicts: Mapping[int, bool], row: Row) -> bool:
    return all(row.right[column] is right for column, right in verdicts.items())


def _cut(column: int, row: Row) -> bool:
    record = row.records[column]
    return record is not None and "length" in record.finish_reasons


def _unread(column: int, row: Row) -> bool:
    record = row.records[column]
    return record is not None and not record.answer.strip()


def _leads(row: Row, student: int) -> tuple[float | None, float | None]:
    """By how much the first model's score is higher than a student's, and the other way round."""
    first, other = row.scores[FIRST], row.scores[student]
    if first is None or other is None:
        return None, None
    lead = round(first - other, 4)
    return lead, -lead


def _prompt(record: Record) -> str:
    """The user's turns: what a model said in between stands with its replies."""
    text = record.prompt
    for reply in record.replies[:-1]:
        text = text.replace(f"\n\nAssistant:\n{reply}", "", 1)
    return text


def _name(record: Record) -> str:
    return record.sample_id if record.draw == 0 else f"{record.sample_id}, draw {record.draw + 1}"


def _references(record: Record) -> str:
    """Each answer once, the most frequent first, with how many gave it."""
    counts = Counter(record.references).most_common()
    return " · ".join(text if count == 1 else f"{text} ×{count}" for text, count in counts)


def _shown(row: Row, column: int, longest: int | None) -> Shown | None:
    record, score = row.records[column], row.scores[column]
    if record is None:
        return None
    reply = "\n\n――\n\n".join(record.replies)
    facts = (
        ""
        if record.answer == record.replies[-1].strip()
        else _shortened(record.answer, longest) or "nothing",
        "" if score is None else axis_number(score),
        ", ".join(dict.fromkeys("length limit" if r == "length" else r for r in record.finish_reasons)),
        "" if record.reply_tokens is None else f"{record.reply_tokens:,}",
        record.note,
    )
    return Shown(_shortened(reply, longest), facts, row.right[column])


def _shortened(text: str, longest: int | None) -> str:
    if longest is None or len(text) <= longest:
        return text
    return f"{text[:longest]} … ({len(text):,} characters)"


def _reply_length(rows: Sequence[Row]) -> int | None:
    """How much of a reply is shown: None, all, unless the replies together are more than a page carries."""
    records = [record for row in rows for record in row.records if record is not None]
    lengths = [len(text) for record in records for text in (*record.replies, record.answer)]
    if sum(lengths) <= TEXT_CHARACTERS:
        return None
    fitting = (n for n in SHORTER if sum(min(length, n) for length in lengths) <= TEXT_CHARACTERS)
    return next(fitting, SHORTER[-1])


def _images(rows: Sequence[Row], gallery: Gallery) -> list[tuple[int, ...]]:
    """Each row's images as places in the gallery. Tasks take turns, so that each gets some into the page."""
    by_task: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        by_task.setdefault(row.task.name, []).append(number)
    places: list[tuple[int, ...]] = [()] * len(rows)
    for turn in zip_longest(*by_task.values()):
        for number in (number for number in turn if number is not None):
            found = [gallery.place(path) for path in rows[number].asked.images]
            places[number] = tuple(place for place in found if place is not None)
    return places


def _note(rows: Sequence[Row], longest: int | None) -> str:
    parts = []
    if any(right is not None for row in rows for right in row.right):
        parts.append("Right: the task's first metric gives the reply half its points or more.")
    if longest is not None:
        parts.append(f"Replies are shown up to {longest:,} characters; the records have all of them.")
    return " ".join(parts)
