"""What is asked: prompt sources (files, hub data sets) to samples, and the prompts that are too long."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from shared.config_data import PromptSource
from shared.data.conversations import BadRowError
from shared.data.image_references import Handling, ImageFinder
from shared.data.prompt_rows import parse_row
from shared.data.tables import Numbered, read_file, read_hub
from shared.errors import DataError
from shared.models.references import resolve_path
from shared.types import Sample

STAND_IN_WORDS = 24  # of what stands for a prompt that the teacher has yet to write
LISTED = 10  # problems or samples that one message lists


class Loaded(NamedTuple):
    """Samples of all sources in order, and what was left out on the way, for the log."""

    samples: list[Sample]
    notes: list[str]


class LengthSplit(NamedTuple):
    """Samples whose prompts fit, and those that do not with their prompts' tokens."""

    kept: list[Sample]
    dropped: list[tuple[Sample, int]]


class _Opened(NamedTuple):
    source: PromptSource
    label: str  # tells sources of the same name apart; the start of their rows' ids
    rows: Callable[[], Iterable[Numbered]]
    image_root: Path


def load_prompts(
    sources: Sequence[PromptSource],
    *,
    seed: int,
    on_bad_row: Literal["fail", "skip"] = "fail",
    images: Handling = Handling(),  # noqa: B008 - immutable
    beside: Sequence[PromptSource] = (),
) -> Loaded:
    """Read all sources, in order, each shuffled and cut as it says, and mix them by their weights.

    An id is the row's own or "FILE:ROW", so prompts with the same text stay apart. Shuffling sorts by a hash
    of seed and id: rows added to a file leave the order of the others as it was.

    Args:
        sources: At least one.
        seed: Of the shuffles.
        on_bad_row: Whether rows that cannot be used stop everything, or are left out, counted and listed.
        images: What is done with the rows' images.
        beside: Sources that are read as well, whose rows are others even where a file's name is the same.

    Raises:
        DataError: rows that cannot be used (the message names file, line and cause of the first ten, rows
            with the same cause once), ids given twice, a file of another type, or no prompts at all.
        UserError: a file that does not exist.
    """
    rows_of: dict[tuple[str, str], list[int]] = {}  # by source and cause: the rows that cannot be used
    read: list[list[Sample]] = []
    for opened in _open(sources, beside):
        samples = _read(opened, images, rows_of)
        if opened.source.shuffle:
            samples.sort(key=lambda sample: hashlib.sha256(f"{seed}\0{sample.id}".encode()).digest())
        read.append(samples[opened.source.skip :][: opened.source.limit])
    mixed, notes = mix(sources, read)
    problems = [
        f"{label}:{rows[0]}: {cause}" + (f" (and {len(rows) - 1} more such rows)" if rows[1:] else "")
        for (label, cause), rows in rows_of.items()
    ]
    head = f"{sum(map(len, rows_of.values()))} unusable row(s) in the prompt sources"
    if problems and on_bad_row == "fail":
        raise DataError(listed(head, problems) + "\nMend them, or set prompts.on_bad_row: skip.")
    repeated = list(_repeated_ids(mixed))
    if repeated:
        raise DataError(
            listed(f"{len(repeated)} id(s) given twice", repeated)
            + "\nGive each row its own, or set ids: place on the source."
        )
    if not mixed:
        labels = ", ".join(source.label for source in sources)
        beyond = " beyond what `skip` passes over" if any(source.skip for source in sources) else ""
        raise DataError(listed(f"no prompts in {labels}. Give at least one row{beyond}", problems))
    if problems:
        notes = [listed(f"skipped {head}", problems), *notes]
    return Loaded(mixed, notes)


def mix(sources: Sequence[PromptSource], read: Sequence[list[Sample]]) -> Loaded:
    """The first prompts of each source, as many as keep the shares that the weights ask for.

    The mixture is the largest without repeating a prompt. Sources without weights are taken whole.

    Raises:
        DataError: weights on some sources only, or a weighted source without prompts.
    """
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return Loaded([sample for samples in read for sample in samples], [])
    if len(weights) < len(sources):
        bare = ", ".join(source.label for source in sources if source.weight is None)
        raise DataError(
            f"{bare} has no weight, and other sources have one. Give every source a weight, or none."
        )
    empty = [source.label for source, samples in zip(sources, read, strict=True) if not samples]
    if empty:
        raise DataError(f"{', '.join(empty)} has a weight and no prompts. Remove it, or give it rows.")
    unit = min(len(samples) / weight for samples, weight in zip(read, weights, strict=True))
    taken = [samples[: max(1, round(unit * weight))] for samples, weight in zip(read, weights, strict=True)]
    shares = ", ".join(
        f"{len(part)} of {len(samples)} from {source.label}"
        for part, samples, source in zip(taken, read, sources, strict=True)
    )
    return Loaded([sample for part in taken for sample in part], [f"mixture by weight: {shares}"])


def split_by_length(
    samples: Sequence[Sample],
    prompt_tokens: Callable[[Sample], int],
    *,
    max_prompt_tokens: int,
    on_over: Literal["fail", "drop"],
) -> LengthSplit:
    """Set aside the prompts of more than `max_prompt_tokens` tokens; prompts are never truncated.

    Raises:
        DataError: a prompt is too long and `on_over` is "fail", or none fits.
    """
    split = LengthSplit([], [])
    for sample in samples:
        tokens = prompt_tokens(sample)
        if tokens > max_prompt_tokens:
            split.dropped.append((sample, tokens))
        else:
            split.kept.append(sample)
    if split.dropped and (on_over == "fail" or not split.kept):
        dropping = ", or set prompts.over_length: drop" if on_over == "fail" else ""
        raise DataError(
            listed(
                f"{len(split.dropped)} of {len(samples)} prompts are longer than the {max_prompt_tokens} "
                "tokens that the context leaves beside the response",
                [
                    f"sample {sample.id!r} ({sample.source}): {tokens} tokens"
                    for sample, tokens in split.dropped
                ],
            )
            + f"\nShorten them, lower generation.max_new_tokens{dropping}."
        )
    return split


def listed(head: str, lines: Sequence[str]) -> str:
    """A message of many lines, of which the first are shown."""
    more = [f"... and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "\n  ".join([f"{head}:" if lines else head, *lines[:LISTED], *more])


def _open(sources: Sequence[PromptSource], beside_them: Sequence[PromptSource]) -> list[_Opened]:
    opened: list[_Opened] = []
    names: list[str] = []
    others = {path.name: path for s in beside_them if s.path and (path := resolve_path(s.path)) is not None}
    for source in sources:
        root = Path(source.image_root).expanduser() if source.image_root else None
        if root is not None and not root.is_dir():
            raise DataError(f"image_root {source.image_root!r} of {source.label} is not a folder.")
        if source.written is not None:
            name = "for-training" if not beside_them else "held-out"
            beside = Path.cwd()
            rows: Callable[[], Iterable[Numbered]] = partial(_stand_ins, name, source.written.count)
        elif source.hub is not None:
            name, beside = source.hub.label, Path.cwd()
            rows = partial(read_hub, source.hub)
        else:
            path = resolve_path(source.label)
            if path is None or not path.is_file():
                raise DataError(
                    f"prompt source {source.label!r} is not a file. Give a .jsonl, .json, .csv, .tsv or "
                    ".parquet file; a data set of the hub is written {hub: {id: ..., split: ...}}."
                )
            name, beside, rows = path.name, path.parent, partial(read_file, path)
            if others.get(name, path) != path:  # train/questions.json and test/questions.json
                name = f"{path.parent.name}/{name}"
        label = name if name not in names else f"{name}#{names.count(name) + 1}"
        names.append(name)
        opened.append(_Opened(source, label, rows, root or beside))
    return opened


def _stand_ins(name: str, count: int) -> Iterator[Numbered]:
    """As different as the prompts will be: no four words in a row of one are in another."""
    for number in range(1, count + 1):
        yield Numbered(number, {"prompt": " ".join([f"{name} {number}"] * (STAND_IN_WORDS // 3))})


def _read(opened: _Opened, images: Handling, unusable: dict[tuple[str, str], list[int]]) -> list[Sample]:
    """One source's samples; rows that cannot be used are added to the others, by source and cause."""
    source, samples = opened.source, list[Sample]()
    find = ImageFinder(opened.image_root, images).reference
    for number, row in opened.rows():
        if source.limit is not None and not source.shuffle and len(samples) >= source.skip + source.limit:
            break
        try:
            samples.extend(parse_row(row, source, place=f"{opened.label}:{number}", find=find))
        except BadRowError as problem:
            unusable.setdefault((source.label, str(problem)), []).append(number)
    return samples


def _repeated_ids(samples: Sequence[Sample]) -> Iterator[str]:
    first: dict[str, Sample] = {}
    for sample in samples:
        if sample.id in first:
            yield f"{sample.source}: id {sample.id!r} is also that of {first[sample.id].source}"
        first.setdefault(sample.id, sample)
