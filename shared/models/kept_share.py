"""How much of a divergence does a sparse signal of the teacher show? Measured, as it is a lower bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shared.models.teachers import Dense
from shared.objectives.fused import fused_divergence
from shared.objectives.plan import RowKind, RowPlan
from shared.objectives.signal import sparse_signal
from shared.types import Group, Role

MEASURED_KINDS: Mapping[Role, RowKind] = {
    "teacher": RowKind.SKEW_KL,
    "student": RowKind.SKEW_REVERSE_KL,
    "reference": RowKind.SKEW_KL,
}

DenseSignal = Callable[[Sequence[Group]], Dense]
"""A model's whole distribution at the response rows of some groups."""


class KeptShare(NamedTuple):
    """How much of a divergence a sparse signal shows, nats per token; it is a lower bound."""

    dense: float
    sparse: float

    @property
    def share(self) -> float:
        """Of the dense divergence, [0, 1]."""
        return self.sparse / self.dense if self.dense else 1.0


def kept_share(
    teacher: DenseSignal, student: DenseSignal, groups: Sequence[Group], *, top_k: int, alpha: float = 0.1
) -> dict[str, KeptShare]:
    """How much of the divergence between two dense models a top-k signal shows, by the response's role.

    Skew KL on teacher and reference responses, skew reverse KL on the student's own.
    """
    sums: dict[str, list[float]] = {}
    for group in groups:
        for response in group.responses:
            one = [Group(group.sample, (response,))]
            p, q = teacher(one), student(one)
            targets_N = torch.tensor(response.token_ids, device=p.hidden_NE.device)
            plan = _even_plan(MEASURED_KINDS[response.role], alpha, targets_N)
            with torch.no_grad():
                totals = [
                    float(fused_divergence(q.hidden_NE, q.head, signal, plan, targets_N=targets_N).total)
                    for signal in (p, sparse_signal(p, targets_N, top_k=top_k))
                ]
            entry = sums.setdefault(response.role, [0.0, 0.0, 0.0])
            for index, value in enumerate((*totals, float(len(targets_N)))):
                entry[index] += value
    return {role: KeptShare(dense / rows, sparse / rows) for role, (dense, sparse, rows) in sums.items()}


def _even_plan(kind: RowKind, alpha: float, targets_N: Tensor) -> RowPlan:
    ones_N = torch.ones(len(targets_N), device=targets_N.device)
    return RowPlan(torch.full_like(targets_N, int(kind)), alpha * ones_N, ones_N)
