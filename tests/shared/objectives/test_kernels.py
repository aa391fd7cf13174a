from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_agreement import assert_as_pytorchs_operations

from shared.objectives import kernels as kernels_module
from shared.objectives.core import row_nats
from shared.objectives.fused import fused_divergence
from shared.objectives.head import Head
from shared.objectives.kernels import TORCH, Kernels, compiled_kernels, kernels_for
from shared.objectives.plan import RowKind, RowPlan
from shared.objectives.signal import Dense

ROOT = Path(__file__).resolve().parents[3]
CUDA = torch.device("cuda", 0)


def test_a_cpu_uses_pytorchs_own_operations(caplog: pytest.LogCaptureFixture) -> None:
    assert kernels_for(torch.device("cpu")) is TORCH
    assert not caplog.records


def _broken(error: Exception) -> Any:
    def kernels() -> Any:
        raise error

    return kernels


@pytest.mark.parametrize("error", [ImportError("No module named 'triton'"), RuntimeError("no compiler\nat")])
@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_a_missing_compiler_costs_one_log_line(
    error: Exception, device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = (("torch.compile", _broken(error)),)
    monkeypatch.setattr(kernels_module, "_PREFERRED", {"cuda": (("Triton", _broken(error)), *compiler)})
    monkeypatch.setattr(kernels_module, "_ELSEWHERE", compiler)
    kernels_for.cache_clear()
    with caplog.at_level(logging.INFO):
        assert kernels_for(torch.device(device, 0)) is kernels_for(torch.device(device, 0)) is TORCH
    kernels_for.cache_clear()
    (record,) = caplog.records
    assert "torch.compile (" in record.message and "PyTorch's own operations" in record.message
    assert ("Triton (" in record.message) is (device == "cuda") and "\n" not in record.message


def test_what_compiles_takes_the_place_of_kernels_that_fail(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    eager = compiled_kernels("eager")
    preferred = (("Triton", _broken(RuntimeError("too old a device"))), ("torch.compile", lambda: eager))
    monkeypatch.setattr(kernels_module, "_PREFERRED", {"cpu": preferred})
    kernels_for.cache_clear()
    assert kernels_for(torch.device("cpu")) is eager
    kernels_for.cache_clear()
    (message,) = [record.message for record in caplog.records if record.name == kernels_module.__name__]
    assert message.endswith("Triton (RuntimeError: too old a device). The loss runs on torch.compile")


def test_every_kind_can_be_traced_for_a_compiler_and_is_what_pytorchs_operations_compute() -> None:
    assert_as_pytorchs_operations(compiled_kernels("eager"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler is installed")
def test_distillm2_compiled_is_the_plain_loss() -> None:
    """The other kinds compile as well, in a second or two each: `--slow`."""
    _assert_the_plain_loss("cpu", [RowKind.SKEW_KL, RowKind.SKEW_REVERSE_KL], compiled_kernels())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler is installed")
def test_every_kind_compiled_is_what_pytorchs_operations_compute() -> None:
    assert_as_pytorchs_operations(compiled_kernels())


INTERPRETED = """
import torch
from kernel_agreement import assert_as_pytorchs_operations
from shared.objectives import kernels, triton_kernels

triton_kernels.LARGEST_BLOCK = 8  # several blocks and a rest
kernels._try(kernels.triton_kernels(), torch.device("cpu"))
assert_as_pytorchs_operations(kernels.triton_kernels())
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
    _assert_the_plain_loss(device, list(RowKind))


def _assert_the_plain_loss(device: str, kinds: list[RowKind], kernels: Kernels | None = None) -> None:
    """In float64, of three rows of each kind; α of the first is 0."""
    generator = torch.Generator().manual_seed(0)
    rows, vocabulary, width = 3 * len(kinds), 5000, 16

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden_ND, weight_VD = normal(rows, width), normal(vocabulary, width)
    teacher_NE, teacher_VE = normal(rows, width), normal(vocabulary, width)
    targets_N = torch.randint(vocabulary, (rows,), generator=generator)
    plan = RowPlan(torch.tensor([*kinds] * 3), torch.full((rows,), 0.3).double(), normal(rows))
    plan.parameter_N[: len(kinds)][plan.kind_N[: len(kinds)] != RowKind.JSD] = 0  # without skew

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
        kernels=kernels,
    )
    torch.testing.assert_close(out.nats_N.cpu().double(), expected_N.detach(), rtol=1e-4, atol=1e-5)
    for found, truth in zip(torch.autograd.grad(out.total, ours), expected, strict=True):
        assert (found.cpu() - truth).norm() < 1e-4 * truth.norm()
