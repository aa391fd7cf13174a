"""What does a device without kernels of its own compute? PyTorch's operations, fused by `torch.compile`.

The formulas are those of `closed_form`. In place they do not compile on a CPU (torch 2.14: `KeyError` in the
fusion of outer loops), so the compiled functions return what they are for, and it is copied.

Shapes in names: C rows of a chunk, K rows of a slice of one kind, V ids of the shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shared.objectives.chunks import GPU_SLICE_BYTES
from shared.objectives.closed_form import Scratch, gradient_factor
from shared.objectives.closed_form import log_sum_exp as plain_log_sum_exp
from shared.objectives.closed_form import nats_and_gradient_ as plain_nats_and_gradient_
from shared.objectives.plan import RowKind, RowPlan, runs_of_a_kind

# Kinds, with gradient or without, one row or more, two types: each is compiled when it first comes.
_RECOMPILE_LIMIT = 8 * len(RowKind)


class CompiledKernels:
    """The functions of `triton_kernels`, compiled.

    Args:
        backend: of `torch.compile`.
    """

    def __init__(self, backend: str) -> None:
        def compiled(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
            return torch.compile(function, backend=backend, dynamic=True, fullgraph=True)

        self._log_sum_exp = compiled(_log_sum_exp)
        self._nats_and_gradient = compiled(_nats_and_gradient)

    def log_sum_exp(self, logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
        """As `triton_kernels.log_sum_exp`."""
        with torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT):
            return self._log_sum_exp(logits_CV, targets_C)

    def nats_and_gradient_(
        self,
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
        """As `triton_kernels.nats_and_gradient_`, with room for the gradient of a slice."""
        rows, vocabulary = student_CV.shape
        nats_C, scale_C = student_CV.new_empty(rows), plan.weight_N.clone()
        for kind, first, last in runs_of_a_kind(
            plan, max(1, GPU_SLICE_BYTES // (vocabulary * student_CV.itemsize))
        ):
            run = slice(first, last)
            scale_C[run] *= gradient_factor(kind, plan.parameter_N[run])
            with torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT):
                nats_C[run], gradient_KV = self._nats_and_gradient(
                    kind,
                    student_CV[run],
                    None if teacher_CV is None else teacher_CV[run],
                    student_lse_K=student_lse_C[run],
                    teacher_lse_K=None if teacher_lse_C is None else teacher_lse_C[run],
                    targets_K=targets_C[run],
                    parameter_K=plan.parameter_N[run],
                    backward=backward,
                    softcap=softcap,
                )
            if backward:
                student_CV[run] = gradient_KV
        return nats_C, scale_C


def _log_sum_exp(logits_KV: Tensor, targets_K: Tensor) -> tuple[Tensor, Tensor]:
    lse_K = plain_log_sum_exp(logits_KV, _scratch(logits_KV))
    return lse_K, logits_KV.gather(1, targets_K[:, None]).squeeze(1) - lse_K


def _nats_and_gradient(
    kind: RowKind, student_KV: Tensor, teacher_KV: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    gradient_KV = student_KV.clone()
    nats_K = plain_nats_and_gradient_(kind, gradient_KV, teacher_KV, scratch=_scratch(student_KV), **options)
    return nats_K, gradient_KV


def _scratch(logits_KV: Tensor) -> Scratch:
    """Compiled away."""
    return Scratch(*(torch.empty_like(logits_KV) for _ in range(4)))
