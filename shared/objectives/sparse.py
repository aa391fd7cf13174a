"""How does a student meet a teacher of a few outcomes a row? By merging its own probabilities likewise.

Outcomes are the kept ids, the row's own token, and the tail as one. Their log-probabilities take the place of
logits in any divergence; the chain rule through the tail's log-sum-exp leaves each tail token its share of
the tail's gradient.

Shapes in names: N rows, K rows of a slice, J ids kept of a row, O = J + 2 outcomes, V ids of the shared
vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shared.objectives.closed_form import Scratch, divergence_and_gradient_, softcap_slope
from shared.objectives.head import EXCLUDED_LOGIT
from shared.objectives.plan import RowKind
from shared.objectives.signal import Sparse


class Outcomes(NamedTuple):
    """Both models over the same few outcomes: the plain reference's logits and targets."""

    log_q_NO: Tensor  # differentiable
    log_p_NO: Tensor
    target_N: Tensor  # the outcome that is the row's own token


def merged_outcomes(student_logits_NV: Tensor, sparse: Sparse, targets_N: Tensor) -> Outcomes:
    """The student's log-probabilities of the teacher's outcomes, with autograd's gradient."""
    log_q_NV = student_logits_NV.log_softmax(-1)
    is_kept_N = sparse.is_kept_N(targets_N)
    own_N = log_q_NV.gather(1, targets_N[:, None]).squeeze(1).masked_fill(is_kept_N, EXCLUDED_LOGIT)
    named_NV = torch.zeros_like(log_q_NV, dtype=torch.bool)
    named_NV.scatter_(1, sparse.ids_NJ, True).scatter_(1, targets_N[:, None], True)
    tail_N = log_q_NV.masked_fill(named_NV, EXCLUDED_LOGIT).logsumexp(-1)
    log_q_NO = torch.cat([log_q_NV.gather(1, sparse.ids_NJ), own_N[:, None], tail_N[:, None]], dim=-1)
    kept = sparse.ids_NJ.shape[1]
    place_N = (sparse.ids_NJ == targets_N[:, None]).long().argmax(-1)
    return Outcomes(log_q_NO, sparse.log_p_NO(targets_N), torch.where(is_kept_N, place_N, kept))


def sparse_nats_and_gradient_(
    kind: RowKind,
    student_KV: Tensor,
    sparse_K: Sparse,
    *,
    student_lse_K: Tensor,
    targets_K: Tensor,
    parameter_K: Tensor,
    backward: bool,
    softcap: float | None,
    scratch: Scratch,
) -> Tensor:
    """As `closed_form.nats_and_gradient_`, for a sparse teacher and any kind but `RowKind.NLL`."""
    scratch = scratch.rows(len(student_KV))
    slope_KV = softcap_slope(student_KV, softcap, scratch) if backward else None
    ids_KJ, targets_K1 = sparse_K.ids_NJ, targets_K[:, None]
    kept = ids_KJ.shape[1]
    log_p_KO = sparse_K.log_p_NO(targets_K)
    log_q_KO = torch.empty_like(log_p_KO)
    torch.sub(student_KV.gather(1, ids_KJ), student_lse_K[:, None], out=log_q_KO[:, :kept])
    own_K = student_KV.gather(1, targets_K1).squeeze(1) - student_lse_K
    log_q_KO[:, kept] = own_K.masked_fill_(sparse_K.is_kept_N(targets_K), EXCLUDED_LOGIT)
    student_KV.scatter_(1, ids_KJ, EXCLUDED_LOGIT).scatter_(1, targets_K1, EXCLUDED_LOGIT)
    top_K1 = student_KV.amax(-1, keepdim=True)
    tail_KV = torch.sub(student_KV, top_K1, out=scratch.a_KV).exp_()
    tail_sum_K = tail_KV.sum(-1)
    log_q_KO[:, -1] = tail_sum_K.log().add_(top_K1.squeeze(1)).sub_(student_lse_K)

    room = Scratch(torch.empty_like(log_p_KO), torch.empty_like(log_p_KO), torch.empty_like(log_p_KO), None)
    nats_K = divergence_and_gradient_(kind, log_q_KO, log_p_KO, parameter_K[:, None], backward, room)
    if backward:
        gradient_KO = log_q_KO
        torch.mul(tail_KV, (gradient_KO[:, -1] / tail_sum_K)[:, None], out=student_KV)
        student_KV.scatter_add_(1, ids_KJ, gradient_KO[:, :kept])
        student_KV.scatter_add_(1, targets_K1, gradient_KO[:, kept, None])  # 0 where it is kept
        if slope_KV is not None:
            student_KV.mul_(slope_KV)
    return nats_K
