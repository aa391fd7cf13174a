"""What does each row of a micro-batch count, and by which divergence? The objective, as numbers per row.

This is the seam between objectives and backends: `plan_rows` is a pure function of the rows' log p(y) and
log q(y), and a backend that can evaluate a `RowPlan` serves every objective, pairwise ones included.

Shapes in names: N rows, R responses, S sides (`SIDES`), P pairs.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import UserError
from shared.objectives.chunks import slices
from shared.objectives.objective import SIDES, Objective, Term

Normalization = Literal["response", "token"]
Alphas = Callable[[Tensor, Tensor], Tensor]
"""(gap_R, cell_R) -> alpha_R, as `AlphaCurriculum.alphas`."""

RowWeigher = Callable[[int, int, Tensor | None, Tensor], Tensor]
"""(start, stop, log_p_C, log_q_C) -> weight_C of rows start:stop, which are whole responses.

For weights that depend on a response itself, such as on the gaps of its segments.
"""


class RowKind(enum.IntEnum):
    """What is computed at a row; the numbers are `RowPlan.kind_N`."""

    NLL = 0
    KL = 1
    REVERSE_KL = 2
    SKEW_KL = 3
    SKEW_REVERSE_KL = 4
    SKEW_REVERSE_KL_DETACHED = 5  # the mixture without gradient
    JSD = 6
    TVD = 7


class ResponseRows(NamedTuple):
    """The rows of a micro-batch, and the responses that they belong to.

    A response is never split between micro-batches; nor is a pair, under a pairwise objective.
    """

    targets_N: Tensor  # the token that each row predicts, an id of the shared vocabulary
    response_N: Tensor  # 0 .. R-1, non-decreasing
    side_R: Tensor  # index into SIDES
    pair_R: Tensor  # any integers, equal for the two responses of a pair
    cell_R: Tensor  # side and task, as `AlphaCurriculum` numbers them

    @property
    def responses(self) -> int:
        """R."""
        return self.side_R.shape[0]

    def between(self, start: int, stop: int, response_of: Sequence[int]) -> ResponseRows:
        """Rows start:stop, which must be whole responses, renumbered from 0.

        Args:
            start: a row.
            stop: one past the last.
            response_of: `response_N.tolist()`, which is asked for once because a GPU must be waited for.
        """
        if (start, stop) == (0, len(self.targets_N)):
            return self
        first, last = response_of[start], response_of[stop - 1] + 1
        return ResponseRows(
            self.targets_N[start:stop],
            self.response_N[start:stop] - first,
            self.side_R[first:last],
            self.pair_R[first:last],
            self.cell_R[first:last],
        )


def starts_of(owner_of: Sequence[int]) -> list[int]:
    """The first row of each response, or pair; only the first of all where they are interleaved."""
    starts = [row for row, owner in enumerate(owner_of) if row == 0 or owner != owner_of[row - 1]]
    return starts if len(starts) == len(set(owner_of)) else [0]


class GlobalCounts(NamedTuple):
    """What the sums are divided by: counts of the global batch, over all micro-batches and processes."""

    pairs: float
    rows_S: tuple[float, float, float]  # rows by side, in the order of SIDES


class RowPlan(NamedTuple):
    """The loss as Σ weight · nats over the rows; nothing here carries a gradient."""

    kind_N: Tensor  # RowKind
    parameter_N: Tensor  # α of the skewed kinds, ω of JSD, else 0
    weight_N: Tensor


_WITHOUT_SKEW = {
    RowKind.SKEW_KL: RowKind.KL,
    RowKind.SKEW_REVERSE_KL: RowKind.REVERSE_KL,
    RowKind.SKEW_REVERSE_KL_DETACHED: RowKind.REVERSE_KL,
}


def kinds_without_idle_skew(plan: RowPlan) -> list[RowKind]:
    """Of each row; a skewed kind with α = 0 is the one without skew."""
    return [
        _WITHOUT_SKEW.get(RowKind(kind), RowKind(kind)) if parameter == 0 else RowKind(kind)
        for kind, parameter in zip(plan.kind_N.tolist(), plan.parameter_N.tolist(), strict=True)
    ]


def runs_of_a_kind(plan: RowPlan, most_rows: int) -> Iterator[tuple[RowKind, int, int]]:
    """Slices start:stop of at most so many rows, all of one of `kinds_without_idle_skew`."""
    start = 0
    for kind, run in groupby(kinds_without_idle_skew(plan)):
        stop = start + len(list(run))
        for first, last in slices(start, stop, most_rows):
            yield kind, first, last
        start = stop


class ResponseReport(NamedTuple):
    """What the log-probabilities of whole responses say of them."""

    gap_R: Tensor | None  # probability, [-1, 1]; None without a teacher
    alpha_R: Tensor | None  # None where the objective has no α curriculum
    value: Tensor | None  # the loss, where its value is not Σ weight · nats (only its gradient is)


def report_responses(
    objective: Objective,
    rows: ResponseRows,
    log_p_N: Tensor | None,
    log_q_N: Tensor,
    *,
    alphas: Alphas | None,
    counts: GlobalCounts,
) -> ResponseReport:
    """What is logged of the responses, and their α; arguments as of `plan_rows`."""
    gap_R = None if log_p_N is None else response_gaps(rows, log_p_N, log_q_N)
    alpha_R = value = None
    if objective.uses_alpha_curriculum:
        assert alphas is not None and gap_R is not None, objective.name
        alpha_R = alphas(gap_R, rows.cell_R).detach()
    if objective.is_pairwise:
        pairs = _pairs(objective, rows, log_p_N, log_q_N)
        value = F.softplus(-pairs.lam * pairs.margin_P).sum() / counts.pairs
    return ResponseReport(gap_R, alpha_R, value)


def plan_rows(
    objective: Objective,
    rows: ResponseRows,
    log_p_N: Tensor | None,
    log_q_N: Tensor,
    *,
    alphas: Alphas | None,
    beta: float,
    counts: GlobalCounts,
    normalization: Normalization = "response",
    row_weights_N: Tensor | None = None,
) -> RowPlan:
    """Turn an objective into numbers per row.

    Args:
        objective: a row of the table.
        rows: the rows, or those of some whole responses (whole pairs, under a pairwise objective).
        log_p_N: the teacher's log-probability of each target, or None without a teacher; detached.
        log_q_N: the student's; detached.
        alphas: the α curriculum; needed only by objectives that use it.
        beta: the weight of the student's side, [0, 1].
        counts: of the global batch.
        normalization: "response" takes each response's mean row, then the mean over pairs; "token" divides
            each side by that side's rows.
        row_weights_N: multiply the rows of a response before its mean; their mean should be 1.
    """
    kind_R = torch.zeros_like(rows.side_R)
    parameter_R = log_q_N.new_zeros(rows.responses)
    if objective.is_pairwise:
        if row_weights_N is not None:
            raise UserError(f"row weights cannot take effect in {objective.name!r}; switch them off.")
        lam, sign_R, pair_R, margin_P = _pairs(objective, rows, log_p_N, log_q_N)
        # −log σ(λ · margin) has the gradient of nll rows with one weight per response
        weight_R = sign_R * (lam * torch.sigmoid(-lam * margin_P) / counts.pairs)[pair_R]
        return RowPlan(kind_R[rows.response_N], parameter_R[rows.response_N], weight_R[rows.response_N])

    alpha_R = None
    if objective.uses_alpha_curriculum:
        alpha_R = report_responses(objective, rows, log_p_N, log_q_N, alphas=alphas, counts=counts).alpha_R
    weight_R = log_q_N.new_zeros(rows.responses)
    rows_R = _rows_per_response(rows).to(log_q_N.dtype)
    for term, side, has_R in _terms(objective, rows):
        # torch.where and not an index by has_R, whose length a GPU would have to be waited for
        kind_R = torch.where(has_R, int(row_kind(term)), kind_R)
        parameter = alpha_R if term.alpha_from_curriculum else term.parameter
        assert parameter is not None
        parameter_R = torch.where(has_R, parameter, parameter_R)
        weight = term.weight.at(beta)
        if normalization == "response":
            weight_R = torch.where(has_R, weight / (rows_R * counts.pairs), weight_R)
        elif counts.rows_S[side] > 0:
            weight_R = torch.where(has_R, weight / counts.rows_S[side], weight_R)

    weight_N = weight_R[rows.response_N]
    if row_weights_N is not None:
        weight_N = weight_N * row_weights_N.detach().to(weight_N)
    return RowPlan(kind_R[rows.response_N], parameter_R[rows.response_N], weight_N)


def response_gaps(rows: ResponseRows, log_p_N: Tensor, log_q_N: Tensor) -> Tensor:
    """How much likelier a response is under the model that wrote it, in mean probability per token.

    p̄ − q̄ for a teacher (or reference) response and q̄ − p̄ for a student one, p̄ = exp(mean log p(y)).
    Returns gap_R.
    """
    rows_R = _rows_per_response(rows)
    mean_p_R = (_sum_by_response(rows, log_p_N) / rows_R).exp()
    mean_q_R = (_sum_by_response(rows, log_q_N) / rows_R).exp()
    sign_R = torch.where(rows.side_R == SIDES.index("student"), -1, 1)
    return sign_R * (mean_p_R - mean_q_R)


class _Pairs(NamedTuple):
    lam: float
    sign_R: Tensor  # 1 for the response to prefer, −1 for the other
    pair_R: Tensor
    margin_P: Tensor  # nats by which log q − log p of the former exceeds that of the latter


def _pairs(objective: Objective, rows: ResponseRows, log_p_N: Tensor | None, log_q_N: Tensor) -> _Pairs:
    assert log_p_N is not None and objective.preference_lam is not None, objective.name
    sign_R = log_q_N.new_zeros(rows.responses)
    for side, term in objective.terms.items():
        sign_R = torch.where(rows.side_R == SIDES.index(side), term.weight.constant, sign_R)
    pairs, pair_R = rows.pair_R.unique(return_inverse=True)
    members_P = log_q_N.new_zeros(len(pairs)).index_add(0, pair_R, sign_R.abs())
    balance_P = log_q_N.new_zeros(len(pairs)).index_add(0, pair_R, sign_R)
    assert bool(((members_P == 2) & (balance_P == 0)).all()), "a pair needs one response of either side"
    log_ratio_R = _sum_by_response(rows, log_q_N - log_p_N)
    margin_P = log_q_N.new_zeros(len(pairs)).index_add(0, pair_R, sign_R * log_ratio_R)
    return _Pairs(objective.preference_lam, sign_R, pair_R, margin_P)


def _terms(objective: Objective, rows: ResponseRows) -> Iterator[tuple[Term, int, Tensor]]:
    """Each term with its side and which responses have it: by side, or by cell where tasks differ."""
    if not objective.terms_C:
        for side in objective.sides:
            yield objective.terms[side], SIDES.index(side), rows.side_R == SIDES.index(side)
    tasks = len(objective.terms_C) // len(SIDES)
    for cell, term in enumerate(objective.terms_C):
        if term is not None:
            yield term, cell // tasks, rows.cell_R == cell


def row_kind(term: Term) -> RowKind:
    """What the rows of a term minimise."""
    return RowKind[f"{term.divergence}_detached".upper() if term.detach_mixture else term.divergence.upper()]


def _rows_per_response(rows: ResponseRows) -> Tensor:
    ones_N = torch.ones_like(rows.response_N)  # torch.bincount would wait for a GPU
    return torch.zeros_like(rows.side_R).index_add(0, rows.response_N, ones_N).clamp(min=1)


def _sum_by_response(rows: ResponseRows, value_N: Tensor) -> Tensor:
    return value_N.new_zeros(rows.responses).index_add(0, rows.response_N, value_N)
