"""Is a model's distance to itself 0, along every path that a run takes?

The same model reads responses as a run does (padded, in the layout in use, under mixed precision) and each
of them alone; then KL(alone ‖ as the run reads it) is taken by the fused loss and by the plain one. A wrong
mask, position, image or head is nats away; rounding is not.

Shapes in names: N rows that predict response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shared.adapter import Adapter
from shared.models.heads import causal_lm_of, head_of, hidden_rows
from shared.models.vocabulary import SharedVocabulary
from shared.objectives.core import row_nats
from shared.objectives.fused import fused_divergence
from shared.objectives.plan import RowKind, RowPlan
from shared.objectives.signal import Dense
from shared.types import Encoded, Group, Layout

# Nats a token. bfloat16 rounds hidden states by a per cent or two (`models.layout_support`), so logits of a
# spread of 10 move by 0.2, whose half square is 0.02.
ALLOWED_NATS = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}


class Distance(NamedTuple):
    """One path of one model."""

    layout: Layout
    backend: str
    nats: float  # mean over the rows
    allowed: float

    @property
    def is_zero(self) -> bool:
        """Up to rounding."""
        return self.nats <= self.allowed  # False for NaN


@torch.no_grad()
def distances_to_itself(
    model: nn.Module,
    adapter: Adapter,
    vocabulary: SharedVocabulary,
    groups: Sequence[Group],
    layout: Layout,
    *,
    precision: AbstractContextManager[object],
    dtype: torch.dtype,
) -> list[Distance]:
    """The distance by both backends.

    Args:
        model: as the run uses it.
        adapter: its own.
        vocabulary: what the loss is taken over.
        groups: read together, as a micro-batch.
        layout: of the micro-batch.
        precision: of the forward passes, entered once.
        dtype: in which they compute; says what rounding may do.
    """
    was_training = model.training
    model.eval()
    try:
        with precision:
            encoded = adapter.encode(groups, layout=layout)
            in_use_ND = _hidden(model, encoded)
            alone = [
                adapter.encode([Group(group.sample, (response,))], layout="separate")
                for group in groups
                for response in group.responses
            ]
            alone_ND = torch.cat([_hidden(model, one) for one in alone])
            head = head_of(model, vocabulary)
            device, rows = in_use_ND.device, len(in_use_ND)
            targets_N = encoded.target_ids_N.to(device)
            plan = RowPlan(
                kind_N=torch.full((rows,), int(RowKind.KL), device=device),
                parameter_N=torch.zeros(rows, device=device),
                weight_N=torch.full((rows,), 1.0 / rows, device=device),
            )
            fused = fused_divergence(in_use_ND, head, Dense(alone_ND, head), plan, targets_N=targets_N).total
            plain = row_nats(head.logits(in_use_ND), head.logits(alone_ND), targets_N, plan).mean()
    finally:
        model.train(was_training)
    allowed = ALLOWED_NATS[dtype]
    return [
        Distance(layout, name, abs(float(nats)), allowed)
        for name, nats in (("fused", fused), ("plain", plain))
    ]


def _hidden(model: nn.Module, encoded: Encoded) -> Tensor:
    device = next(causal_lm_of(model).parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in encoded.inputs.items()}
    return hidden_rows(model, inputs, encoded.rows_N.to(device))
