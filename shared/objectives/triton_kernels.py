"""How are a chunk's normalisers, divergences and gradients computed on a GPU? As two Triton kernels.

One program goes over a row in blocks and keeps its sums in registers. The normalisers take one reading of
the logits; a divergence takes one, and its gradient another, from the end of the row, which is still in the
cache, and a writing. Rows of any kinds go together: a kind is read beside the row, and nothing waits for the
device.
Importing this needs triton; what computes where is chosen in `kernels`.

Shapes in names: C rows of a chunk, V ids of the shared vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.objectives.head import EXCLUDED_LOGIT
from shared.objectives.plan import RowKind, RowPlan

LARGEST_BLOCK = 2048  # ids that a program holds at a time
WARPS = 16  # within 3 % of the fastest of 5 block sizes and 4 numbers of warps (H100, V = 151,936)

_LOWEST = tl.constexpr(EXCLUDED_LOGIT)
_NLL = tl.constexpr(int(RowKind.NLL))
_KL = tl.constexpr(int(RowKind.KL))
_REVERSE_KL = tl.constexpr(int(RowKind.REVERSE_KL))
_SKEW_KL = tl.constexpr(int(RowKind.SKEW_KL))
_SKEW_REVERSE_KL = tl.constexpr(int(RowKind.SKEW_REVERSE_KL))
_SKEW_REVERSE_KL_DETACHED = tl.constexpr(int(RowKind.SKEW_REVERSE_KL_DETACHED))
_JSD = tl.constexpr(int(RowKind.JSD))
_TVD = tl.constexpr(int(RowKind.TVD))


def log_sum_exp(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """The log Σ exp of each row, and the log-probability of its target."""
    rows, vocabulary = logits_CV.shape
    lse_C, log_C = logits_CV.new_empty(2, rows)
    if rows:
        _log_sum_exp_kernel[(rows,)](
            logits_CV,
            logits_CV.stride(0),
            targets_C,
            lse_C,
            log_C,
            vocabulary,
            BLOCK=_block(vocabulary),
            num_warps=WARPS,
        )
    return lse_C, log_C


def nats_and_gradient_(
    plan: RowPlan,
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    *,
    student_lse_C: Tensor,
    teacher_lse_C: Tensor | None,
    targets_C: Tensor,
    backward: bool,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """As `closed_form.nats_and_gradient_`, for rows of any kinds and α ≥ 0.

    Returns:
        nats_C, and scale_C: each row's weight and `gradient_factor`, which `student_CV` lacks.
    """
    rows, vocabulary = student_CV.shape
    nats_C, scale_C = student_CV.new_empty(2, rows)
    if teacher_CV is None or teacher_lse_C is None:
        teacher_CV, teacher_lse_C = student_CV, student_lse_C  # rows are nll, which reads neither
    if rows:
        _divergence_kernel[(rows,)](
            student_CV,
            student_CV.stride(0),
            teacher_CV,
            teacher_CV.stride(0),
            student_lse_C,
            teacher_lse_C,
            targets_C,
            plan.kind_N,
            plan.parameter_N,
            plan.weight_N,
            nats_C,
            scale_C,
            vocabulary,
            1.0 if softcap is None else softcap,
            torch.finfo(student_CV.dtype).tiny,
            BACKWARD=backward,
            HAS_SOFTCAP=softcap is not None,
            BLOCK=_block(vocabulary),
            num_warps=WARPS,
        )
    return nats_C, scale_C


def _block(vocabulary: int) -> int:
    return min(LARGEST_BLOCK, triton.next_power_of_2(vocabulary))


@triton.jit
def _log_sum_exp_kernel(logits, stride, targets, lse_out, log_out, vocabulary, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
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
    lse = highest + tl.log(tl.sum(total * tl.exp(top - highest), axis=0))
    tl.store(lse_out + row, lse)
    tl.store(log_out + row, tl.load(logits + tl.load(targets + row)) - lse)


@triton.jit
def _terms(log_q, log_p, share, tiny, kind):  # type: ignore[no-untyped-def]
    """q, u = q ⊙ r up to `gradient_factor`, and what the nats are the sum of (jsd: the teacher's part)."""
    q = tl.exp(log_q)
    p = tl.exp(log_p)
    u = -p
    nats = p * (log_p - log_q)  # kl
    if kind == _REVERSE_KL:
        u = q * (log_q - log_p)
        nats = u
    elif kind == _SKEW_KL:
        ratio = p / _at_least(share * p + (1 - share) * q, tiny)
        u = ratio * q
        nats = p * tl.log(_at_least(ratio, tiny))
    elif kind == _SKEW_REVERSE_KL:
        ratio = q / _at_least(share * q + (1 - share) * p, tiny)
        nats = q * tl.log(_at_least(ratio, tiny))
        u = nats - share * ratio * q
    elif kind == _SKEW_REVERSE_KL_DETACHED:
        nats = q * tl.log(_at_least(q / _at_least(share * q + (1 - share) * p, tiny), tiny))
        u = nats
    elif kind == _JSD:
        mixture = _at_least(share * p + (1 - share) * q, tiny)
        nats = p * tl.log(_at_least(p / mixture, tiny))
        u = q * tl.log(_at_least(q / mixture, tiny))
    elif kind == _TVD:
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
    kinds,
    parameters,
    weights,
    nats_out,
    scale_out,
    vocabulary,
    softcap,
    tiny,
    BACKWARD: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    q_lse = tl.load(student_lse + row)
    p_lse = tl.load(teacher_lse + row)
    share = tl.load(parameters + row)
    target = tl.load(targets + row)
    kind = tl.load(kinds + row)
    if share == 0:  # without skew
        kind = tl.where(kind == _SKEW_KL, _KL, kind)
        kind = tl.where((kind == _SKEW_REVERSE_KL) | (kind == _SKEW_REVERSE_KL_DETACHED), _REVERSE_KL, kind)
    factor = tl.where(kind == _SKEW_KL, share - 1, tl.where(kind == _JSD, 1 - share, 1.0))
    factor = tl.where(kind == _TVD, 0.5, factor)
    tl.store(scale_out + row, factor * tl.load(weights + row))

    mean = q_lse * 0
    if kind == _NLL:
        tl.store(nats_out + row, q_lse - tl.load(student + target))
    else:
        u_sum = tl.zeros([BLOCK], dtype=student.dtype.element_ty)
        nats_sum = tl.zeros([BLOCK], dtype=student.dtype.element_ty)
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            log_q = tl.load(student + columns, mask=inside, other=_LOWEST) - q_lse
            log_p = tl.load(teacher + columns, mask=inside, other=_LOWEST) - p_lse
            _, u, nats = _terms(log_q, log_p, share, tiny, kind)
            u_sum += tl.where(inside, u, 0.0)
            nats_sum += tl.where(inside, nats, 0.0)
        mean = tl.sum(u_sum, axis=0)
        nats_total = tl.sum(nats_sum, axis=0)
        if kind == _JSD:
            nats_total = share * nats_total + (1 - share) * mean
        tl.store(nats_out + row, nats_total)
    if BACKWARD:
        blocks = (vocabulary + BLOCK - 1) // BLOCK
        for index in range(0, blocks):
            columns = (blocks - 1 - index) * BLOCK + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            logit = tl.load(student + columns, mask=inside, other=_LOWEST)
            if kind == _NLL:
                gradient = tl.exp(logit - q_lse) - tl.where(columns == target, 1.0, 0.0)
            else:
                log_p = tl.load(teacher + columns, mask=inside, other=_LOWEST) - p_lse
                q, u, _ = _terms(logit - q_lse, log_p, share, tiny, kind)
                gradient = u - mean * q
            if HAS_SOFTCAP:
                # clamped, because excluded columns lie far below the cap
                capped = tl.where(logit < -softcap, -1.0, tl.where(logit > softcap, 1.0, logit / softcap))
                gradient *= 1 - capped * capped
            tl.store(student + columns, gradient, mask=inside)
