"""What are a row's divergence and its gradient, in closed form? In place, for a few rows at a time.

With r = ∂D/∂q, up to a constant, the gradient of the student's logits is u − ⟨q, r⟩ q with u = q ⊙ r, whose
sum is ⟨q, r⟩. The few rows of a call stay in the processor's cache, and nothing is allocated but columns.
Tested against the plain definitions in `divergences`.

Shapes in names: K rows of one kind, V ids of the shared vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shared.objectives.plan import RowKind

PROBABILITY_KINDS = frozenset(
    {RowKind.SKEW_KL, RowKind.SKEW_REVERSE_KL, RowKind.SKEW_REVERSE_KL_DETACHED, RowKind.JSD, RowKind.TVD}
)
"""That need no logarithm of a probability which may underflow: a mixture, or none, stands below it."""


class Scratch(NamedTuple):
    """Room for intermediate values, each (K, V) or more rows."""

    p_KV: (
        Tensor  # the teacher's probabilities: its logits are only read, which spares their way back to memory
    )
    a_KV: Tensor
    b_KV: Tensor
    softcap_KV: Tensor | None  # only for a student with a final soft-cap

    def rows(self, count: int) -> Scratch:
        """The first rows of each."""
        if count == len(self.p_KV):
            return self
        softcap_KV = None if self.softcap_KV is None else self.softcap_KV[:count]
        return Scratch(self.p_KV[:count], self.a_KV[:count], self.b_KV[:count], softcap_KV)


def log_sum_exp(logits_KV: Tensor, scratch: Scratch) -> Tensor:
    """The log Σ exp of each row; leaves the logits alone. Returns (K,)."""
    top_K1 = logits_KV.amax(-1, keepdim=True)
    shifted_KV = torch.sub(logits_KV, top_K1, out=scratch.rows(len(logits_KV)).a_KV).exp_()
    return shifted_KV.sum(-1).log_().add_(top_K1.squeeze(-1))


def normalise_(logits_KV: Tensor) -> Tensor:
    """Probabilities in place of the logits; returns their `log_sum_exp`. One exponential serves both.

    Not `torch.softmax`: on a CPU its own exponential is faster, and ten times less accurate.
    """
    top_K1 = logits_KV.amax(-1, keepdim=True)
    sum_K1 = logits_KV.sub_(top_K1).exp_().sum(-1, keepdim=True)
    logits_KV.div_(sum_K1)
    return sum_K1.log_().add_(top_K1).squeeze(-1)


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
    """Return nats_K, and leave ∂nats/∂(student logits before the soft-cap) in `student_KV`.

    What is left there lacks a factor for each row, `gradient_factor`: like the row's weight, it is cheaper to
    apply to hidden states than to V columns.

    Args:
        kind: of all K rows; the skewed kinds with α > 0.
        student_KV: logits; destroyed.
        teacher_KV: logits; left alone. None for `RowKind.NLL`.
        student_lse_K: their `log_sum_exp`.
        teacher_lse_K: their `log_sum_exp`.
        targets_K: for `RowKind.NLL`.
        parameter_K: α or ω.
        backward: False leaves the gradient out: `student_KV` then holds nothing of use.
        softcap: the student's, whose slope is part of the gradient.
        scratch: at least K rows.
    """
    scratch = scratch.rows(len(student_KV))
    slope_KV = softcap_slope(student_KV, softcap, scratch) if backward else None
    log_q_KV = student_KV.sub_(student_lse_K[:, None])
    if kind is RowKind.NLL:
        nats_K = _nll_(log_q_KV, targets_K, backward)
    else:
        assert teacher_KV is not None and teacher_lse_K is not None
        log_p_KV = torch.sub(teacher_KV, teacher_lse_K[:, None], out=scratch.p_KV)
        nats_K = divergence_and_gradient_(kind, log_q_KV, log_p_KV, parameter_K[:, None], backward, scratch)
    if slope_KV is not None:
        student_KV.mul_(slope_KV)
    return nats_K


def softcap_slope(student_KV: Tensor, softcap: float | None, scratch: Scratch) -> Tensor | None:
    """The derivative of the final soft-cap at its own outputs; None without one."""
    if softcap is None:
        return None
    assert scratch.softcap_KV is not None
    # d(c · tanh(x/c))/dx = 1 − (y/c)², and 0 at excluded columns, which the clamp takes to the cap
    slope_KV = torch.clamp(student_KV, -softcap, softcap, out=scratch.softcap_KV)
    return slope_KV.div_(softcap).square_().neg_().add_(1)


def gradient_factor(kind: RowKind, parameter_K: Tensor) -> Tensor | float:
    """What `nats_and_gradient_` leaves out of each row's gradient."""
    match kind:
        case RowKind.SKEW_KL:
            return parameter_K - 1
        case RowKind.JSD:
            return 1 - parameter_K
        case RowKind.TVD:
            return 0.5
        case _:
            return 1.0


def _nll_(log_q_KV: Tensor, targets_K: Tensor, backward: bool) -> Tensor:
    targets_K1 = targets_K[:, None]
    nats_K = -log_q_KV.gather(-1, targets_K1).squeeze(-1)
    if backward:
        log_q_KV.exp_().scatter_add_(-1, targets_K1, torch.full_like(nats_K, -1)[:, None])
    return nats_K


def divergence_and_gradient_(
    kind: RowKind, log_q_KV: Tensor, log_p_KV: Tensor, share_K1: Tensor, backward: bool, scratch: Scratch
) -> Tensor:
    """Return nats_K, and leave the gradient up to `gradient_factor` in `log_q_KV`; uses up both arguments.

    Any normalised log-probabilities: of a vocabulary, or of a few outcomes.
    """
    match kind:
        case RowKind.KL:
            return _kl_(log_q_KV, log_p_KV, backward, scratch)
        case RowKind.REVERSE_KL:
            return _reverse_kl_(log_q_KV, log_p_KV, backward, scratch)
    return probability_nats_and_gradient_(kind, log_q_KV.exp_(), log_p_KV.exp_(), share_K1, backward, scratch)


def probability_nats_and_gradient_(
    kind: RowKind, q_KV: Tensor, p_KV: Tensor, share_K1: Tensor, backward: bool, scratch: Scratch
) -> Tensor:
    """As `divergence_and_gradient_` for `PROBABILITY_KINDS`, in place of q; leaves p alone."""
    match kind:
        case RowKind.SKEW_KL:
            return _skew_kl_(q_KV, p_KV, share_K1, backward, scratch)
        case RowKind.SKEW_REVERSE_KL:
            return _skew_reverse_kl_(q_KV, p_KV, share_K1, backward, scratch, through_mixture=True)
        case RowKind.SKEW_REVERSE_KL_DETACHED:
            return _skew_reverse_kl_(q_KV, p_KV, share_K1, backward, scratch, through_mixture=False)
        case RowKind.JSD:
            return _jsd_(q_KV, p_KV, share_K1, backward, scratch)
        case RowKind.TVD:
            return _tvd_(q_KV, p_KV, backward, scratch)
    raise AssertionError(kind)


def _kl_(log_q_KV: Tensor, log_p_KV: Tensor, backward: bool, scratch: Scratch) -> Tensor:
    """With r = −p/q, the gradient is q − p."""
    log_ratio_KV = torch.sub(log_p_KV, log_q_KV, out=scratch.a_KV)
    p_KV = log_p_KV.exp_()
    nats_K = log_ratio_KV.mul_(p_KV).sum(-1)
    if backward:
        log_q_KV.exp_().sub_(p_KV)
    return nats_K


def _reverse_kl_(log_q_KV: Tensor, log_p_KV: Tensor, backward: bool, scratch: Scratch) -> Tensor:
    """With r = log(q/p), ⟨q, r⟩ is the divergence itself."""
    r_KV = torch.sub(log_q_KV, log_p_KV, out=scratch.a_KV)
    q_KV = log_q_KV.exp_()
    u_KV = r_KV.mul_(q_KV)
    return _pull_back_(q_KV, u_KV, backward)


def _skew_kl_(q_KV: Tensor, p_KV: Tensor, alpha_K1: Tensor, backward: bool, scratch: Scratch) -> Tensor:
    """With r = p/m, the factor −(1−α) left out, and m = αp + (1−α)q."""
    r_KV = _ratio(p_KV, torch.lerp(q_KV, p_KV, alpha_K1, out=scratch.a_KV))
    nats_K = _log(r_KV, out=scratch.b_KV).mul_(p_KV).sum(-1)
    if backward:
        _pull_back_(q_KV, r_KV.mul_(q_KV), backward)
    return nats_K


def _skew_reverse_kl_(
    q_KV: Tensor,
    p_KV: Tensor,
    alpha_K1: Tensor,
    backward: bool,
    scratch: Scratch,
    *,
    through_mixture: bool,
) -> Tensor:
    """With r = log(q/m) − α q/m through the mixture, log(q/m) without, and m = (1−α)p + αq."""
    ratio_KV = _ratio(q_KV, torch.lerp(p_KV, q_KV, alpha_K1, out=scratch.a_KV))
    u_KV = _log(ratio_KV, out=scratch.b_KV).mul_(q_KV)
    if not through_mixture:
        return _pull_back_(q_KV, u_KV, backward)
    nats_K = u_KV.sum(-1)
    if backward:
        u_KV.addcmul_(ratio_KV.mul_(q_KV), alpha_K1, value=-1)
        _pull_back_(q_KV, u_KV, backward)
    return nats_K


def _jsd_(q_KV: Tensor, p_KV: Tensor, omega_K1: Tensor, backward: bool, scratch: Scratch) -> Tensor:
    """With r = log(q/m), the factor 1−ω left out, and m = ωp + (1−ω)q."""
    m_KV = torch.lerp(q_KV, p_KV, omega_K1, out=scratch.a_KV).clamp_min_(_tiny(q_KV))
    teacher_log_KV = _log(torch.div(p_KV, m_KV, out=scratch.b_KV), out=scratch.b_KV)
    teacher_nats_K = teacher_log_KV.mul_(p_KV).sum(-1)
    u_KV = _log(torch.div(q_KV, m_KV, out=scratch.b_KV), out=scratch.b_KV).mul_(q_KV)
    student_nats_K = _pull_back_(q_KV, u_KV, backward)
    omega_K = omega_K1.squeeze(-1)
    return omega_K * teacher_nats_K + (1 - omega_K) * student_nats_K


def _tvd_(q_KV: Tensor, p_KV: Tensor, backward: bool, scratch: Scratch) -> Tensor:
    """With r = sign(q − p), the factor ½ left out."""
    difference_KV = torch.sub(q_KV, p_KV, out=scratch.a_KV)
    nats_K = torch.linalg.vector_norm(difference_KV, ord=1, dim=-1) / 2
    if backward:
        _pull_back_(q_KV, difference_KV.sign_().mul_(q_KV), backward)
    return nats_K


def _pull_back_(q_KV: Tensor, u_KV: Tensor, backward: bool) -> Tensor:
    """Σ u, which is ⟨q, r⟩; and u − Σu · q in place of q."""
    mean_K = u_KV.sum(-1)
    if backward:
        torch.addcmul(u_KV, q_KV, mean_K[:, None], value=-1, out=q_KV)
    return mean_K


def _ratio(part_KV: Tensor, mixture_KV: Tensor) -> Tensor:
    """The part over a mixture that holds a share of it; 0 where both vanish. Overwrites the mixture."""
    return torch.div(part_KV, mixture_KV.clamp_min_(_tiny(part_KV)), out=mixture_KV)


def _log(ratio_KV: Tensor, *, out: Tensor) -> Tensor:
    """A logarithm that is finite at 0, where the probability that multiplies it is 0 as well."""
    return torch.clamp_min(ratio_KV, _tiny(ratio_KV), out=out).log_()


def _tiny(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).tiny
