"""What parts does a response have: sentences, lines of code, steps of a solution, or the whole answer?

A segmenter says where in a text each part but the first begins. A token belongs to the part in which it
begins, so one that straddles two is in the earlier, and the turn's end, which has no text, is in the last.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType

from shared.errors import UserError, unknown_name
from shared.types import TaskName

Segmenter = Callable[[str], list[int]]
Decode = Callable[[Sequence[int]], str]

_CLOSERS = r"[\"'”’»)\]*_`]*"
_SENTENCE_END = re.compile(rf"[.!?…]+{_CLOSERS}(?=\s+[^\sa-z])|[。！？]+{_CLOSERS}|\n+")
_NO_END = re.compile(
    r"(?:\b(?:mr|mrs|ms|dr|prof|st|vs|fig|eq|no|e\.g|i\.e|etc|cf|approx)|\b(?-i:[A-Z])|(?:^|\n)[ \t]*\d+)\.$",
    re.IGNORECASE,
)
_LINE_END = re.compile(r"\n")
_DISPLAYED = re.compile(r"\\\[.*?\\\]|\$\$.*?\$\$|\\begin\{(\w+\*?)\}.*?\\end\{\1\}", re.DOTALL)
_WINDOW = 6  # tokens that are decoded to know how much text the next one adds


def sentences(text: str) -> list[int]:
    """Begins of sentences; the break of a line ends one too."""
    return _starts(text, [m.end() for m in _SENTENCE_END.finditer(text) if not _abbreviates(text, m)])


def lines(text: str) -> list[int]:
    """Begins of lines; empty ones belong to the line before."""
    return _starts(text, [match.end() for match in _LINE_END.finditer(text)])


def steps(text: str) -> list[int]:
    """Begins of a solution's steps: sentences and lines, with displayed formulas in one piece."""
    shown = [match.span() for match in _DISPLAYED.finditer(text)]
    return [start for start in sentences(text) if not any(a < start < b for a, b in shown)]


def whole(text: str) -> list[int]:
    """One part."""
    del text
    return []


SEGMENTERS: Mapping[str, Segmenter] = MappingProxyType(
    {"sentences": sentences, "lines": lines, "steps": steps, "whole": whole}
)
BY_TASK: Mapping[TaskName, str] = MappingProxyType(
    {"instruction": "sentences", "code": "lines", "math": "steps", "vqa": "whole", "caption": "sentences"}
)


def segment_ids(token_ids: Sequence[int], decode: Decode, segmenter: str) -> list[int]:
    """The part that each token belongs to: 0, 1, ... without gaps, non-decreasing.

    Args:
        token_ids: Of one response.
        decode: Their text, special tokens left out.
        segmenter: A name of `SEGMENTERS`.

    Raises:
        UserError: an unknown segmenter.
    """
    if segmenter not in SEGMENTERS:
        raise UserError(unknown_name("segmenter", segmenter, SEGMENTERS))
    if not token_ids:
        return []
    starts = SEGMENTERS[segmenter](decode(token_ids))
    begins = [0, *token_ends(token_ids, decode)[:-1]] if starts else [0] * len(token_ids)
    parts = [bisect_right(starts, begin) for begin in begins]
    order = {
        part: number for number, part in enumerate(sorted(set(parts)))
    }  # a part may hold no token's begin
    return [order[part] for part in parts]


def token_ends(token_ids: Sequence[int], decode: Decode) -> list[int]:
    """Where in the decoded text each token ends, non-decreasing; parts of a character do not pass its end.

    Only a few tokens before each are decoded with it; where that does not add up to the text, all are.
    """
    total = len(decode(token_ids))
    grown = []
    for end in range(1, len(token_ids) + 1):
        first = max(0, end - _WINDOW)
        grown.append(len(decode(token_ids[first:end])) - len(decode(token_ids[first : end - 1])))
    ends = list(accumulate(grown))
    if ends[-1] != total:
        ends = [len(decode(token_ids[:end])) for end in range(1, len(token_ids) + 1)]
    return list(accumulate(reversed(ends), min))[::-1]


def _starts(text: str, ends: Sequence[int]) -> list[int]:
    """Begins of parts after these ends: white space alone is no part, and belongs to the one before."""
    starts: list[int] = []
    after = 0
    for end in [*ends, len(text)]:
        if text[after:end].strip() and after and text[:after].strip():
            starts.append(after)
            after = end
        elif text[:end].strip():
            after = end
    return starts


def _abbreviates(text: str, match: re.Match[str]) -> bool:
    """Whether a period is that of an abbreviation, an initial or a list's number."""
    return match[0] == "." and _NO_END.search(text, max(0, match.end() - 12), match.end()) is not None
