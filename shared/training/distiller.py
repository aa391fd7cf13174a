"""The one module that gets wrapped: the student's backbone, its head and the loss core, in one `forward`.

DDP, FSDP and ZeRO hook the forward of the module that they wrap; whatever runs past it goes unsynchronised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from shared.models.heads import head_of, hidden_rows
from shared.models.teachers import Signal
from shared.models.vocabulary import SharedVocabulary
from shared.objectives.core import GlobalCounts, ObjectiveOutput, ResponseRows, objective_loss
from shared.objectives.objective import Objective
from shared.objectives.plan import Normalization, RowWeigher
from shared.objectives.signal import Dense
from shared.training.auxiliary import Beside


class Distiller(nn.Module):
    """Student and loss. Only response rows reach the head; the teacher stays outside, as a `Signal`."""

    def __init__(
        self, student: nn.Module, vocabulary: SharedVocabulary, *, normalization: Normalization
    ) -> None:
        super().__init__()
        self.student = student
        self._vocabulary = vocabulary
        self._normalization = normalization

    def train(self, mode: bool = True) -> Distiller:
        """As of any module, but statistics of batches stay what they are.

        A layer that normalised by its micro-batch would make the gradient depend on how a step is split.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        rows_N: Tensor,
        rows: ResponseRows,
        signal: Signal | None,
        *,
        objective: Objective,
        alphas: Callable[[Tensor, Tensor], Tensor],
        alpha_needs_gap: bool,
        beta: float,
        counts: GlobalCounts,
        row_weights_N: Tensor | None = None,
        row_weigher: RowWeigher | None = None,
        beside: Beside | None = None,
    ) -> ObjectiveOutput:
        """The micro-batch's share of the global batch's loss, and per-row statistics.

        `alpha_needs_gap` False spares long responses a second projection, where α is known beforehand.
        """
        if beside is not None:
            rows_N = torch.cat([rows_N, beside.activations.student_rows_X])
        hidden_ND = hidden_rows(self.student, inputs, rows_N)
        head = head_of(self.student, self._vocabulary)
        responses = len(rows.targets_N)
        output = objective_loss(
            objective,
            hidden_ND[:responses],
            head,
            signal,
            rows,
            alphas=alphas,
            alpha_needs_gap=alpha_needs_gap,
            beta=beta,
            counts=counts,
            normalization=self._normalization,
            row_weights_N=row_weights_N,
            row_weigher=row_weigher,
        )
        if beside is None:
            return output
        student = Dense(hidden_ND[responses:], head)
        share = beside.loss(student, beside.teacher, beside.activations.matches) / counts.pairs
        return output._replace(loss=output.loss + share, auxiliary=share.detach())
