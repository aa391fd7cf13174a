from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from objective_references import random_batch
from shared.objectives import projection
from shared.objectives.core import objective_loss
from shared.objectives.head import Head
from shared.objectives.objective import build_objective
from shared.objectives.signal import Dense


def emulated_product(left: Tensor, right: Tensor, *, out: Tensor, add: bool = False) -> None:
    """What a GPU does: low-precision factors, float32 sums."""
    assert left.dtype == right.dtype == torch.bfloat16 and out.dtype == torch.float32
    torch.addmm(out, left.float(), right.float(), beta=int(add), out=out)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that multiplies bfloat16 natively."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return torch.device("cuda")
    monkeypatch.setattr(projection, "native_product", emulated_product)
    monkeypatch.setattr(projection, "multiplies_natively", lambda device, dtype: True)
    return torch.device("cpu")


def test_a_cpu_widens_low_precision_weights() -> None:
    assert not projection.multiplies_natively(torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize(
    "head", [{}, {"logit_scale": 0.3, "bias_V": torch.linspace(-2, 2, 19), "softcap": 3.0}]
)
@pytest.mark.parametrize("trained", [False, True])
def test_native_products_are_no_worse_than_the_plain_low_precision_loss(
    device: torch.device, head: dict[str, Any], trained: bool
) -> None:
    """Against the float64 truth for the same rounded inputs, beside logits that are rounded to bfloat16."""
    batch = random_batch(pairs=20, dtype=torch.float64, seed=1, **head)
    hidden, student_head, signal, rows = batch.arguments
    assert isinstance(signal, Dense)
    objective = build_objective("distillm2", {})

    def gradient(dtype: torch.dtype, rounded: bool) -> Tensor:
        def low(tensor: Tensor) -> Tensor:
            return tensor.bfloat16().to(dtype).to(device)

        def head_of(head: Head) -> Head:
            bias_V = None if head.bias_V is None else low(head.bias_V)
            return head._replace(weight_VD=low(head.weight_VD), bias_V=bias_V)

        leaf, student, teacher = low(hidden).requires_grad_(), head_of(student_head), head_of(signal.head)
        student.weight_VD.requires_grad_(trained)
        on_device = type(rows)(*(tensor.to(device) for tensor in rows))
        arguments = (leaf, student, Dense(low(signal.hidden_NE), teacher))
        if rounded:  # identity heads, so that the hidden states are the rounded logits
            logits = [
                (head.logits(h)).bfloat16() for head, h in ((student, leaf), (teacher, arguments[2][0]))
            ]
            eye = Head(torch.eye(19, device=device, dtype=torch.bfloat16))
            arguments = (logits[0], eye, Dense(logits[1].detach(), eye))
        output = objective_loss(
            objective, *arguments, on_device,
            alphas=lambda gap_R, cell_R: 0.1 + 0 * gap_R, beta=0.5, counts=batch.counts,
            backend="plain" if rounded or dtype == torch.float64 else "fused", buffer_bytes=40 * 19 * 4,
        )  # fmt: skip
        leaves = [leaf, *([student.weight_VD] if trained and not rounded else [])]
        return torch.autograd.grad(output.loss, leaves)[0].double().cpu()

    truth = gradient(torch.float64, rounded=False)
    plain_error = (gradient(torch.bfloat16, rounded=True) - truth).norm()
    native_error = (gradient(torch.bfloat16, rounded=False) - truth).norm()
    assert 0 < native_error <= plain_error
