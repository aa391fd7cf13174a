"""How does a teacher write the prompts itself, where there is no data set?

An instruction-tuned model that is given its template up to the place of the user's text goes on with what a
user would ask (Magpie, arXiv 2406.08464). What comes is filtered: cut, too short or long, and nearly the same
as an earlier one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from shared.data.near_duplicates import NearDuplicates
from shared.data.words import words
from shared.durable import write_atomically
from shared.errors import DataError, UserError
from shared.types import Message, Sample, TaskName, TextPart

_PLACE = "0the1place2of3the4text5"


class Continuation(NamedTuple):
    """What a model wrote after a text; `finished` if it ended the turn itself."""

    text: str
    finished: bool


Continue = Callable[[str, Sequence[int]], Iterable[Continuation]]
"""(text, draws) -> one continuation for each draw, in order; a draw's number seeds its noise."""


class Written(NamedTuple):
    """The prompts, and how many continuations were left out, by reason."""

    samples: list[Sample]
    dropped: dict[str, int]

    def note(self) -> str:
        """One line for the log."""
        reasons = ", ".join(f"{count} × {reason}" for reason, count in sorted(self.dropped.items()))
        return f"{len(self.samples)} prompts written by the teacher; left out: {reasons or 'none'}"


def user_turn_start(render: Callable[[Sequence[Message]], str]) -> str:
    """The template's text before the user's own.

    Args:
        render: The template over a chat, without a generation prompt.

    Raises:
        UserError: a template that does not write the user's text as it is.
    """
    start, place, _ = render([Message("user", (TextPart(_PLACE),))]).partition(_PLACE)
    if not place:
        raise UserError(
            "the teacher's chat template does not write a user's text as it is, so the teacher cannot go on "
            "from its start. Give prompts as a file instead."
        )
    return start


def write_prompts(
    continue_: Continue,
    start: str,
    *,
    count: int,
    task: TaskName = "instruction",
    min_words: int = 3,
    max_words: int = 400,
    near_duplicate: float = 0.7,
    batch: int = 64,
    draws_per_prompt: int = 8,
) -> Written:
    """Let a model write prompts until `count` are good, or `draws_per_prompt` times as many were tried.

    The same draws give the same prompts, whatever the batch.

    Args:
        continue_: The model.
        start: Of the user's turn, by `user_turn_start`.
        count: How many are wanted.
        task: Of all of them.
        min_words: Fewer are no prompt.
        max_words: More are left out.
        near_duplicate: Jaccard index of word triples from which on a prompt counts as an earlier one.
        batch: How many are asked for at a time.
        draws_per_prompt: When to give up.

    Raises:
        DataError: too few are good.
    """
    twins, samples, dropped = NearDuplicates(near_duplicate), list[Sample](), Counter[str]()
    limit = count * draws_per_prompt
    for first in range(0, limit, batch):
        draws = range(first, min(first + batch, limit))
        for draw, continuation in zip(draws, continue_(start, draws), strict=True):
            if len(samples) == count:
                break
            text = continuation.text.strip()
            length = len(words(text))
            if not continuation.finished:
                dropped["cut by the length limit"] += 1
            elif length < min_words:
                dropped[f"under {min_words} words"] += 1
            elif length > max_words:
                dropped[f"over {max_words} words"] += 1
            elif twins.add(text) is not None:
                dropped["nearly an earlier one"] += 1
            else:
                message = Message("user", (TextPart(text),))
                samples.append(Sample(f"written:{draw}", (message,), task, source=f"teacher, draw {draw}"))
        if len(samples) == count:
            return Written(samples, dict(dropped))
    raise DataError(
        f"{Written(samples, dict(dropped)).note()}, after {limit} tries; {count} were wanted. Ask for fewer, "
        "raise the temperature, or give prompts as a file."
    )


def save_prompts(path: Path, written: Written) -> None:
    """Write the prompts as a source that `load_prompts` reads."""
    rows = ({"id": s.id, "prompt": s.messages[-1].text, "task": s.task} for s in written.samples)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
