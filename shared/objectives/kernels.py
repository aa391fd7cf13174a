"""What computes the fused loss on this device: PyTorch's operations, the same compiled, or Triton's kernels?

A CPU runs PyTorch's operations on slices that fit its cache, which was measured to be faster than what
`torch.compile` makes of them, and takes no seconds to compile (docs/PERFORMANCE.md). CUDA runs Triton's
kernels; whatever else there is, and CUDA where those fail, what `torch.compile` makes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shared.objectives.plan import RowKind, RowPlan

log = logging.getLogger(__name__)

KernelName = Literal["torch", "compile", "triton"]


class RowKernels(NamedTuple):
    """As the functions of `triton_kernels`: whole chunks of rows of any kinds, in no room but the logits'."""

    log_sum_exp: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    nats_and_gradient_: Callable[..., tuple[Tensor, Tensor]]


class Kernels(NamedTuple):
    """What computes: `rows` where there is one, else PyTorch's operations on slices of one kind."""

    name: KernelName
    rows: RowKernels | None = None
    normalises: bool = True  # probabilities may take the place of logits; off in tests alone


TORCH = Kernels("torch")


def triton_kernels() -> Kernels:
    """Those of Triton.

    Raises:
        ImportError: it is not installed.
    """
    from shared.objectives import triton_kernels as module

    return Kernels("triton", RowKernels(module.log_sum_exp, module.nats_and_gradient_))


@cache
def compiled_kernels(backend: str = "inductor") -> Kernels:
    """PyTorch's operations, fused by a backend of `torch.compile`; each kind's first call takes seconds."""
    from shared.objectives.compiled_kernels import CompiledKernels

    compiled = CompiledKernels(backend)
    return Kernels("compile", RowKernels(compiled.log_sum_exp, compiled.nats_and_gradient_))


@cache
def kernels_for(device: torch.device) -> Kernels:
    """The fastest that works on a device; tried once, and one log line where a faster one does not."""
    failures: list[str] = []
    chosen = TORCH
    for name, kernels_of in _PREFERRED.get(device.type, _ELSEWHERE):
        try:
            kernels = kernels_of()
            _try(kernels, device)
        except Exception as error:  # no triton, no compiler, an unknown device: whatever compilers fail with
            first_line = str(error).partition("\n")[0]
            failures.append(f"{name} ({type(error).__name__}: {first_line})")
        else:
            chosen = kernels
            break
    if failures:
        log.warning(
            "What would be faster does not work here: %s. The loss runs on %s",
            ", ".join(failures),
            "PyTorch's own operations" if chosen is TORCH else "torch.compile",
        )
    return chosen


_Candidates = tuple[tuple[str, Callable[[], Kernels]], ...]
_ELSEWHERE: _Candidates = (("torch.compile", compiled_kernels),)
_PREFERRED: dict[str, _Candidates] = {"cpu": (), "cuda": (("Triton", triton_kernels), *_ELSEWHERE)}


def _try(kernels: Kernels, device: torch.device) -> None:
    """One tiny divergence."""
    assert kernels.rows is not None
    logits_CV, one_C = torch.zeros(1, 2, device=device), torch.ones(1, device=device)
    target_C = torch.zeros(1, dtype=torch.long, device=device)
    lse_C, _ = kernels.rows.log_sum_exp(logits_CV, target_C)
    nats_C, _ = kernels.rows.nats_and_gradient_(
        RowPlan(torch.full_like(target_C, int(RowKind.SKEW_KL)), one_C / 2, one_C),
        logits_CV.clone(),
        logits_CV,
        student_lse_C=lse_C,
        teacher_lse_C=lse_C,
        targets_C=target_C,
        backward=True,
        softcap=None,
    )
    if not abs(float(nats_C)) < 1e-6:
        raise RuntimeError(f"a divergence of {float(nats_C)} between equal distributions")
