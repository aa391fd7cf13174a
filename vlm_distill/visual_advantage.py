"""Which tokens of a response does the picture matter for? They count more: visual-advantage row weights.

A token that the teacher would have written without the picture teaches nothing about seeing. The weight of a
row is, with p the teacher,

    w_i ∝ 1 + κ · clip(log p(y_i | image, x) - log p(y_i | blank, x), 0, 5 nats)

with a mean of 1 over the rows of a response, so that a response counts as much as before and the gradient
does not depend on how a batch is split. The blank is a picture of the same size in the image processor's mean
colour, which is 0 after normalisation. Samples without a picture have weights of 1. It costs one more pass of
the teacher over the pairs that have one.

Source: of this project; comparing with a blank picture follows visual contrastive decoding (Leng et al. 2023,
arXiv 2311.16922), which compares with a noised one.

Shapes in names: N rows that predict response tokens, R responses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shared.errors import AlignmentError
from shared.objectives.signal import Dense, Signal, sparse_signal
from shared.types import Group, ImagePart, Message, Sample

if TYPE_CHECKING:
    from shared.models.teachers import LocalTeacher
    from shared.training.loop import Prepared

HIGHEST_NATS = 5.0


def advantage_weights(
    log_p_seen_N: Tensor, log_p_blank_N: Tensor, response_N: Tensor, *, kappa: float
) -> Tensor:
    """Weights with a mean of 1 over each response.

    Args:
        log_p_seen_N: the teacher's log-probability of each token beside the picture, nats.
        log_p_blank_N: beside the blank.
        response_N: 0 .. R-1, non-decreasing.
        kappa: above 0; the weight of a token that the picture makes e times as likely is 1 + kappa.
    """
    raw_N = 1 + kappa * (log_p_seen_N - log_p_blank_N).clamp(0.0, HIGHEST_NATS)
    sums_R = raw_N.new_zeros(int(response_N.max()) + 1 if len(response_N) else 0)
    means_R = sums_R.index_add(0, response_N, raw_N) / torch.bincount(response_N, minlength=len(sums_R))
    return raw_N / means_R[response_N]


class VisualAdvantage:
    """Row weights of a micro-batch, by the teacher with and without the pictures."""

    def __init__(self, teacher: LocalTeacher, blank: Callable[[str], str], *, kappa: float) -> None:
        """`blank` gives the reference of an empty picture of the same size."""
        self._teacher, self._blank, self._kappa = teacher, blank, kappa
        self._blanks: dict[str, str] = {}

    def __call__(self, batch: Prepared, signal: Signal) -> Tensor:
        """weights_N.

        Raises:
            AlignmentError: the blank takes another number of tokens than the picture.
        """
        rows = batch.rows
        seen = [index for index, group in enumerate(batch.groups) if group.sample.images]
        weights_N = torch.ones(len(rows.targets_N), device=rows.targets_N.device)
        if not seen:
            return weights_N
        owners_R = torch.tensor(
            [i for i, group in enumerate(batch.groups) for _ in group.responses], device=weights_N.device
        )
        shown_N = torch.isin(owners_R, torch.tensor(seen, device=weights_N.device))[rows.response_N]
        blank = self._teacher.signal([self._without(batch.groups[index]) for index in seen], None)
        targets_M = rows.targets_N[shown_N]
        if len(blank.hidden_NE) != len(targets_M):
            raise AlignmentError(
                f"samples {', '.join(batch.groups[i].sample.id for i in seen)}: with blank pictures their "
                f"responses have {len(blank.hidden_NE)} rows, with their own {len(targets_M)}."
            )
        log_p_blank_M = _log_p(blank, targets_M)
        _, response_M = rows.response_N[shown_N].unique_consecutive(return_inverse=True)
        assert isinstance(signal, Dense), "blank pictures are compared with a teacher that is asked as well"
        log_p_seen_M = _log_p(Dense(signal.hidden_NE[shown_N], signal.head), targets_M)
        found_M = advantage_weights(log_p_seen_M, log_p_blank_M, response_M, kappa=self._kappa)
        weights_N[shown_N] = found_M.to(weights_N)
        return weights_N

    def _without(self, group: Group) -> Group:
        """The group with blanks in the place of its pictures."""

        def blank(part: Any) -> Any:
            if not isinstance(part, ImagePart):
                return part
            if part.image not in self._blanks:
                self._blanks[part.image] = self._blank(part.image)
            return ImagePart(self._blanks[part.image])

        messages = tuple(Message(m.role, tuple(map(blank, m.parts))) for m in group.sample.messages)
        sample: Sample = replace(group.sample, messages=messages)
        return Group(sample, group.responses)


def _log_p(dense: Dense, targets_N: Tensor) -> Tensor:
    """The log-probability of each row's own token; never holds all logits."""
    return sparse_signal(dense, targets_N, top_k=1).target_log_p_N
