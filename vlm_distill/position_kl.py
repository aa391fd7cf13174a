"""Does the student read its image tokens as the teacher reads the same places? KL at vision positions.

At every image token a language model predicts something too. With i a cell of the student's picture, j one of
the teacher's, p and q their distributions there over the shared vocabulary, a sample's loss is

    weight · mean over i of Σ_j w_ij KL(p_j ‖ q_i)

`grid`: w_ij is the share of cell i's area that cell j covers: the same cell on equal grids, pooled ones where
the teacher's is finer. The gradient is that of KL(Σ_j w_ij p_j ‖ q_i); the two differ by a constant.
`hungarian`: pairs, one cell of each, with the smallest sum of KL; of the larger grid some are left over.

Only the whole picture counts where a model also reads tiles of it, and marks that end its rows do not. Image
placeholders are no part of the shared vocabulary, so what is compared is everything else.
Source: KL on the visual tokens' logits is a part of LLaVA-KD (Cai et al. 2024, arXiv 2410.16236, "MDist"),
for equal numbers of tokens; the matching is of this project.

Shapes in names: X image tokens of the student's micro-batch, Y of the teacher's, M matches, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from shared.objectives.fused import fused_divergence, loss_dtype
from shared.objectives.plan import RowKind, RowPlan
from shared.objectives.signal import Dense
from shared.training.auxiliary import Activations
from shared.types import Encoded, Group, Sample
from vlm_distill.assignment import cheapest_assignment
from vlm_distill.families import Cell

if TYPE_CHECKING:
    from vlm_distill.adapter import VlmAdapter

REMEMBERED_SAMPLES, REMEMBERED_GRIDS = 1024, 16
Matching = Literal["grid", "hungarian"]
Places = list[tuple[int, Cell]]  # positions in a prompt, and what they show


class PictureMatch(NamedTuple):
    """One picture's tokens among the micro-batch's."""

    student: slice
    teacher: slice
    shares_XY: Tensor | None  # w_ij; None where it is found by distributions
    weight: float  # of the picture in its sample


class PositionKL:
    """An `AuxiliaryLoss`."""

    def __init__(
        self, student: VlmAdapter, teacher: VlmAdapter, *, weight: float, matching: Matching = "grid"
    ) -> None:
        self._adapters, self._weight, self._matching = (student, teacher), weight, matching
        # whose image a token is, among several, a processor has to tell
        self._places = lru_cache(REMEMBERED_SAMPLES)(self._look_up)

    def activations(self, groups: Sequence[Group], student: Encoded, teacher: Encoded) -> Activations:
        """Each picture's tokens, once a group."""
        rows: tuple[list[int], list[int]] = ([], [])
        matches: list[PictureMatch] = []
        for index, group in enumerate(groups):
            starts = [_first_position(groups, index, encoded) for encoded in (student, teacher)]
            seen = self._places(group.sample)
            total = sum(map(len, seen[0]))
            for ours, theirs in zip(*seen, strict=True):
                slices: list[slice] = []
                for model, places in enumerate((ours, theirs)):
                    begin = len(rows[model])
                    rows[model].extend(starts[model] + position for position, _ in places)
                    slices.append(slice(begin, len(rows[model])))
                cells = (tuple(cell for _, cell in places) for places in (ours, theirs))
                shares = area_shares(*cells) if self._matching == "grid" else None
                student_tokens, teacher_tokens = slices
                matches.append(PictureMatch(student_tokens, teacher_tokens, shares, len(ours) / total))
        device = student.rows_N.device
        ours_P, theirs_P = (torch.tensor(r, dtype=torch.long, device=device) for r in rows)
        return Activations(ours_P, theirs_P, matches)

    def __call__(self, student: Dense, teacher: Dense, matches: Sequence[PictureMatch]) -> Tensor:
        """The sum over the micro-batch's samples."""
        found = []
        for match in matches:
            shares_XY = match.shares_XY
            if shares_XY is None:
                shares_XY = _assigned(
                    Dense(student.hidden_NE[match.student], student.head),
                    Dense(teacher.hidden_NE[match.teacher], teacher.head),
                )
            x_M, y_M = shares_XY.nonzero(as_tuple=True)
            weight_M = shares_XY[x_M, y_M] * (match.weight / shares_XY.sum())
            found.append((x_M + match.student.start, y_M + match.teacher.start, weight_M))
        if not found:
            return student.hidden_NE.sum() * 0
        device = student.hidden_NE.device
        x_M, y_M, weight_M = (torch.cat(parts).to(device) for parts in zip(*found, strict=True))
        signal = Dense(teacher.hidden_NE[y_M], teacher.head)
        hidden_MD = student.hidden_NE[x_M]
        dtype = loss_dtype(hidden_MD, student.head, signal)
        plan = RowPlan(
            torch.full_like(x_M, int(RowKind.KL)),
            torch.zeros_like(x_M, dtype=dtype),
            self._weight * weight_M.to(dtype),
        )
        # no token is predicted here, so any serves as the target
        return fused_divergence(hidden_MD, student.head, signal, plan, targets_N=torch.zeros_like(x_M)).total

    def _look_up(self, sample: Sample) -> tuple[list[Places], list[Places]]:
        student, teacher = (_whole_pictures(adapter.image_places(sample)) for adapter in self._adapters)
        return student, teacher


@lru_cache(REMEMBERED_GRIDS)
def area_shares(ours: tuple[Cell, ...], theirs: tuple[Cell, ...]) -> Tensor:
    """w_XY: which share of each of our cells each of theirs covers; rows add up to 1."""
    (our_rows, our_columns), (their_rows, their_columns) = _size(ours), _size(theirs)
    by_row, by_column = _overlap(our_rows, their_rows), _overlap(our_columns, their_columns)
    ours_at = torch.tensor([(cell.row, cell.column) for cell in ours])
    theirs_at = torch.tensor([(cell.row, cell.column) for cell in theirs])
    rows_XY = by_row[ours_at[:, :1], theirs_at[None, :, 0]]
    return rows_XY * by_column[ours_at[:, 1:], theirs_at[None, :, 1]]


def _overlap(ours: int, theirs: int) -> Tensor:
    """Which share of each of `ours` equal parts of a line each of `theirs` covers, in float64."""
    ours_from = torch.arange(ours, dtype=torch.float64)[:, None] / ours
    theirs_from = torch.arange(theirs, dtype=torch.float64)[None] / theirs
    ends = torch.minimum(ours_from + 1 / ours, theirs_from + 1 / theirs)
    share = (ends - torch.maximum(ours_from, theirs_from)).clamp(min=0) * ours
    return torch.where(share > 1e-9, share, 0.0)  # neighbours that only touch


def _size(cells: Sequence[Cell]) -> tuple[int, int]:
    return max(cell.row for cell in cells) + 1, max(cell.column for cell in cells) + 1


@torch.no_grad()
def _assigned(student: Dense, teacher: Dense) -> Tensor:
    """1 where two cells are matched, by the smallest sum of KL(p_j ‖ q_i)."""
    log_q_XV = student.head.logits(student.hidden_NE).double().log_softmax(-1)
    log_p_YV = teacher.head.logits(teacher.hidden_NE).double().log_softmax(-1)
    p_YV = log_p_YV.exp()
    cost_XY = torch.special.xlogy(p_YV, p_YV).sum(-1) - log_q_XV @ p_YV.T
    shares_XY = torch.zeros_like(cost_XY)
    for x, y in cheapest_assignment(cost_XY.cpu().numpy()):
        shares_XY[x, y] = 1.0
    return shares_XY


def _whole_pictures(images: Sequence[Places]) -> list[Places]:
    return [
        [(at, cell) for at, cell in places if cell.tile == 0 and not cell.is_separator] for places in images
    ]


def _first_position(groups: Sequence[Group], index: int, encoded: Encoded) -> int:
    """Where a group's prompt begins for the first time, in the flattened positions."""
    sequences, length = encoded.inputs["input_ids"].shape
    if sequences == len(groups):  # one each
        return index * length
    return sum(len(group.responses) for group in groups[:index]) * length
