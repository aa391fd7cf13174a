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
from shared.objectives.kernels import TORCH, kernels_for

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
