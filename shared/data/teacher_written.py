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

from shared.config_data import PromptSource
from shared.data.near_duplicates import NearDuplicates
from shared.data.words import words
from shared.durable import write_atomically
from shared.errors import DataError, UserError
from shared.types import Message, Response, TextPart

_PLACE = "0the1place2of3the4text5"
DRAWS_PER_PROMPT = 8  # when to give up

Continue = Callable[[Sequence[int]], Iterable[Response]]
"""What a teacher writes after the start of the user's turn, one response for each numbered draw, in order."""


class UserTurn(NamedTuple):
    """What a template writes around the user's text, special tokens included."""

    before: str
    after: str


class Written(NamedTuple):
    """The prompts by the number of their draw, and how many draws were left out, by reason."""

    prompts: dict[int, str]
    dropped: dict[str, int]

    def note(self) -> str:
        """One line for the log."""
        reasons = ", ".join(f"{count} × {reason}" for reason, count in sorted(self.dropped.items()))
        return f"{len(self.prompts)} prompts written by the teacher; left out: {reasons or 'none'}"


def user_turn(render: Callable[[Message], str]) -> UserTurn:
    """The template's text around the user's own.

    Args:
        render: The template over a chat that ends with a user's turn.

    Raises:
        UserError: a template that does not write the user's text as it is.
    """
    before, place, after = render(Message("user", (TextPart(_PLACE),))).partition(_PLACE)
    if not before or not place:
        raise UserError(
            "the teacher's chat template has no user turn that begins with something of its own and then has "
            "the user's text as it is, so the teacher cannot go on from its start. Give prompts as a file "
            "instead."
        )
    return UserTurn(before, after)


def write_prompts(
    continue_: Continue, source: PromptSource, *, earlier: Iterable[str] = (), least: int = 16
) -> Written:
    """Let a model write prompts until enough are good, or `DRAWS_PER_PROMPT` times as many were tried.

    The same draws give the same prompts, however many are asked for together.

    Args:
        continue_: The model.
        source: What is wanted, as `written`.
        earlier: Prompts that must not come again.
        least: How many are asked for together, unless more are missing.

    Raises:
        DataError: too few are good.
    """
    wanted = source.written
    assert wanted is not None
    twins, written = NearDuplicates(wanted.near_duplicate), Written({}, Counter())
    for text in earlier:
        twins.add(text)
    limit, asked = wanted.count * DRAWS_PER_PROMPT, 0
    while asked < limit and len(written.prompts) < wanted.count:
        draws = range(asked, min(asked + max(least, wanted.count - len(written.prompts)), limit))
        asked = draws.stop
        for draw, response in zip(draws, continue_(draws), strict=True):
            if len(written.prompts) == wanted.count:
                break
            text = response.text.strip()
            length = len(words(text))
            if response.finish_reason != "stop":
                written.dropped["cut by the length limit"] += 1
            elif length < wanted.min_words:
                written.dropped[f"under {wanted.min_words} words"] += 1
            elif length > wanted.max_words:
                written.dropped[f"over {wanted.max_words} words"] += 1
            elif twins.add(text) is not None:
                written.dropped["nearly an earlier one"] += 1
            else:
                written.prompts[draw] = text
    if len(written.prompts) < wanted.count:
        raise DataError(
            f"{written.note()}, after {limit} tries; {wanted.count} were wanted. Ask for fewer, raise "
            "written.temperature or written.max_new_tokens, or give prompts as a file."
        )
    return written


def save_prompts(path: Path, written: Written, *, name: str) -> None:
    """Write the prompts as a source that `load_prompts` reads."""
    rows = ({"id": f"{name}:{draw}", "prompt": text} for draw, text in written.prompts.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
