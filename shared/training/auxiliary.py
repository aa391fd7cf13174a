"""What is a loss beside the objective's? One on other rows of the same two forward passes.

It declares which rows it needs of both models; they are computed with the response rows, so it costs no pass
of its own. A batch's loss is that of the objective plus the mean of the auxiliary one over the batch's pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from shared.objectives.signal import Dense, Signal
from shared.types import Encoded, Group


class Activations(NamedTuple):
    """Rows of a micro-batch, as indices into the flattened (B * T) positions of each model."""

    student_rows_X: Tensor
    teacher_rows_Y: Tensor
    matches: Any  # the loss's own: which of them belong together


class AuxiliaryLoss(Protocol):
    """Nothing of it may depend on how a batch is split into micro-batches."""

    def activations(self, groups: Sequence[Group], student: Encoded, teacher: Encoded) -> Activations:
        """The rows that the loss is about."""
        ...

    def __call__(self, student: Dense, teacher: Dense, matches: Any) -> Tensor:
        """A scalar, nats: the sum over the micro-batch's pairs, with a gradient for the student alone."""
        ...


class Beside(NamedTuple):
    """An auxiliary loss for one micro-batch, with the teacher's side of it."""

    loss: AuxiliaryLoss
    teacher: Dense
    activations: Activations


def split_rows(signal: Signal, last: int) -> tuple[Dense, Dense]:
    """A teacher's rows before the last ones, and these."""
    assert isinstance(signal, Dense), "an auxiliary loss needs the teacher's own hidden rows"
    first = len(signal.hidden_NE) - last
    return Dense(signal.hidden_NE[:first], signal.head), Dense(signal.hidden_NE[first:], signal.head)
