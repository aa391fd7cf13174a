"""How far apart are two models' next-token distributions, response by response?

Shapes in names: N rows that predict response tokens, V the shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shared.errors import AlignmentError
from shared.models.teachers import Dense, Teacher
from shared.types import Group, Response

CHUNK_BYTES = 256 << 20
LIVE_COPIES = 8  # of a chunk's (N, V) logits at a time: both models' and what is computed from them


class ResponseFigures(NamedTuple):
    """Means over one response's tokens; p is the teacher, q the model. In the order of `_row_figures`."""

    kl_teacher_model: float  # nats per token
    kl_model_teacher: float  # nats per token
    top1_agreement: float  # share of tokens where the likeliest token is the same
    expected_acceptance: float  # Σ min(p, q), the acceptance rate of speculative decoding (arXiv 2211.17192)
    nll_teacher: float  # nats per token of the response itself
    nll_model: float


@torch.no_grad()
def compare_distributions(
    teacher: Teacher, model: Teacher, groups: Sequence[Group], *, chunk_bytes: int = CHUNK_BYTES
) -> list[ResponseFigures]:
    """One forward pass of each model; a comparison for every response, in group order.

    Full logits exist for a few rows at a time: `chunk_bytes` bounds them and all that is computed from them.

    Raises:
        AlignmentError: the two signals have other rows than the responses have tokens, or other vocabularies,
            or a response has a token outside the shared one.
    """
    responses = [response for group in groups for response in group.responses]
    if not responses:
        return []
    p, q = teacher.signal(groups, None), model.signal(groups, None)
    assert isinstance(p, Dense) and isinstance(q, Dense), "a comparison needs whole distributions"
    _check_alignment(responses, p, q)
    targets_N = torch.tensor([token for r in responses for token in r.token_ids], device=p.hidden_NE.device)
    p.head.check_targets(targets_N)
    rows = _row_figures(p, q, targets_N, chunk_bytes)
    parts = rows.split([len(response.token_ids) for response in responses])
    return [ResponseFigures(*part.mean(dim=0).tolist()) for part in parts]


def _row_figures(p: Dense, q: Dense, targets_N: Tensor, chunk_bytes: int) -> Tensor:
    """The fields of `ResponseFigures` for every row, (N, 6), in float64 on the CPU."""
    p, q = _in_logits_dtype(p), _in_logits_dtype(q)
    chunk = max(1, chunk_bytes // (LIVE_COPIES * 4 * p.head.vocabulary_size))
    parts = []
    for first in range(0, len(targets_N), chunk):
        rows = slice(first, first + chunk)
        log_p_NV = p.head.logits(p.hidden_NE[rows]).log_softmax(dim=-1)
        log_q_NV = q.head.logits(q.hidden_NE[rows]).to(log_p_NV).log_softmax(dim=-1)
        p_NV, q_NV = log_p_NV.exp(), log_q_NV.exp()
        difference_NV = log_p_NV - log_q_NV
        targets_N1 = targets_N[rows, None]
        figures = (
            (p_NV * difference_NV).sum(-1).clamp_min(0),  # a divergence: below 0 is rounding
            -(q_NV * difference_NV).sum(-1).clamp_max(0),
            (log_p_NV.argmax(-1) == log_q_NV.argmax(-1)).to(log_p_NV),
            torch.minimum(p_NV, q_NV).sum(-1),
            -log_p_NV.gather(1, targets_N1)[:, 0],
            -log_q_NV.gather(1, targets_N1)[:, 0],
        )
        parts.append(torch.stack(figures, dim=1).double().cpu())
    return torch.cat(parts)


def _in_logits_dtype(signal: Dense) -> Dense:
    """Its head in the type that logits are computed in: converted once here, not for every chunk."""
    head = signal.head
    dtype = torch.promote_types(
        torch.float32, torch.promote_types(signal.hidden_NE.dtype, head.weight_VD.dtype)
    )
    head = head._replace(weight_VD=head.shared_weight_VD.to(dtype), bias_V=head.shared_bias_V, width=None)
    return signal._replace(head=head)


def _check_alignment(responses: Sequence[Response], p: Dense, q: Dense) -> None:
    tokens = sum(len(response.token_ids) for response in responses)
    counts = (p.hidden_NE.shape[0], q.hidden_NE.shape[0])
    if counts != (tokens, tokens):
        ids = ", ".join(response.sample_id for response in responses[:3])
        raise AlignmentError(
            f"samples {ids} ...: {tokens} response tokens, but {counts[0]} rows from the teacher and "
            f"{counts[1]} from the model. Each must give one row for every token: check the chat templates."
        )
    widths = (p.head.vocabulary_size, q.head.vocabulary_size)
    if widths[0] != widths[1] or _excluded_ids(p) != _excluded_ids(q):
        raise AlignmentError(
            f"the teacher's head gives {widths[0]} ids and the model's {widths[1]}, or they exclude "
            f"different ones. Open both with the vocabulary that they share."
        )


def _excluded_ids(signal: Dense) -> list[int]:
    ids = signal.head.excluded_ids
    return [] if ids is None else sorted(ids.tolist())
