"""What is the loss of a micro-batch? From hidden states at response rows to one number that backpropagates.

The sum over all micro-batches of all processes is the batch's loss: nothing here depends on how it was split.

Shapes in names: N rows that predict response tokens, D and E widths of the student's and the teacher's hidden
states, V ids of the shared vocabulary, R responses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from shared.objectives.divergences import DIVERGENCES, nll
from shared.objectives.fused import DivergenceOutput, RowPlanner, fused_divergence, loss_dtype
from shared.objectives.head import Head
from shared.objectives.kernels import Kernels
from shared.objectives.objective import Objective
from shared.objectives.plan import (
    Alphas,
    GlobalCounts,
    Normalization,
    ResponseRows,
    RowKind,
    RowPlan,
    RowWeigher,
    plan_rows,
    report_responses,
    row_kind,
    starts_of,
)
from shared.objectives.signal import Dense, Signal, Sparse
from shared.objectives.sparse import merged_outcomes

__all__ = ["GlobalCounts", "ObjectiveOutput", "ResponseRows", "objective_loss", "row_nats"]


class ObjectiveOutput(NamedTuple):
    """The loss, with what it saw on the way; all but `loss` detached."""

    loss: Tensor  # scalar, nats
    nats_N: Tensor  # each row's own divergence or nll, unweighted
    log_p_N: Tensor | None  # the teacher's log-probability of each target; None without a teacher
    log_q_N: Tensor  # the student's
    gap_R: Tensor | None  # see `plan.response_gaps`; None without a teacher
    alpha_R: Tensor | None  # None where the objective has no α curriculum
    auxiliary: Tensor | None = None  # what another loss has added to `loss` since


def objective_loss(
    objective: Objective,
    student_hidden_ND: Tensor,
    student_head: Head,
    signal: Signal | None,
    rows: ResponseRows,
    *,
    alphas: Alphas | None,
    beta: float,
    counts: GlobalCounts,
    normalization: Normalization = "response",
    row_weights_N: Tensor | None = None,
    row_weigher: RowWeigher | None = None,
    alpha_needs_gap: bool = True,
    backend: Literal["fused", "plain"] = "fused",
    buffer_bytes: int | None = None,
    kernels: Kernels | None = None,
) -> ObjectiveOutput:
    """The loss of a micro-batch.

    Args:
        objective: from `build_objective`.
        student_hidden_ND: the student's final hidden states at the response rows.
        student_head: its weight may be frozen, trained or tied to the embedding.
        signal: the teacher's, row by row the same tokens, over the same shared vocabulary; None where
            there is no teacher. No gradient ever reaches it.
        rows: targets, responses, sides, pairs. Empty rows give a loss of 0 that still backpropagates zeros.
        alphas: (gap_R, cell_R) -> alpha_R; needed only by objectives with an α curriculum.
        beta: the weight of the student's side, [0, 1].
        counts: of the global batch; they make the loss a mean.
        normalization: "response" or "token".
        row_weights_N: multiply the rows of a response before its mean; their mean should be 1.
        row_weigher: gives such weights from the log-probabilities of whole responses; beside `row_weights_N`
            they are multiplied.
        alpha_needs_gap: False promises that `alphas` does not look at the gap, as
            `AlphaCurriculum.needs_own_gap` says; it saves long responses a second projection.
        backend: "fused" never holds all logits; "plain" is the reference that it is tested against.
        buffer_bytes: what the fused backend may hold at once, for speed; see `fused_divergence`.
        kernels: what computes the fused backend; see `fused_divergence`.

    Raises:
        AlignmentError: a target outside the shared vocabulary.
    """
    assert signal is not None or not objective.needs_teacher, f"{objective.name} needs a teacher"
    student_head.check_targets(rows.targets_N)
    by_unit = (
        objective.is_pairwise
        or row_weigher is not None
        or (objective.uses_alpha_curriculum and alpha_needs_gap)
    )
    response_of = rows.response_N.tolist() if by_unit else ()

    def plan_of(start: int, stop: int, log_p_C: Tensor | None, log_q_C: Tensor) -> RowPlan:
        """Of rows start:stop, which are whole responses."""
        weights_C = None if row_weights_N is None else row_weights_N[start:stop]
        if row_weigher is not None:
            found_C = row_weigher(start, stop, log_p_C, log_q_C)
            weights_C = found_C if weights_C is None else weights_C * found_C
        return plan_rows(
            objective,
            rows.between(start, stop, response_of),
            log_p_C,
            log_q_C,
            alphas=alphas,
            beta=beta,
            counts=counts,
            normalization=normalization,
            row_weights_N=weights_C,
        )

    models = (student_hidden_ND, student_head, signal)
    how: dict[str, Any] = {"targets_N": rows.targets_N, "buffer_bytes": buffer_bytes, "kernels": kernels}
    if backend == "plain":
        sums = _plain_sum(*models, plan_of, targets_N=rows.targets_N)
    elif by_unit:
        owner_of = rows.pair_R[rows.response_N].tolist() if objective.is_pairwise else response_of
        planner = RowPlanner(starts_of(owner_of), plan_of, frozenset(map(row_kind, objective.all_terms)))
        sums = fused_divergence(*models, planner, **how)
    else:
        unseen_N = student_hidden_ND.new_zeros(len(rows.targets_N), dtype=loss_dtype(*models))
        plan = plan_of(0, len(unseen_N), None if signal is None else unseen_N, unseen_N)
        sums = fused_divergence(*models, plan, **how)

    with torch.no_grad():
        report = report_responses(objective, rows, sums.log_p_N, sums.log_q_N, alphas=alphas, counts=counts)
    loss = sums.total
    if report.value is not None:
        loss = (loss - loss.detach()) + report.value
    return ObjectiveOutput(loss, sums.nats_N, sums.log_p_N, sums.log_q_N, report.gap_R, report.alpha_R)


def row_nats(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor | None, targets_N: Tensor, plan: RowPlan
) -> Tensor:
    """Each row by its own kind and parameter: the plain backend. Returns nats_N, differentiable."""
    nats_N = student_logits_NV.sum(-1) * 0  # keeps an empty micro-batch attached to the student
    for kind in map(RowKind, plan.kind_N.unique().tolist()):
        index = (plan.kind_N == kind).nonzero().squeeze(-1)
        student_KV, parameter_K = student_logits_NV[index], plan.parameter_N[index]
        if kind is RowKind.NLL:
            nats_K = nll(student_KV, targets_N[index])
        else:
            assert teacher_logits_NV is not None
            nats_K = _divergence(kind, student_KV, teacher_logits_NV[index], parameter_K)
        nats_N = nats_N.index_add(0, index, nats_K)
    return nats_N


def _divergence(kind: RowKind, student_NV: Tensor, teacher_NV: Tensor, parameter_N: Tensor) -> Tensor:
    match kind:
        case RowKind.SKEW_REVERSE_KL_DETACHED:
            name, parameters = "skew_reverse_kl", {"alpha": parameter_N, "detach_mixture": True}
        case RowKind.SKEW_KL | RowKind.SKEW_REVERSE_KL:
            name, parameters = kind.name.lower(), {"alpha": parameter_N}
        case RowKind.JSD:
            name, parameters = "jsd", {"omega": parameter_N}
        case _:
            name, parameters = kind.name.lower(), {}
    return DIVERGENCES[name](student_NV, teacher_NV, **parameters)


def _plain_sum(
    student_hidden_ND: Tensor,
    student_head: Head,
    signal: Signal | None,
    plan_of: Callable[[int, int, Tensor | None, Tensor], RowPlan],
    *,
    targets_N: Tensor,
) -> DivergenceOutput:
    """As `fused_divergence`, with all logits at once and autograd's gradient."""
    student_logits_NV = student_head.logits(student_hidden_ND)
    with torch.no_grad():
        log_q_N = -nll(student_logits_NV, targets_N)
        match signal:
            case Dense(hidden_NE, head):
                assert head.vocabulary_size == student_head.vocabulary_size, "heads of two vocabularies"
                logits_NV = head.logits(hidden_NE)
                teacher_logits_NV: Tensor | None = logits_NV
                log_p_N: Tensor | None = -nll(logits_NV, targets_N)
            case Sparse():
                log_p_N = signal.target_log_p_N
            case None:
                teacher_logits_NV = log_p_N = None
        plan = plan_of(0, len(targets_N), log_p_N, log_q_N)
    if isinstance(signal, Sparse):  # outcomes take the place of the vocabulary
        student_logits_NV, teacher_logits_NV, targets_N = merged_outcomes(
            student_logits_NV, signal, targets_N
        )
    nats_N = row_nats(student_logits_NV, teacher_logits_NV, targets_N, plan)
    return DivergenceOutput((plan.weight_N * nats_N).sum(), nats_N.detach(), log_p_N, log_q_N)
