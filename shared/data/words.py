"""What are the words of a text, for comparing texts? In lower case, no punctuation; CJK characters singly."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")


def words(text: str) -> list[str]:
    """The words of a text."""
    return _WORD.findall(text.casefold())


def ngrams(of: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Every n words that follow each other; all of them as one where there are fewer."""
    return [tuple(of[i : i + n]) for i in range(max(1, len(of) - n + 1))] if of else []
