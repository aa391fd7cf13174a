"""What may a modality add to a run, beside reading its samples? Nothing, unless a configuration asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shared.data.pairs import Grouping


@dataclass(frozen=True)
class Additions:
    """Called by `Run` and `train_round` at their places."""

    screen: Callable[[Grouping], Grouping] = lambda grouping: grouping
    """Which of a round's groups are trained on; what it leaves out it adds to `dropped`."""

    settle: Callable[[], None] = lambda: None
    """Write what is held in memory; called after each stage."""

    notes: Sequence[str] = ()
    """What of it a person should know before the first round."""
