"""What did a judge say, what did it cost, and which of its figures are to be doubted?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

from eval.judge_prompts import HIGHEST, LOWEST, Item, Verdict
from eval.metrics.win_rate import compute as win_rate
from eval.statistics import estimate

FIRST_WINS: Mapping[Verdict, float] = {"A": 1.0, "tie": 0.5, "B": 0.0}
LARGE_SHARE = 0.25  # of pairs decided by position alone: half of what a judge that tosses coins shows
UNREAD_SHARE = 0.05
MIDDLE_RATING = (LOWEST + HIGHEST) / 2

V = TypeVar("V")
N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Cost:
    """Tokens are None where the judge's engine does not count them. `replies` includes retries."""

    replies: int
    prompt_tokens: int | None
    reply_tokens: int | None
    seconds: float | None


class Opinion(NamedTuple, Generic[V]):
    """What the judge said once. `verdict` is None where no reply could be read; `reply` is the last one."""

    verdict: V | None
    reply: str
    cost: Cost


class PairOpinion(NamedTuple):
    """Both orders of one pair. Preferences: 1 is the answer, 0 the baseline; an unread verdict is a tie."""

    sample_id: str
    answer_first: Opinion[Verdict]
    answer_second: Opinion[Verdict]
    cost: Cost

    @property
    def preference(self) -> float:
        """The mean of both orders."""
        return self._mean(unread=0.5)

    @property
    def bounds(self) -> tuple[float, float]:
        """The preference if the verdicts that could not be read had all been losses, or wins."""
        return self._mean(unread=0.0), self._mean(unread=1.0)

    @property
    def follows_position(self) -> Literal["first", "second"] | None:
        """Whether the same place won in both orders, whoever stood there."""
        verdicts = (self.answer_first.verdict, self.answer_second.verdict)
        return "first" if verdicts == ("A", "A") else "second" if verdicts == ("B", "B") else None

    @property
    def disagrees(self) -> bool | None:
        """Whether the orders gave different preferences; None where one of them could not be read."""
        first, second = self._preferences()
        return None if first is None or second is None else first != second

    def _preferences(self) -> tuple[float | None, float | None]:
        first, second = self.answer_first.verdict, self.answer_second.verdict
        return (
            None if first is None else FIRST_WINS[first],
            None if second is None else 1.0 - FIRST_WINS[second],
        )

    def _mean(self, *, unread: float) -> float:
        return sum(unread if p is None else p for p in self._preferences()) / 2


class RatingOpinion(NamedTuple):
    """One grade. An unread one counts as the middle of the scale."""

    sample_id: str
    opinion: Opinion[int]

    @property
    def rating(self) -> float:
        """From 1 to 10."""
        return MIDDLE_RATING if self.opinion.verdict is None else float(self.opinion.verdict)

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and highest rating where none could be read."""
        return (LOWEST, HIGHEST) if self.opinion.verdict is None else (self.rating, self.rating)


@dataclass(frozen=True)
class Places:
    """The effect of the order, over the pairs of which both verdicts could be read."""

    both_read: int
    disagreements: int  # the orders gave different preferences
    first_wins: int  # whoever stood first won, in both orders
    second_wins: int


@dataclass(frozen=True)
class Summary:
    """A judge's figures; `dataclasses.asdict` makes JSON of them.

    `low` and `high` are the score if every unread verdict had been the worst, or the best. `middle` is where
    an unread one counts.
    """

    metric: str
    score: float
    stderr: float | None
    n: int
    low: float
    high: float
    middle: float
    verdicts: int
    unread: int
    retried: int
    cost: Cost
    places: Places | None = None
    length_controlled: float | None = None
    length_controlled_stderr: float | None = None


def summarise_pairs(
    items: Sequence[Item], opinions: Sequence[PairOpinion], *, clusters: Sequence[str] | None = None
) -> Summary:
    """The win rate, plain and length-controlled, with what speaks against it.

    `clusters` says which items belong together, as the turns of one reply do: the standard error counts them
    once (that of the length-controlled rate does not).
    """
    rate = win_rate(
        [opinion.preference for opinion in opinions],
        model_lengths=[len(item.answer) for item in items],
        baseline_lengths=[len(item.baseline or "") for item in items],
    )
    followed = [opinion.follows_position for opinion in opinions]
    disagreements = [opinion.disagrees for opinion in opinions if opinion.disagrees is not None]
    return _summary(
        "win_rate",
        [opinion.preference for opinion in opinions],
        [opinion.bounds for opinion in opinions],
        [verdict for opinion in opinions for verdict in (opinion.answer_first, opinion.answer_second)],
        middle=0.5,
        clusters=clusters,
        places=Places(
            len(disagreements), sum(disagreements), followed.count("first"), followed.count("second")
        ),
        length_controlled=rate["length_controlled_win_rate"],
        length_controlled_stderr=rate["length_controlled_stderr"],
    )


def summarise_ratings(opinions: Sequence[RatingOpinion], *, clusters: Sequence[str] | None = None) -> Summary:
    """The mean grade; `clusters` as for pairs."""
    return _summary(
        "rating",
        [opinion.rating for opinion in opinions],
        [opinion.bounds for opinion in opinions],
        [opinion.opinion for opinion in opinions],
        middle=MIDDLE_RATING,
        clusters=clusters,
    )


def doubts(summary: Summary, controls: Mapping[str, Summary]) -> list[str]:
    """What to know before believing the figures, one sentence each.

    `controls` are summaries by the names that `eval.judge.controls` gives.
    """
    said = []
    if summary.unread > UNREAD_SHARE * summary.verdicts:
        said.append(
            f"{summary.unread} of {summary.verdicts} verdicts could not be read: the score lies between "
            f"{summary.low:.3g} and {summary.high:.3g}."
        )
    places = summary.places
    if places and places.first_wins + places.second_wins > LARGE_SHARE * places.both_read:
        said.append(
            f"of {places.both_read} pairs, whichever stood first won in both orders in {places.first_wins}, "
            f"and whichever stood second in {places.second_wins}."
        )
    constant, reference = controls.get("constant"), controls.get("reference")
    if constant and constant.score + 2 * (constant.stderr or 0.0) >= constant.middle:
        said.append(
            f"the same empty words for every request score {constant.score:.3g}, not clearly below the "
            f"middle ({constant.middle:g})."
        )
    if constant and reference:
        margin = 2 * math.hypot(constant.stderr or 0.0, reference.stderr or 0.0)
        if reference.score - constant.score <= margin:
            said.append(
                f"the references ({reference.score:.3g}) score not clearly above empty words "
                f"({constant.score:.3g})."
            )
    return said


def total_cost(costs: Iterable[Cost]) -> Cost:
    """The sum; None where a part of it is not known."""
    parts = list(costs)
    return Cost(
        sum(cost.replies for cost in parts),
        _sum(cost.prompt_tokens for cost in parts),
        _sum(cost.reply_tokens for cost in parts),
        _sum(cost.seconds for cost in parts),
    )


def _summary(
    metric: str,
    values: Sequence[float],
    bounds: Sequence[tuple[float, float]],
    opinions: Sequence[Opinion[V]],
    *,
    middle: float,
    clusters: Sequence[str] | None,
    places: Places | None = None,
    length_controlled: float | None = None,
    length_controlled_stderr: float | None = None,
) -> Summary:
    mean = estimate(values, clusters)
    return Summary(
        metric=metric,
        score=mean.value,
        stderr=mean.stderr,
        n=mean.n,
        low=estimate([low for low, _ in bounds]).value,
        high=estimate([high for _, high in bounds]).value,
        middle=middle,
        verdicts=len(opinions),
        unread=sum(opinion.verdict is None for opinion in opinions),
        retried=sum(opinion.cost.replies > 1 for opinion in opinions),
        cost=total_cost(opinion.cost for opinion in opinions),
        places=places,
        length_controlled=length_controlled,
        length_controlled_stderr=length_controlled_stderr,
    )


def _sum(values: Iterable[N | None]) -> N | None:
    known: list[N] = []
    for value in values:
        if value is None:
            return None
        known.append(value)
    return sum(known)
