"""What does each row of a response count beside the others: by its segment, its task?

All weights are detached, multiply the rows of a response before its mean, and have a mean of 1: over a
response's rows for segments, over the responses for tasks. None depends on how a batch is split: a
segment's weight is a function of its own response, a task's of earlier steps.

Shapes in names: N rows, S segments, R responses, K tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from shared.errors import StoreError
from shared.objectives.objective import SIDES

Level = Literal["token", "segment", "response"]


class Segments(NamedTuple):
    """The segments of some whole responses, numbered through."""

    segment_N: Tensor  # 0 .. S-1, non-decreasing
    response_S: Tensor  # which response each segment belongs to

    @classmethod
    def of(cls, response_N: Tensor, part_N: Tensor) -> Segments:
        """Out of each row's response (0 .. R-1, non-decreasing) and its part there (0, 1, ...)."""
        changed_N = (response_N.diff() != 0) | (part_N.diff() != 0)
        segment_N = torch.cat([response_N.new_zeros(min(1, len(response_N))), changed_N.cumsum(0)])
        first_S = torch.cat([changed_N.new_ones(min(1, len(response_N))), changed_N]).nonzero().flatten()
        return cls(segment_N, response_N[first_S])


def segment_weights(
    segments: Segments, *, level: Level, gap_S: Tensor | None = None, tau: float = math.inf
) -> Tensor:
    """weights_N that turn the mean over rows into a mean over segments of their means.

    Args:
        segments: from `Segments.of`.
        level: "token" leaves the mean over rows; "segment" counts every segment alike; "response" by
            softmax(gap / tau) over the segments of a response.
        gap_S: from `segment_gaps`; needed at level "response".
        tau: a temperature in units of probability, above 0; infinity makes "response" the same as "segment".
    """
    segment_N, response_S = segments
    dtype = gap_S.dtype if gap_S is not None else torch.get_default_dtype()
    if level == "token":
        return torch.ones(len(segment_N), dtype=dtype, device=segment_N.device)
    responses = int(response_S[-1]) + 1 if len(response_S) else 0
    rows_S = torch.bincount(segment_N, minlength=len(response_S)).to(dtype)
    rows_R = rows_S.new_zeros(responses).index_add(0, response_S, rows_S)
    score_S = torch.zeros_like(rows_S)
    if level == "response":
        assert gap_S is not None and tau > 0, (gap_S, tau)
        score_S = gap_S.detach() / tau
        highest_R = score_S.new_full((responses,), -math.inf)
        highest_R = highest_R.scatter_reduce(0, response_S, score_S, "amax")
        score_S = score_S - highest_R[response_S]
    mass_S = score_S.exp()
    mass_R = mass_S.new_zeros(responses).index_add(0, response_S, mass_S)
    return (mass_S / mass_R[response_S] * rows_R[response_S] / rows_S)[segment_N]


def segment_gaps(segments: Segments, log_p_N: Tensor, log_q_N: Tensor, *, side_R: Tensor) -> Tensor:
    """gap_S: as `plan.response_gaps`, the mean taken over a segment instead of a response."""
    segment_N, response_S = segments
    rows_S = torch.bincount(segment_N, minlength=len(response_S)).to(log_q_N.dtype)
    mean_p_S, mean_q_S = (
        (log_N.new_zeros(len(response_S)).index_add(0, segment_N, log_N.detach()) / rows_S).exp()
        for log_N in (log_p_N, log_q_N)
    )
    sign_S = torch.where(side_R[response_S] == SIDES.index("student"), -1, 1)
    return sign_S * (mean_p_S - mean_q_S)


@dataclass(frozen=True)
class RowWeights:
    """A `plan.RowWeigher` for one micro-batch: hierarchical weights times given ones.

    Attributes:
        response_N: 0 .. R-1, as `ResponseRows` has it.
        side_R: indices into SIDES.
        part_N: each row's segment within its response.
        level: see `segment_weights`.
        tau: likewise.
        inner_N: given weights of rows that are multiplied in before the mean of 1 is restored; None for 1.
    """

    response_N: Tensor
    side_R: Tensor
    part_N: Tensor
    level: Level = "token"
    tau: float = math.inf
    inner_N: Tensor | None = None

    def __call__(self, start: int, stop: int, log_p_N: Tensor | None, log_q_N: Tensor) -> Tensor:
        """weights_N of rows start:stop, which are whole responses, from their log-probabilities."""
        response_N = self.response_N[start:stop]
        first = int(response_N[0]) if len(response_N) else 0
        segments = Segments.of(response_N - first, self.part_N[start:stop])
        gap_S = None
        if self.level == "response":
            assert log_p_N is not None, "weights by gap need a teacher"
            gap_S = segment_gaps(segments, log_p_N, log_q_N, side_R=self.side_R[first:])
        weights_N = segment_weights(segments, level=self.level, gap_S=gap_S, tau=self.tau).to(log_q_N)
        if self.inner_N is None:
            return weights_N
        weights_N = weights_N * self.inner_N[start:stop].to(log_q_N)
        rows_R = torch.bincount(response_N - first).to(log_q_N)
        sums_R = torch.zeros_like(rows_R).index_add(0, response_N - first, weights_N)
        return weights_N * (rows_R / sums_R)[response_N - first]


def task_weights(
    gap_K: Sequence[float | None],
    *,
    gamma: float,
    epsilon: float = 0.01,
    shares_K: Sequence[float] | None = None,
    low: float = 0.25,
    high: float = 4.0,
) -> list[float]:
    """w_k ∝ (relu(gap_k) + ε)^γ, clipped to [low, high], then to a mean of 1.

    Args:
        gap_K: an average of each task's gaps, in probability; None where it was not measured yet, which
            counts as the mean of the others.
        gamma: 0 switches it off; above 0 harder tasks count more.
        epsilon: keeps a task that is learned from vanishing; above 0, in probability.
        shares_K: of the tasks among the responses, for a mean over these; default: a mean over the tasks.
        low: the lower clip, before the last step.
        high: the upper one.
    """
    assert epsilon > 0 and gamma >= 0, (epsilon, gamma)
    shares = [1.0] * len(gap_K) if shares_K is None else list(shares_K)
    raw = [None if gap is None else (max(gap, 0.0) + epsilon) ** gamma for gap in gap_K]
    known = _mean([(w, share) for w, share in zip(raw, shares, strict=True) if w is not None])
    clipped = [1.0 if w is None else min(max(w / known, low), high) for w in raw]
    mean = _mean(list(zip(clipped, shares, strict=True)))
    return [w / mean for w in clipped]


class TaskGaps:
    """The moving average of each task's gap, over optimiser steps and all processes; part of a checkpoint."""

    def __init__(self, tasks: Sequence[str], *, momentum: float = 0.9) -> None:
        """`momentum` is what a step leaves of the average before it, [0, 1)."""
        self.tasks = tuple(tasks)
        self._momentum = momentum
        self.gap_K: list[float | None] = [None] * len(self.tasks)

    def observe(self, gap_sum_K: Sequence[float], count_K: Sequence[float]) -> None:
        """Take in one step: sums of gaps and numbers of responses by task, over all processes."""
        for task, (gap_sum, count) in enumerate(zip(gap_sum_K, count_K, strict=True)):
            if count > 0:
                before, now = self.gap_K[task], gap_sum / count
                kept = self._momentum
                self.gap_K[task] = now if before is None else kept * before + (1 - kept) * now

    def state_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"tasks": list(self.tasks), "gap": list(self.gap_K)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            StoreError: it was written for other tasks.
        """
        if list(state["tasks"]) != list(self.tasks):
            raise StoreError(
                f"the checkpoint's task weights are of {list(state['tasks'])}, this run's of "
                f"{list(self.tasks)}. Continue with the tasks it was written for, or start a new run."
            )
        self.gap_K = list(state["gap"])


def _mean(weighted: Sequence[tuple[float, float]]) -> float:
    """Of values with their shares; 1 for none."""
    total = sum(share for _, share in weighted)
    return sum(value * share for value, share in weighted) / total if total > 0 else 1.0
