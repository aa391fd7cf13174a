"""How do the slices of `closed_form` run on a GPU? As two Triton kernels, one program a row.

Each program goes over its row in blocks and keeps its sums in registers: the normalisers take one reading of
the logits, a divergence one, and its gradient another and one writing. Importing this needs triton; what
computes where is chosen in `kernels`.

Shapes in names: K rows, V ids of the shared vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.objectives.closed_form import Scratch
from shared.objectives.head import EXCLUDED_LOGIT
from shared.objectives.plan import RowKind

LARGEST_BLOCK = 4096  # ids that a program holds at a time

_LOWEST = tl.constexpr(EXCLUDED_LOGIT)
_NLL = tl.constexpr(int(RowKind.NLL))
_KL = tl.constexpr(int(RowKind.KL))
_REVERSE_KL = tl.constexpr(int(RowKind.REVERSE_KL))
_SKEW_KL = tl.constexpr(int(RowKind.SKEW_KL))
_SKEW_REVERSE_KL = tl.constexpr(int(RowKind.SKEW_REVERSE_KL))
_SKEW_REVERSE_KL_DETACHED = tl.constexpr(int(RowKind.SKEW_REVERSE_KL_DETACHED))
_JSD = tl.constexpr(int(RowKind.JSD))


def log_sum_exp(logits_KV: Tensor, scratch: Scratch) -> Tensor:
    """As `closed_form.log_sum_exp`; needs no scratch."""
    del scratch
    rows, vocabulary = logits_KV.shape
    lse_K = logits_KV.new_empty(rows)
    if rows:
        _log_sum_exp_kernel[(rows,)](
            logits_KV, logits_KV.stride(0), lse_K, vocabulary, BLOCK=_block(vocabulary)
        )
    return lse_K


def nats_and_gradient_(
    kind: RowKind,
    student_KV: Tensor,
    teacher_KV: Tensor | None,
    *,
    student_lse_K: Tensor,
    teacher_lse_K: Tensor | None,
    targets_K: Tensor,
    parameter_K: Tensor,
    backward: bool,
    softcap: float | None,
    scratch: Scratch,
) -> Tensor:
    """As `closed_form.nats_and_gradient_`; needs no scratch."""
    del scratch
    rows, vocabulary = student_KV.shape
    nats_K = student_KV.new_empty(rows)
    if not rows:
        return nats_K
    if teacher_KV is None or teacher_lse_K is None:
        assert kind is RowKind.NLL
        teacher_KV, teacher_lse_K = student_KV, student_lse_K  # not read
    _divergence_kernel[(rows,)](
        student_KV,
        student_KV.stride(0),
        teacher_KV,
        teacher_KV.stride(0),
        student_lse_K,
        teacher_lse_K,
        targets_K,
        parameter_K,
        nats_K,
        vocabulary,
        1.0 if softcap is None else softcap,
        torch.finfo(student_KV.dtype).tiny,
        KIND=int(kind),
        BACKWARD=backward,
        HAS_SOFTCAP=softcap is not None,
        BLOCK=_block(vocabulary),
    )
    return nats_K


def _block(vocabulary: int) -> int:
    return min(LARGEST_BLOCK, triton.next_power_of_2(vocabulary))


@triton.jit
def _log_sum_exp_kernel(logits, stride, lse, vocabulary, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    top = tl.full([BLOCK], _LOWEST, dtype=logits.dtype.element_ty)
    total = tl.zeros([BLOCK], dtype=logits.dtype.element_ty)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        logit = tl.load(logits + columns, mask=inside, other=_LOWEST)
        higher = tl.maximum(top, logit)
        # a NaN is in no maximum, but in this sum
        total = total * tl.exp(top - higher) + tl.where(inside, tl.exp(logit - higher), 0.0)
        top = higher
    highest = tl.max(top, axis=0)
    tl.store(lse + row, highest + tl.log(tl.sum(total * tl.exp(top - highest), axis=0)))


@triton.jit
def _terms(log_q, log_p, share, tiny, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """q, u = q ⊙ r up to `gradient_factor`, and what the nats are the sum of (jsd: the teacher's part)."""
    q = tl.exp(log_q)
    p = tl.exp(log_p)
    if KIND == _KL:
        u = -p
        nats = p * (log_p - log_q)
    elif KIND == _REVERSE_KL:
        u = q * (log_q - log_p)
        nats = u
    elif KIND == _SKEW_KL:
        ratio = p / _at_least(share * p + (1 - share) * q, tiny)
        u = ratio * q
        nats = p * tl.log(_at_least(ratio, tiny))
    elif KIND == _SKEW_REVERSE_KL:
        ratio = q / _at_least(share * q + (1 - share) * p, tiny)
        nats = q * tl.log(_at_least(ratio, tiny))
        u = nats - share * ratio * q
    elif KIND == _SKEW_REVERSE_KL_DETACHED:
        nats = q * tl.log(_at_least(q / _at_least(share * q + (1 - share) * p, tiny), tiny))
        u = nats
    elif KIND == _JSD:
        mixture = _at_least(share * p + (1 - share) * q, tiny)
        nats = p * tl.log(_at_least(p / mixture, tiny))
        u = q * tl.log(_at_least(q / mixture, tiny))
    else:  # total variation
        difference = q - p
        u = tl.where(difference > 0, q, tl.where(difference < 0, -q, difference))
        nats = tl.abs(difference) / 2
    return q, u, nats


@triton.jit
def _at_least(value, floor):  # type: ignore[no-untyped-def]
    return tl.where(value < floor, floor, value)  # a NaN stays


@triton.jit
def _divergence_kernel(  # type: ignore[no-untyped-def]
    student,
    student_stride,
    teacher,
    teacher_stride,
    student_lse,
    teacher_lse,
    targets,
    parameter,
    nats_out,
    vocabulary,
    softcap,
    tiny,
    KIND: tl.constexpr,
    BACKWARD: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    q_lse = tl.load(student_lse + row)
    p_lse = tl.load(teacher_lse + row)
    share = tl.load(parameter + row)
    target = tl.load(targets + row)
    mean = q_lse * 0
    if KIND == _NLL:
        tl.store(nats_out + row, q_lse - tl.load(student + target))
    else:
        u_sum = tl.zeros([BLOCK], dtype=student.dtype.element_ty)
        nats_sum = tl.zeros([BLOCK], dtype=student.dtype.element_ty)
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            log_q = tl.load(student + columns, mask=inside, other=_LOWEST) - q_lse
            log_p = tl.load(teacher + columns, mask=inside, other=_LOWEST) - p_lse
            _, u, nats = _terms(log_q, log_p, share, tiny, KIND)
            u_sum += tl.where(inside, u, 0.0)
            nats_sum += tl.where(inside, nats, 0.0)
        mean = tl.sum(u_sum, axis=0)
        nats_total = tl.sum(nats_sum, axis=0)
        if KIND == _JSD:
            nats_total = share * nats_total + (1 - share) * mean
        tl.store(nats_out + row, nats_total)
    if BACKWARD:
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            logit = tl.load(student + columns, mask=inside, other=_LOWEST)
            if KIND == _NLL:
                gradient = tl.exp(logit - q_lse) - tl.where(columns == target, 1.0, 0.0)
            else:
                log_p = tl.load(teacher + columns, mask=inside, other=_LOWEST) - p_lse
                q, u, _ = _terms(logit - q_lse, log_p, share, tiny, KIND)
                gradient = u - mean * q
            if HAS_SOFTCAP:
                # clamped, because excluded columns lie far below the cap
                capped = tl.where(logit < -softcap, -1.0, tl.where(logit > softcap, 1.0, logit / softcap))
                gradient *= 1 - capped * capped
            tl.store(student + columns, gradient, mask=inside)
