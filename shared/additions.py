"""What may a modality add to a run, beside reading its samples? Nothing, unless a configuration asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from shared.data.pairs import Grouping
    from shared.models.teachers import Signal
    from shared.training.auxiliary import AuxiliaryLoss
    from shared.training.loop import Prepared


@dataclass(frozen=True)
class Additions:
    """Called by `Run` and `train_round` at their places."""

    screen: Callable[[Grouping], Grouping] = lambda grouping: grouping
    """Which of a round's groups are trained on; what it leaves out it adds to `dropped`."""

    settle: Callable[[], None] = lambda: None
    """Write what is held in memory; called after each stage."""

    row_weights: Callable[[Prepared, Signal], Tensor] | None = None
    """weights_N of a micro-batch's rows, with a mean of 1 in each response, by the teacher."""

    auxiliary: AuxiliaryLoss | None = None
    """A loss beside the objective's."""

    @property
    def read_teacher(self) -> bool:
        """Whether training needs the teacher's signal, whatever the objective is."""
        return self.row_weights is not None or self.auxiliary is not None


NOTHING = Additions()
