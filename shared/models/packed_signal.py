"""How is a sparse signal kept in few bytes? Ids in as few bits as the vocabulary needs, logs in 16.

Shapes in names: N rows of one response, J ids kept of a row, B bits of an id.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared.objectives.head import EXCLUDED_LOGIT
from shared.objectives.signal import Sparse

STEPS_PER_NAT = 2048  # a kept probability is off by 1/4096 of itself at most, before the sum is made good
IMPOSSIBLE = 2**16 - 1  # the code of an id that the shared vocabulary leaves out


class Packed(NamedTuple):
    """One response's signal."""

    ids: bytes  # N x J, `id_bits` each, the highest bit first
    log_p: bytes  # N x J unsigned 16-bit integers: -log p in steps
    target_log_p: bytes  # N float32
    log_tail: bytes  # N float32


def id_bits(vocabulary: int) -> int:
    """The bits that an id below `vocabulary` takes."""
    return max(1, (vocabulary - 1).bit_length())


def pack(sparse: Sparse, *, vocabulary: int) -> Packed:
    """A response's signal as bytes."""
    bits = id_bits(vocabulary)
    ids_NJ = sparse.ids_NJ.cpu().numpy()
    assert ids_NJ.size == 0 or (ids_NJ.min() >= 0 and ids_NJ.max() < vocabulary), "ids outside the vocabulary"
    bits_NJB = (ids_NJ[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    log_p_NJ = sparse.log_p_NJ.cpu().double().numpy()
    steps_NJ = np.rint(-log_p_NJ * STEPS_PER_NAT).clip(0, IMPOSSIBLE - 1)
    steps_NJ[log_p_NJ <= EXCLUDED_LOGIT / 2] = IMPOSSIBLE
    return Packed(
        np.packbits(bits_NJB.astype(np.uint8)).tobytes(),
        steps_NJ.astype("<u2").tobytes(),
        *(column.cpu().numpy().astype("<f4").tobytes() for column in sparse[2:]),
    )


def unpack(packed: Packed, *, vocabulary: int) -> Sparse:
    """The signal of `pack`, in float32; the kept probabilities are rounded and then made to sum up again.

    Raises:
        ValueError: bytes that `pack` would not have written.
    """
    bits = id_bits(vocabulary)
    target_log_p_N, log_tail_N = (_floats(column) for column in packed[2:])
    rows = len(log_tail_N)
    steps = np.frombuffer(packed.log_p, "<u2").astype(np.int64)
    if not rows or len(target_log_p_N) != rows or len(steps) % rows or not len(steps):
        raise ValueError("a packed signal with columns of unequal lengths")
    kept = len(steps) // rows
    if len(packed.ids) != math.ceil(rows * kept * bits / 8):
        raise ValueError("a packed signal with ids of another vocabulary's width")
    bits_NJB = np.unpackbits(np.frombuffer(packed.ids, np.uint8), count=rows * kept * bits)
    weight_B = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    ids_NJ = torch.from_numpy(bits_NJB.reshape(rows, kept, bits) @ weight_B)
    if int(ids_NJ.max()) >= vocabulary:
        raise ValueError("a packed signal with ids outside the vocabulary")
    log_p_NJ = torch.from_numpy(-steps.reshape(rows, kept) / STEPS_PER_NAT)
    log_p_NJ[torch.from_numpy(steps.reshape(rows, kept) == IMPOSSIBLE)] = EXCLUDED_LOGIT
    return Sparse(ids_NJ, log_p_NJ, target_log_p_N, log_tail_N)


def summing_to_one(sparse: Sparse, targets_N: Tensor) -> Sparse:
    """The kept log-probabilities shifted so that all outcomes of a row sum to 1, in float32."""
    own_N = sparse.target_log_p_N.double().exp().masked_fill(sparse.is_kept_N(targets_N), 0.0)
    mass_N = -torch.expm1(sparse.log_tail_N.double()) - own_N
    shift_N = mass_N.clamp_min(torch.finfo(torch.float32).tiny).log() - sparse.log_p_NJ.logsumexp(-1)
    return sparse._replace(log_p_NJ=(sparse.log_p_NJ + shift_N[:, None]).float())


def _floats(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32))
