from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.objectives import kernels as kernels_module
from shared.objectives.core import row_nats
from shared.objectives.fused import fused_divergence
from shared.objectives.head import Head
from shared.objectives.kernels import TORCH, kernels_for
from shared.objectives.plan import RowKind, RowPlan
from shared.objectives.signal import Dense

ROOT = Path(__file__).resolve().parents[3]
CUDA = torch.device("cuda", 0)


def test_a_cpu_uses_pytorchs_own_operations(caplog: pytest.LogCaptureFixture) -> None:
    assert kernels_for(torch.device("cpu")) is TORCH
    assert not caplog.records


@pytest.mark.parametrize("error", [ImportError("No module named 'triton'"), RuntimeError("no compiler\nat")])
def test_a_missing_compiler_costs_one_log_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Any:
        raise error

    monkeypatch.setattr(kernels_module, "triton_kernels", broken)
    kernels_for.cache_clear()
    with caplog.at_level(logging.INFO):
        assert kernels_for(CUDA) is kernels_for(CUDA) is TORCH
    kernels_for.cache_clear()
    (record,) = caplog.records
    assert "Triton does not work here" in record.message and "\n" not in record.message


INTERPRETED = """
import torch
from objective_references import random_batch
from shared.objectives.fused import fused_divergence
from shared.objectives import kernels, triton_kernels
from shared.objectives.plan import RowKind, RowPlan
from shared.objectives.signal import sparse_signal

triton_kernels.LARGEST_BLOCK = 8  # several blocks and a rest
HEADS = [{}, {"softcap": 1.5, "width": 13, "excluded_ids": torch.tensor([0, 7, 12])}]
cases = [
    (HEADS[0], torch.float32, "dense"),
    (HEADS[1], torch.float64, "dense"),
    (HEADS[1], torch.float32, "sparse"),
]
kernels._try(kernels.triton_kernels(), torch.device("cpu"))
for head, dtype, how in cases:
    batch = random_batch(pairs=2, dtype=dtype, **head)
    hidden, student_head, signal, rows = batch.arguments
    count = len(rows.targets_N)
    assert count >= len(RowKind)
    if how == "sparse":
        signal = sparse_signal(signal, rows.targets_N, top_k=4)
    plan = RowPlan(torch.arange(count) % len(RowKind), torch.full((count,), 0.3, dtype=dtype),
                   torch.linspace(-1, 1, count, dtype=dtype))
    plan.parameter_N[::5] = 0
    plan.parameter_N[plan.kind_N == RowKind.JSD] = 0.3
    results = []
    for chosen in (kernels.triton_kernels(), kernels.TORCH):
        leaf = hidden.clone().requires_grad_()
        weight = student_head.weight_VD.clone().requires_grad_()
        out = fused_divergence(leaf, student_head._replace(weight_VD=weight), signal, plan,
                               targets_N=rows.targets_N, kernels=chosen)
        results.append([out.total, *out[1:], *torch.autograd.grad(out.total, [leaf, weight])])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4 if dtype is torch.float32 else 1e-9,
                                   atol=1e-5 if dtype is torch.float32 else 1e-11)
    broken = hidden.clone()
    broken[3, 0] = float("nan")
    out = fused_divergence(broken, student_head, signal, plan, targets_N=rows.targets_N,
                           kernels=kernels.triton_kernels())
    assert out.nats_N[3].isnan() and not out.nats_N[[0, 1, 2, 4]].isnan().any()
scaled = torch.tensor([[1e4, -1e4, 0, 0, 0]])
lse, log_p = triton_kernels.log_sum_exp(scaled, torch.tensor([2]))
torch.testing.assert_close(lse, scaled.logsumexp(-1))
torch.testing.assert_close(log_p, torch.tensor([-1e4]))
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernels_are_pytorchs_operations_under_tritons_interpreter() -> None:
    """In a process of its own, because triton reads the setting when it is imported."""
    path = os.pathsep.join([str(ROOT / "tests" / "support"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0 and "equal" in result.stdout, result.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_uses_triton() -> None:
    assert kernels_for(CUDA).name == "triton"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rows_of_all_kinds_over_several_blocks_are_the_plain_loss_in_float64(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, vocabulary, width = 3 * len(RowKind), 5000, 16

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden_ND, weight_VD = normal(rows, width), normal(vocabulary, width)
    teacher_NE, teacher_VE = normal(rows, width), normal(vocabulary, width)
    targets_N = torch.randint(vocabulary, (rows,), generator=generator)
    plan = RowPlan(torch.arange(rows) % len(RowKind), torch.full((rows,), 0.3).double(), normal(rows))
    plan.parameter_N[: len(RowKind)][plan.kind_N[: len(RowKind)] != RowKind.JSD] = 0  # without skew

    leaves = [hidden_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()]
    student_NV, teacher_NV = leaves[0] @ leaves[1].T, teacher_NE @ teacher_VE.T
    expected_N = row_nats(student_NV, teacher_NV, targets_N, plan)
    expected = torch.autograd.grad((plan.weight_N * expected_N).sum(), leaves)

    def here(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.float() if tensor.is_floating_point() else tensor).to(device)

    ours = [here(hidden_ND).requires_grad_(), here(weight_VD).requires_grad_()]
    out = fused_divergence(
        ours[0],
        Head(ours[1]),
        Dense(here(teacher_NE), Head(here(teacher_VE))),
        RowPlan(*map(here, plan)),
        targets_N=here(targets_N),
    )
    torch.testing.assert_close(out.nats_N.cpu().double(), expected_N.detach(), rtol=1e-4, atol=1e-5)
    for found, truth in zip(torch.autograd.grad(out.total, ours), expected, strict=True):
        assert (found.cpu() - truth).norm() < 1e-4 * truth.norm()
