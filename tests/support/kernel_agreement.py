"""Do kernels compute what PyTorch's operations on slices do?"""

from __future__ import annotations

import torch

from objective_references import random_batch
from shared.objectives.fused import fused_divergence
from shared.objectives.kernels import TORCH, Kernels
from shared.objectives.plan import RowKind, RowPlan
from shared.objectives.signal import Dense, sparse_signal

_WITH_ALL = {"softcap": 1.5, "width": 13, "excluded_ids": torch.tensor([0, 7, 12])}


def assert_as_pytorchs_operations(kernels: Kernels) -> None:
    """Values and gradients of every kind, with and without what a head can have; and where a NaN goes."""
    _assert_equal(kernels, {}, torch.float32)
    _assert_equal(kernels, _WITH_ALL, torch.float64)
    _assert_equal(kernels, _WITH_ALL, torch.float32, sparse=True)
    assert kernels.rows is not None
    far = torch.tensor([[1e4, -1e4, 0, 0, 0]])
    lse, log_p = kernels.rows.log_sum_exp(far, torch.tensor([2]))
    torch.testing.assert_close(lse, far.logsumexp(-1))
    torch.testing.assert_close(log_p, torch.tensor([-1e4]))


def _assert_equal(kernels: Kernels, head: dict, dtype: torch.dtype, *, sparse: bool = False) -> None:
    hidden_ND, student_head, signal, rows = random_batch(pairs=2, dtype=dtype, **head).arguments
    count = len(rows.targets_N)
    assert count >= len(RowKind) and isinstance(signal, Dense)
    if sparse:
        signal = sparse_signal(signal, rows.targets_N, top_k=4)
    plan = RowPlan(
        torch.arange(count) % len(RowKind),
        torch.full((count,), 0.3, dtype=dtype),
        torch.linspace(-1, 1, count, dtype=dtype),
    )
    plan.parameter_N[::5] = 0
    plan.parameter_N[plan.kind_N == RowKind.JSD] = 0.3
    results = []
    for chosen in (kernels, TORCH):
        hidden, weight = (leaf.clone().requires_grad_() for leaf in (hidden_ND, student_head.weight_VD))
        trained_head = student_head._replace(weight_VD=weight)
        out = fused_divergence(hidden, trained_head, signal, plan, targets_N=rows.targets_N, kernels=chosen)
        results.append([*out, *torch.autograd.grad(out.total, [hidden, weight])])
    rtol, atol = (1e-4, 1e-5) if dtype is torch.float32 else (1e-9, 1e-11)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    broken_ND = hidden_ND.clone()
    broken_ND[3, 0] = float("nan")
    out = fused_divergence(broken_ND, student_head, signal, plan, targets_N=rows.targets_N, kernels=kernels)
    assert out.nats_N[3].isnan() and not out.nats_N[[0, 1, 2, 4]].isnan().any()
