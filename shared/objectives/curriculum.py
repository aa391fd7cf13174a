"""How hard is a response, and what follows from it? The curricula of α, by gap, and of β, by step.

A *cell* is one side of one task: `side_index * len(tasks) + task_index`.
Shapes in names: R responses, C cells.

Source: DistiLLM-2 (arXiv 2503.07067), section 3.3 and appendix; docs/OBJECTIVES.md says where this differs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from shared.errors import StoreError
from shared.objectives.objective import SIDES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BetaSchedule:
    """β over the optimiser steps: flat at `start`, then linear, then flat at `maximum`."""

    schedule: Literal["curriculum", "fixed"] = "curriculum"
    start: float = 0.5
    maximum: float = 1.0

    def value(self, step: int, total_steps: int) -> float:
        """max(start, min(step / total_steps, maximum)), or `start` where fixed."""
        if self.schedule == "fixed":
            return self.start
        return max(self.start, min(step / total_steps, self.maximum))


class AlphaCurriculum:
    """α of each response: small for an easy one, large for a hard one.

    The first round uses `start` and measures m, the mean gap of each cell. `end_round` freezes m, and from
    then on α = clip(1 − (1−start)·m/gap, minimum, maximum). Every process holds an equal copy, fed with sums
    over all of them.

    Args:
        schedule: "fixed" keeps `start` throughout; gaps are measured all the same.
        start: α of the first round.
        minimum: α of a response with gap <= 0, and the lower clip.
        maximum: the upper clip; at `start`, the paper's setting, α is nearly a switch at gap = m.
        per: "sample" uses each response's own gap, "batch" the cell's mean gap of the last step.
        tasks: the tasks of a mixture, each with its own m.
        start_C: where cells differ from `start`.
    """

    def __init__(
        self,
        *,
        schedule: Literal["curriculum", "fixed"] = "curriculum",
        start: float = 0.1,
        minimum: float = 0.01,
        maximum: float = 0.1,
        per: Literal["sample", "batch"] = "sample",
        tasks: Sequence[str] = ("instruction",),
        start_C: Sequence[float] | None = None,
    ) -> None:
        self.schedule = schedule
        self.start = start
        self.minimum = minimum
        self.maximum = maximum
        self.per = per
        self.tasks = tuple(tasks)
        self.cells = tuple(f"{side}/{task}" for side in SIDES for task in self.tasks)
        self._start_C = [start] * len(self.cells) if start_C is None else list(start_C)
        self._gap_sum_C = [0.0] * len(self.cells)
        self._count_C = [0.0] * len(self.cells)
        self._last_gap_C: list[float | None] = [None] * len(self.cells)
        self._mean_gap_C: list[float | None] | None = None  # m; None until the first round has ended

    @property
    def in_first_round(self) -> bool:
        """Whether m is still being measured."""
        return self._mean_gap_C is None

    @property
    def needs_own_gap(self) -> bool:
        """Whether α of a response can differ with that response's own gap now."""
        return self.schedule == "curriculum" and self.per == "sample" and not self.in_first_round

    @property
    def mean_gaps(self) -> dict[str, float]:
        """The frozen m by cell ("teacher/instruction") of cells with responses; empty in the first round."""
        if self._mean_gap_C is None:
            return {}
        return {cell: m for cell, m in zip(self.cells, self._mean_gap_C, strict=True) if m is not None}

    def alphas(self, gap_R: Tensor, cell_R: Tensor) -> Tensor:
        """alpha_R for responses with gap_R (probability, [-1, 1]) in cells cell_R; detached."""
        gap_R = gap_R.detach()
        start_R = _lookup(self._start_C, cell_R, like=gap_R)
        if self._mean_gap_C is None or self.schedule == "fixed":
            return start_R
        mean_R = _lookup(self._mean_gap_C, cell_R, like=gap_R)
        if self.per == "batch":
            gap_R = _lookup(self._last_gap_C, cell_R, like=gap_R)
        graded_R = 1 - (1 - start_R) * mean_R / gap_R  # gap 0 gives -inf, replaced below
        alpha_R = torch.where(gap_R > 0, graded_R.clamp(self.minimum, self.maximum), self.minimum)
        return torch.where(mean_R > 0, alpha_R, start_R)  # also start where m was never measured (NaN)

    def observe(self, gap_sum_C: Sequence[float] | Tensor, count_C: Sequence[float] | Tensor) -> None:
        """Take in one optimiser step: sums of gaps and numbers of responses by cell, over all processes."""
        gap_sums, counts = _floats(gap_sum_C), _floats(count_C)
        assert len(gap_sums) == len(counts) == len(self.cells), (len(gap_sums), len(counts), self.cells)
        for cell, (gap_sum, count) in enumerate(zip(gap_sums, counts, strict=True)):
            if count > 0:
                self._last_gap_C[cell] = gap_sum / count
                if self.in_first_round:
                    self._gap_sum_C[cell] += gap_sum
                    self._count_C[cell] += count

    def end_round(self) -> None:
        """Freeze m at the end of the first round; later rounds change nothing."""
        if not self.in_first_round:
            return
        self._mean_gap_C = [
            gap_sum / count if count > 0 else None
            for gap_sum, count in zip(self._gap_sum_C, self._count_C, strict=True)
        ]
        for cell, m in self.mean_gaps.items():
            if m <= 0 and self.schedule == "curriculum":
                logger.warning(
                    "the mean gap of %s responses is %.3g after the first round: nothing to grade by, "
                    "so alpha stays at %g there",
                    cell, m, self._start_C[self.cells.index(cell)],
                )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint needs, as plain JSON values."""
        return {
            "tasks": list(self.tasks),
            "gap_sum": list(self._gap_sum_C),
            "count": list(self._count_C),
            "last_gap": list(self._last_gap_C),
            "mean_gap": None if self._mean_gap_C is None else list(self._mean_gap_C),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            StoreError: it was written for other tasks.
        """
        if list(state["tasks"]) != list(self.tasks):
            raise StoreError(
                f"the checkpoint's curriculum is of tasks {list(state['tasks'])}, "
                f"this run's of {list(self.tasks)}. "
                f"Continue with the tasks it was written for, or start a new run."
            )
        self._gap_sum_C = list(state["gap_sum"])
        self._count_C = list(state["count"])
        self._last_gap_C = list(state["last_gap"])
        self._mean_gap_C = None if state["mean_gap"] is None else list(state["mean_gap"])


def _lookup(value_C: Sequence[float | None], cell_R: Tensor, *, like: Tensor) -> Tensor:
    known_C = [float("nan") if value is None else value for value in value_C]
    return torch.tensor(known_C, dtype=torch.float64).to(like)[cell_R]


def _floats(values: Sequence[float] | Tensor) -> list[float]:
    return values.tolist() if isinstance(values, Tensor) else [float(value) for value in values]
