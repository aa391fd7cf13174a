"""Independent references of the divergences, in probability space and float64, and random batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shared.objectives.core import GlobalCounts, ResponseRows
from shared.objectives.head import Head
from shared.objectives.objective import SIDES
from shared.objectives.signal import Dense

DIVERGENCE_CASES: list[tuple[str, dict[str, Any]]] = [
    ("kl", {}),
    ("reverse_kl", {}),
    ("skew_kl", {"alpha": 0.1}),
    ("skew_kl", {"alpha": 0.7}),
    ("skew_reverse_kl", {"alpha": 0.1}),
    ("skew_reverse_kl", {"alpha": 0.7}),
    ("skew_reverse_kl", {"alpha": 0.1, "detach_mixture": True}),
    ("jsd", {"omega": 0.5}),
    ("jsd", {"omega": 0.9}),
    ("tvd", {}),
]
DIVERGENCE_IDS = [" ".join([name, *map(str, parameters.values())]) for name, parameters in DIVERGENCE_CASES]


def reference_nats(name: str, student_NV: Tensor, teacher_NV: Tensor, **parameters: Any) -> Tensor:
    """A divergence by its definition; good for moderate logits only."""
    q, p = student_NV.softmax(-1), teacher_NV.softmax(-1)
    a, w = parameters.get("alpha", 0.0), parameters.get("omega", 0.5)

    def relative_entropy(left: Tensor, right: Tensor) -> Tensor:
        return (left * torch.log(left / right)).sum(-1)

    if name == "skew_reverse_kl" and parameters.get("detach_mixture"):
        return relative_entropy(q, ((1 - a) * p + a * q).detach())
    return {
        "kl": lambda: relative_entropy(p, q),
        "reverse_kl": lambda: relative_entropy(q, p),
        "skew_kl": lambda: relative_entropy(p, a * p + (1 - a) * q),
        "skew_reverse_kl": lambda: relative_entropy(q, (1 - a) * p + a * q),
        "jsd": lambda: (
            w * relative_entropy(p, w * p + (1 - w) * q) + (1 - w) * relative_entropy(q, w * p + (1 - w) * q)
        ),
        "tvd": lambda: (p - q).abs().sum(-1) / 2,
    }[name]()


def reference_gradient(name: str, student_NV: Tensor, teacher_NV: Tensor, **parameters: Any) -> Tensor:
    """∂ nats / ∂ student logits in closed form: q ⊙ (r − ⟨q, r⟩) with r = ∂ nats / ∂q."""
    q, p = student_NV.softmax(-1), teacher_NV.softmax(-1)
    a, w = parameters.get("alpha", 0.0), parameters.get("omega", 0.5)
    if name == "jsd":
        m = w * p + (1 - w) * q
        r = -w * (1 - w) * p / m + (1 - w) * (torch.log(q / m) + 1 - (1 - w) * q / m)
    elif name == "tvd":
        r = torch.sign(q - p) / 2
    elif name in ("kl", "skew_kl"):
        r = -(1 - a) * p / (a * p + (1 - a) * q)
    else:
        m = (1 - a) * p + a * q
        r = torch.log(q / m) + 1 - (0 if parameters.get("detach_mixture") else a * q / m)
    return q * (r - (q * r).sum(-1, keepdim=True))


class Batch(NamedTuple):
    """Random hidden states, heads and responses of unequal lengths."""

    student_hidden_ND: Tensor
    student_head: Head
    teacher_hidden_NE: Tensor
    teacher_head: Head
    rows: ResponseRows

    @property
    def arguments(self) -> tuple[Tensor, Head, Dense, ResponseRows]:
        """What `objective_loss` gets of it."""
        signal = Dense(self.teacher_hidden_NE, self.teacher_head)
        return self.student_hidden_ND, self.student_head, signal, self.rows

    @property
    def counts(self) -> GlobalCounts:
        """As if this were the global batch."""
        side_N = self.rows.side_R[self.rows.response_N]
        by_side = [float((side_N == side).sum()) for side in range(len(SIDES))]
        return GlobalCounts(float(len(self.rows.pair_R.unique())), (by_side[0], by_side[1], by_side[2]))

    def of_pairs(self, pairs: Sequence[int]) -> Batch:
        """The micro-batch of some pairs, in the given order."""
        chosen = [r for pair in pairs for r in (self.rows.pair_R == pair).nonzero().flatten().tolist()]
        row_lists = [(self.rows.response_N == r).nonzero().flatten() for r in chosen]
        index_N = torch.cat(row_lists) if row_lists else torch.zeros(0, dtype=torch.long)
        lengths = torch.tensor([len(rows) for rows in row_lists], dtype=torch.long)
        rows = ResponseRows(
            self.rows.targets_N[index_N],
            torch.repeat_interleave(torch.arange(len(chosen)), lengths),
            self.rows.side_R[chosen],
            self.rows.pair_R[chosen],
            self.rows.cell_R[chosen],
        )
        return self._replace(
            student_hidden_ND=self.student_hidden_ND[index_N],
            teacher_hidden_NE=self.teacher_hidden_NE[index_N],
            rows=rows,
        )


def random_batch(
    *,
    pairs: int = 4,
    sides: Sequence[str] = ("teacher", "student"),
    vocabulary: int = 19,
    student_width: int = 6,
    teacher_width: int = 8,
    longest: int = 7,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    scale: float = 1.5,
    **head: Any,
) -> Batch:
    """Pairs with responses of 1 to `longest` tokens; `head` goes to both heads."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    responses = pairs * len(sides)
    lengths = torch.randint(1, longest + 1, (responses,), generator=generator)
    rows = int(lengths.sum())
    side_R = torch.tensor([SIDES.index(side) for side in sides] * pairs)  # type: ignore[arg-type]
    width = head.get("width") or vocabulary
    excluded = head.get("excluded_ids")
    allowed = [i for i in range(width) if excluded is None or i not in excluded.tolist()]
    targets_N = torch.tensor(allowed)[torch.randint(len(allowed), (rows,), generator=generator)]
    return Batch(
        student_hidden_ND=normal(rows, student_width).to(dtype),
        student_head=Head((normal(vocabulary, student_width) * scale / student_width**0.5).to(dtype), **head),
        teacher_hidden_NE=normal(rows, teacher_width).to(dtype),
        teacher_head=Head((normal(vocabulary, teacher_width) * scale / teacher_width**0.5).to(dtype), **head),
        rows=ResponseRows(
            targets_N=targets_N,
            response_N=torch.repeat_interleave(torch.arange(responses), lengths),
            side_R=side_R,
            pair_R=torch.arange(pairs).repeat_interleave(len(sides)),
            cell_R=side_R,
        ),
    )
