from __future__ import annotations

import pytest
import torch

from shared.models.packed_signal import Packed, id_bits, pack, summing_to_one, unpack
from shared.objectives.head import EXCLUDED_LOGIT, Head
from shared.objectives.signal import Dense, sparse_signal


def signal_of(rows: int, vocabulary: int, top_k: int, *, scale: float = 3.0, seed: int = 0, **head):
    generator = torch.Generator().manual_seed(seed)
    hidden_NE = torch.randn(rows, 8, generator=generator)
    weight_VE = torch.randn(vocabulary, 8, generator=generator) * scale
    targets_N = torch.randint(1, vocabulary, (rows,), generator=generator)
    return sparse_signal(Dense(hidden_NE, Head(weight_VE, **head)), targets_N, top_k=top_k), targets_N


@pytest.mark.parametrize(
    ("vocabulary", "bits"), [(1, 1), (2, 1), (3, 2), (256, 8), (257, 9), (49_152, 16), (151_936, 18)]
)
def test_ids_take_as_few_bits_as_the_vocabulary_needs(vocabulary, bits):
    assert id_bits(vocabulary) == bits


@pytest.mark.parametrize("vocabulary", [2, 5, 257, 70_000])
@pytest.mark.parametrize("rows", [1, 7])
def test_a_signal_survives_packing(rows, vocabulary):
    sparse, targets_N = signal_of(rows, vocabulary, 5)
    packed = pack(sparse, vocabulary=vocabulary)
    kept = sparse.ids_NJ.shape[1]
    assert len(packed.ids) == -(-rows * kept * id_bits(vocabulary) // 8)
    assert len(packed.log_p) == 2 * rows * kept
    back = summing_to_one(unpack(packed, vocabulary=vocabulary), targets_N)
    assert torch.equal(back.ids_NJ, sparse.ids_NJ)
    assert torch.equal(back.log_tail_N, sparse.log_tail_N)
    assert torch.equal(back.target_log_p_N, sparse.target_log_p_N)
    near = sparse.log_p_NJ > -31  # below 1e-14 a probability is only bounded
    torch.testing.assert_close(back.log_p_NJ[near], sparse.log_p_NJ[near], rtol=0, atol=5e-4)
    assert (back.log_p_NJ[~near] < -30.9).all()
    torch.testing.assert_close(back.log_p_NO(targets_N).exp().sum(-1), torch.ones(rows), rtol=0, atol=1e-6)


def test_excluded_ids_stay_impossible():
    sparse, targets_N = signal_of(3, 6, 6, excluded_ids=torch.tensor([0, 4]))
    targets_N.fill_(1)
    back = summing_to_one(unpack(pack(sparse, vocabulary=6), vocabulary=6), targets_N)
    excluded = torch.isin(back.ids_NJ, torch.tensor([0, 4]))
    assert excluded.sum() == 6 and (back.log_p_NJ[excluded] <= EXCLUDED_LOGIT / 2).all()


def test_a_very_unlikely_kept_id_is_not_impossible():
    """0 there would make a reverse KL infinite."""
    logits = torch.tensor([[0.0, -60.0, -80.0]])
    sparse = sparse_signal(Dense(logits, Head(torch.eye(3))), torch.tensor([0]), top_k=2)
    back = summing_to_one(unpack(pack(sparse, vocabulary=3), vocabulary=3), torch.tensor([0]))
    assert -33 < back.log_p_NJ[0, 1] < -31


@pytest.mark.parametrize(
    "change",
    [
        {"ids": b""},
        {"log_p": b"\0"},
        {"log_p": b""},
        {"log_tail": b""},
        {"target_log_p": b"\0\0\0\0"},
        {"ids": b"\xff" * 3},
    ],
)
def test_bytes_of_something_else_are_refused(change):
    sparse, _ = signal_of(2, 5, 4)
    packed = pack(sparse, vocabulary=5)
    assert len(packed.ids) == 3
    with pytest.raises(ValueError, match=r"packed signal|buffer size"):
        unpack(Packed(**{**packed._asdict(), **change}), vocabulary=5)
