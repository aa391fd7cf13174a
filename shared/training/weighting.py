"""What do rows and responses of a training count beside each other? Segments, tasks and the coupling table.

Weights of responses are known before a forward pass: from counts of the round and gaps of earlier steps.
Weights by segment come with the log-probabilities of the response itself.

Shapes in names: N rows, C cells (`shared.objectives.coupling`), K tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shared.config_objective import ObjectiveConfig
from shared.data.segments import BY_TASK, segment_ids
from shared.objectives.core import ResponseRows
from shared.objectives.coupling import cell_weights
from shared.objectives.objective import SIDES
from shared.objectives.row_weights import RowWeights, TaskGaps, task_weights
from shared.types import Group, TaskName

Decode = Callable[[Sequence[int]], str]


class Weighting:
    """The weights of one run; the gaps of its tasks are part of a checkpoint."""

    def __init__(self, config: ObjectiveConfig, tasks: Sequence[TaskName]) -> None:
        """`tasks` are those of all prompts, in the order of the cells."""
        self._weights, self._by_row = config.row_weights, config.normalization == "token"
        self._tasks = tuple(tasks)
        entries = config.cells(tasks)
        self._given_C = [entry.weight for entry in entries]
        default_C = [BY_TASK[task] for task in tasks] * len(SIDES)
        self._segmenter_C = [e.segmenter or d for e, d in zip(entries, default_C, strict=True)]
        settings = self._weights.tasks
        self._gaps = None if settings is None else TaskGaps(tasks, momentum=settings.momentum)
        self._count_C = [1.0] * len(entries)

    def begin_round(self, groups: Sequence[Group]) -> None:
        """Count what the weights have a mean of 1 over: the round's responses, or rows under `token`."""
        count_C = [0.0] * len(self._given_C)
        for group in groups:
            for response in group.responses:
                cell = SIDES.index(response.role) * len(self._tasks) + self._tasks.index(group.sample.task)
                count_C[cell] += len(response.token_ids) if self._by_row else 1.0
        self._count_C = count_C

    @property
    def weight_K(self) -> list[float] | None:
        """Of each task, by its gaps so far; None where that is switched off."""
        settings = self._weights.tasks
        if settings is None or self._gaps is None:
            return None
        width = len(self._tasks)
        shares_K = [sum(self._count_C[task::width]) for task in range(width)]
        return task_weights(
            self._gaps.gap_K, gamma=settings.gamma, epsilon=settings.epsilon, shares_K=shares_K
        )

    def of_responses(self, rows: ResponseRows) -> Tensor | None:
        """weights_N by cell, the same for all rows of a response; None where all are 1."""
        weight_C, weight_K = self._given_C, self.weight_K
        if weight_K is None and set(weight_C) == {1.0}:
            return None
        by_task_C = (weight_K or [1.0] * len(self._tasks)) * len(SIDES)
        weight_C = cell_weights([w * k for w, k in zip(weight_C, by_task_C, strict=True)], self._count_C)
        return rows.cell_R.new_tensor(weight_C, dtype=torch.float64)[rows.cell_R][rows.response_N]

    def within_responses(
        self, groups: Sequence[Group], rows: ResponseRows, decode: Decode, inner_N: Tensor | None
    ) -> RowWeights | None:
        """The weigher by segments, with given weights of rows multiplied in; None at level `token`."""
        if self._weights.level == "token":
            return None
        responses = [response for group in groups for response in group.responses]
        parts = [
            part
            for response, cell in zip(responses, rows.cell_R.tolist(), strict=True)
            for part in segment_ids(response.token_ids, decode, self._segmenter_C[cell])
        ]
        part_N = rows.response_N.new_tensor(parts)
        tau = math.inf if self._weights.tau is None else self._weights.tau
        return RowWeights(rows.response_N, rows.side_R, part_N, self._weights.level, tau, inner_N)

    def observe(self, gap_sum_C: Tensor, count_C: Tensor) -> dict[str, float]:
        """Take in one optimiser step over all processes; the tasks' weights in that step, for the log."""
        if self._gaps is None:
            return {}
        weights = {f"train/weight_{t}": w for t, w in zip(self._tasks, self.weight_K or (), strict=True)}
        by_task = (len(SIDES), len(self._tasks))
        self._gaps.observe(gap_sum_C.view(by_task).sum(0).tolist(), count_C.view(by_task).sum(0).tolist())
        return weights

    def state_dict(self) -> dict[str, Any] | None:
        """As plain JSON values."""
        return None if self._gaps is None else self._gaps.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continue from a checkpoint."""
        if self._gaps is not None and state is not None:
            self._gaps.load_state_dict(state)
