"""What does a teacher give the loss? All of its distribution, or the most of it in a few numbers per row.

Shapes in names: N rows that predict response tokens, E width of the teacher's hidden states, J ids kept of a
row, O = J + 2 outcomes of a row, V ids of the shared vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shared.objectives.chunks import chunk_sizes, even_chunks, slices
from shared.objectives.closed_form import Scratch, log_sum_exp
from shared.objectives.head import EXCLUDED_LOGIT, Head, exact_dtype
from shared.objectives.projection import Projection


class Dense(NamedTuple):
    """All of the teacher's distribution, as hidden rows and the head that turns them into logits."""

    hidden_NE: Tensor
    head: Head


class Sparse(NamedTuple):
    """The likeliest tokens of each row, the row's own token, and all else as one outcome.

    Every divergence over these outcomes is a lower bound of the one over the vocabulary (it is an
    f-divergence, and outcomes are merged), and equals it where all ids are kept. Inside the merged tail the
    student's gradient only rescales what the student has.
    """

    ids_NJ: Tensor  # distinct ids of the shared vocabulary
    log_p_NJ: Tensor  # nats, in the type of the loss
    target_log_p_N: Tensor  # of the row's own token, kept or not
    log_tail_N: Tensor  # of all that is neither kept nor the row's own token

    @property
    def covered_N(self) -> Tensor:
        """The probability that is not in the tail, [0, 1]."""
        return -torch.expm1(self.log_tail_N)

    def is_kept_N(self, targets_N: Tensor) -> Tensor:
        """Whether a row's own token is among its kept ids, so no outcome of its own."""
        return (self.ids_NJ == targets_N[:, None]).any(-1)

    def log_p_NO(self, targets_N: Tensor) -> Tensor:
        """Log-probabilities of the outcomes: kept ids, the own token where it is not kept, the tail."""
        own_N = self.target_log_p_N.masked_fill(self.is_kept_N(targets_N), EXCLUDED_LOGIT)
        return torch.cat([self.log_p_NJ, own_N[:, None], self.log_tail_N[:, None]], dim=-1)


Signal = Dense | Sparse


@torch.no_grad()
def sparse_signal(dense: Dense, targets_N: Tensor, *, top_k: int, buffer_bytes: int | None = None) -> Sparse:
    """What remains of a dense signal with `top_k` ids a row; never holds all logits.

    Args:
        dense: hidden rows and head.
        targets_N: the token that each row predicts, inside the shared vocabulary.
        top_k: ids to keep; all of them where the vocabulary has no more.
        buffer_bytes: as for `fused.fused_divergence`.
    """
    hidden_NE, head = dense
    rows, vocabulary = len(targets_N), head.vocabulary_size
    dtype = exact_dtype(hidden_NE, head.weight_VD)
    kept = min(top_k, vocabulary)
    sizes = chunk_sizes(
        rows,
        vocabulary * dtype.itemsize,
        models=1,
        intermediates=1,
        on_cpu=hidden_NE.device.type == "cpu",
        buffer_bytes=buffer_bytes,
    )
    ids_NJ = targets_N.new_empty(rows, kept)
    log_p_NJ = hidden_NE.new_empty(rows, kept, dtype=dtype)
    target_log_p_N, log_tail_N = (hidden_NE.new_empty(rows, dtype=dtype) for _ in range(2))
    with torch.autocast(hidden_NE.device.type, enabled=False):
        projection = Projection(hidden_NE, head, rows=sizes.chunk, dtype=dtype)
        room_KV = hidden_NE.new_empty(sizes.slice, vocabulary, dtype=dtype)
        scratch = Scratch(room_KV, room_KV, room_KV, None)
        for chunk in even_chunks(0, rows, sizes.chunk):
            logits_CV = projection.logits(*chunk)
            for first, last in slices(0, chunk.stop - chunk.start, sizes.slice):
                these = slice(chunk.start + first, chunk.start + last)
                logits_KV, targets_K1 = logits_CV[first:last], targets_N[these, None]
                lse_K1 = log_sum_exp(logits_KV, scratch)[:, None]
                top = logits_KV.topk(kept, dim=-1)
                ids_NJ[these] = top.indices
                log_p_NJ[these] = top.values - lse_K1
                target_log_p_N[these] = (logits_KV.gather(1, targets_K1) - lse_K1).squeeze(1)
                logits_KV.scatter_(1, top.indices, EXCLUDED_LOGIT).scatter_(1, targets_K1, EXCLUDED_LOGIT)
                # 1 less the others would be rounding alone where they are nearly all
                log_tail_N[these] = log_sum_exp(logits_KV, scratch) - lse_K1.squeeze(1)
    return Sparse(ids_NJ, log_p_NJ, target_log_p_N, log_tail_N)
