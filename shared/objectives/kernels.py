"""What computes the slices of the fused loss on this device: PyTorch's own operations, or Triton's kernels?

On a CPU the former: compiled by `torch.compile` they were measured to be as fast, and take seconds to compile
(docs/PERFORMANCE.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shared.objectives import closed_form
from shared.objectives.closed_form import Scratch
from shared.objectives.plan import RowKind

log = logging.getLogger(__name__)

KernelName = Literal["torch", "triton"]


class Kernels(NamedTuple):
    """As the functions of `closed_form`."""

    name: KernelName
    log_sum_exp: Callable[[Tensor, Scratch], Tensor]
    nats_and_gradient_: Callable[..., Tensor]
    normalise_: Callable[[Tensor], Tensor] | None  # None where it would save nothing


TORCH = Kernels("torch", closed_form.log_sum_exp, closed_form.nats_and_gradient_, closed_form.normalise_)


def triton_kernels() -> Kernels:
    """Those of Triton.

    Raises:
        ImportError: it is not installed.
    """
    from shared.objectives import triton_kernels as module

    return Kernels("triton", module.log_sum_exp, module.nats_and_gradient_, normalise_=None)


@cache
def kernels_for(device: torch.device) -> Kernels:
    """The fastest that works on a device; tried once, and logged where it is not the one expected."""
    if device.type != "cuda":
        return TORCH
    try:
        kernels = triton_kernels()
        _try(kernels, device)
    except Exception as error:  # no triton, no compiler, an unknown device: whatever a compiler can fail with
        first_line = str(error).partition("\n")[0]
        log.warning(
            "Triton does not work here (%s: %s): the loss runs on PyTorch's own operations, somewhat slower",
            type(error).__name__,
            first_line,
        )
        return TORCH
    return kernels


def _try(kernels: Kernels, device: torch.device) -> None:
    """One tiny divergence."""
    logits_KV, ones_K = torch.zeros(1, 2, device=device), torch.ones(1, device=device)
    scratch = Scratch(logits_KV, logits_KV, logits_KV, None)
    lse_K = kernels.log_sum_exp(logits_KV, scratch)
    nats_K = kernels.nats_and_gradient_(
        RowKind.SKEW_KL,
        logits_KV.clone(),
        logits_KV,
        student_lse_K=lse_K,
        teacher_lse_K=lse_K,
        targets_K=torch.zeros(1, dtype=torch.long, device=device),
        parameter_K=ones_K / 2,
        backward=True,
        softcap=None,
        scratch=scratch,
    )
    if not abs(float(nats_K)) < 1e-6:
        raise RuntimeError(f"a divergence of {float(nats_K)} between equal distributions")
