"""Is a response good enough to train on? What is wrong with it, or nothing.

Filters drop pairs and never replace a response: what a model did not say is not put in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from shared.config_data import FilterConfig
from shared.types import Response

Fault = Literal[
    "empty", "truncated", "withheld", "short", "long", "repetitive", "refusal", "unlike the image"
]

REFUSALS = (
    *("i'm sorry, but i can", "i am sorry, but i can", "i'm sorry, i can't", "sorry, but i can't"),
    *("i cannot assist", "i can't assist", "i cannot help with", "i can't help with", "i'm unable to help"),
    *("i'm not able to help", "i cannot provide", "i can't provide", "i cannot fulfill", "i can't fulfill"),
    *("as an ai", "as a language model", "i'm just an ai", "i must decline"),
)
_OPENING = 160  # characters; a refusal comes first, and later words may only quote one
_GRAM, _LEAST, _END = 4, 16, 64  # tokens


def fault(
    response: Response,
    *,
    truncated: Literal["keep", "drop"],
    filters: FilterConfig | None,
    longest: int | None = None,
) -> Fault | None:
    """Why a response is not trained on, or None.

    One without tokens has no mean over its rows, one of more than `longest` tokens does not fit, and what a
    server's content filter cut is nobody's answer: these go always.
    """
    if response.finish_reason == "filtered":
        return "withheld"
    if not response.token_ids:
        return "empty"
    if longest is not None and len(response.token_ids) > longest:
        return "long"
    if truncated == "drop" and response.finish_reason == "length":
        return "truncated"
    if filters is None or response.role not in filters.roles:
        return None
    tokens = len(response.token_ids)
    if not response.text.strip():
        return "empty"
    if tokens < filters.min_tokens:
        return "short"
    if filters.max_tokens is not None and tokens > filters.max_tokens:
        return "long"
    if filters.max_repetition is not None and repetition(response.token_ids) > filters.max_repetition:
        return "repetitive"
    phrases = REFUSALS if filters.refusals is True else filters.refusals or ()
    return "refusal" if is_refusal(response.text, phrases) else None


def repetition(token_ids: Sequence[int]) -> float:
    """The share of 4-grams that were there before, [0, 1); of the last 64 tokens where that is more.

    A model caught in a loop stays in it, so its end tells. Under 16 tokens it is 0.
    """
    return max(_repeated(token_ids), _repeated(token_ids[-_END:]))


def is_refusal(text: str, phrases: Sequence[str] = REFUSALS) -> bool:
    """Whether one of the phrases is in the first words, whatever their case and apostrophes."""
    opening = text[:_OPENING].replace("’", "'").casefold()
    return any(phrase.casefold() in opening for phrase in phrases)


def _repeated(token_ids: Sequence[int]) -> float:
    if len(token_ids) < _LEAST:
        return 0.0
    grams = [tuple(token_ids[i : i + _GRAM]) for i in range(len(token_ids) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams)
