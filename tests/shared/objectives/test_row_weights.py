"""Row weights have a mean of 1, leave equal rows as they are, and do not see how a batch is split."""

import math

import pytest
import torch

from objective_references import random_batch
from shared.errors import StoreError
from shared.objectives.core import objective_loss
from shared.objectives.objective import SIDES, build_objective
from shared.objectives.row_weights import (
    RowWeights,
    Segments,
    TaskGaps,
    segment_gaps,
    segment_weights,
    task_weights,
)

F64 = torch.float64
# three responses: parts of 2 + 1 + 3 rows, of 1 row, of 4 rows
RESPONSE_N = torch.tensor([0] * 6 + [1] + [2] * 4)
PART_N = torch.tensor([0, 0, 1, 2, 2, 2, 0, 0, 0, 0, 0])
SEGMENTS = Segments.of(RESPONSE_N, PART_N)
SIDE_R = torch.tensor([0, 1, 1])


def random_logs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [-3 * torch.rand(len(RESPONSE_N), generator=generator, dtype=F64) for _ in range(2)]


def by_hand(log_p_N, log_q_N, level, tau):
    """The definition, row by row, in plain Python."""
    weights = []
    for response in (0, 1, 2):
        rows = [n for n in range(len(RESPONSE_N)) if RESPONSE_N[n] == response]
        parts = sorted({int(PART_N[n]) for n in rows})
        members = {part: [n for n in rows if PART_N[n] == part] for part in parts}
        sign = 1 if SIDE_R[response] == SIDES.index("teacher") else -1

        def mean(logs, of):
            return math.exp(sum(float(logs[n]) for n in of) / len(of))

        gaps = {p: sign * (mean(log_p_N, of) - mean(log_q_N, of)) for p, of in members.items()}
        scores = {p: 1.0 if level == "segment" else math.exp(gaps[p] / tau) for p in parts}
        share = {p: scores[p] / sum(scores.values()) for p in parts}
        weights += [share[int(PART_N[n])] * len(rows) / len(members[int(PART_N[n])]) for n in rows]
    return torch.tensor(weights, dtype=F64)


def weigher(level="token", tau=math.inf, inner_N=None):
    return RowWeights(RESPONSE_N, SIDE_R, PART_N, level, tau, inner_N)


def test_segments_are_numbered_through():
    assert SEGMENTS.segment_N.tolist() == [0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 4]
    assert SEGMENTS.response_S.tolist() == [0, 0, 0, 1, 2]
    # the same part number in the next response is another segment
    assert Segments.of(torch.tensor([0, 1]), torch.tensor([0, 0])).segment_N.tolist() == [0, 1]


def test_hand_computed_weights():
    weights = segment_weights(SEGMENTS, level="segment").tolist()
    assert weights == pytest.approx([1, 1, 2, 2 / 3, 2 / 3, 2 / 3, 1, 1, 1, 1, 1])
    log_p = torch.tensor([0.5, 0.25], dtype=F64).log()
    log_q = torch.tensor([0.25, 0.25], dtype=F64).log()
    two = Segments.of(torch.tensor([0, 0]), torch.tensor([0, 1]))
    gaps = segment_gaps(two, log_p, log_q, side_R=torch.tensor([0]))
    assert gaps.tolist() == pytest.approx([0.25, 0])
    assert segment_gaps(two, log_p, log_q, side_R=torch.tensor([1])).tolist() == pytest.approx([-0.25, 0])
    shares = [math.e / (math.e + 1), 1 / (math.e + 1)]
    found = segment_weights(two, level="response", gap_S=gaps, tau=0.25)
    assert found.tolist() == pytest.approx([2 * share for share in shares])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("level", "tau"), [("segment", math.inf), ("response", 0.1), ("response", 3.0)])
def test_weights_are_those_of_the_definition(level, tau, seed):
    log_p_N, log_q_N = random_logs(seed)
    expected = by_hand(log_p_N, log_q_N, level, tau)
    assert torch.allclose(weigher(level, tau)(0, 11, log_p_N, log_q_N), expected, rtol=1e-6)
    single = weigher(level, tau)(0, 11, log_p_N.float(), log_q_N.float())
    assert single.dtype == torch.float32 and torch.allclose(single.double(), expected, rtol=1e-4)


@pytest.mark.parametrize("level", ["token", "segment", "response"])
def test_the_mean_weight_of_every_response_is_1_and_equal_rows_keep_their_mean(level):
    log_p_N, log_q_N = random_logs()
    weights_N = weigher(level, 0.05)(0, 11, log_p_N, log_q_N)
    for response in range(3):
        assert weights_N[response == RESPONSE_N].mean() == pytest.approx(1)
    nats_R = torch.tensor([0.3, 2.0, 7.0], dtype=F64)
    for response in range(3):
        rows = response == RESPONSE_N
        assert (weights_N * nats_R[RESPONSE_N])[rows].mean() == pytest.approx(float(nats_R[response]))


def test_infinite_tau_is_the_segment_level_and_a_small_one_takes_the_widest_gap():
    log_p_N, log_q_N = random_logs()
    flat = weigher("response", math.inf)(0, 11, log_p_N, log_q_N)
    assert torch.allclose(flat, weigher("segment")(0, 11, log_p_N, log_q_N))
    sharp = weigher("response", 1e-6)(0, 11, log_p_N, log_q_N)  # the softmax does not overflow
    gaps = segment_gaps(SEGMENTS, log_p_N, log_q_N, side_R=SIDE_R)[:3]
    assert (
        sharp[:6].nonzero().flatten().tolist() == (PART_N[:6] == gaps.argmax()).nonzero().flatten().tolist()
    )
    assert weigher("segment")(0, 0, log_p_N[:0], log_q_N[:0]).shape == (0,)


def test_weights_carry_no_gradient_and_do_not_see_other_responses():
    log_p_N, log_q_N = random_logs()
    log_q_N.requires_grad_()
    weights = weigher("response", 0.1)
    together = weights(0, 11, log_p_N, log_q_N)
    assert not together.requires_grad
    parts = [weights(a, b, log_p_N[a:b], log_q_N[a:b]) for a, b in ((0, 6), (6, 7), (7, 11), (6, 11))]
    assert torch.equal(torch.cat(parts[:3]), together) and torch.equal(parts[3], together[6:])


def test_given_weights_of_rows_are_multiplied_in_and_the_mean_is_1_again():
    log_p_N, log_q_N = random_logs()
    inner_N = torch.tensor([2.0, 0.5, 1.0, 1.0, 0.5, 1.0, 1.0, 3.0, 0.2, 0.4, 0.4])
    both = weigher("segment", inner_N=inner_N)(0, 11, log_p_N, log_q_N)
    alone = weigher("segment")(0, 11, log_p_N, log_q_N) * inner_N.double()
    for response in range(3):
        rows = response == RESPONSE_N
        assert torch.allclose(both[rows], alone[rows] / alone[rows].mean())
    assert torch.equal(weigher("segment", inner_N=inner_N)(7, 11, log_p_N[7:], log_q_N[7:]), both[7:])


@pytest.mark.parametrize("level", ["segment", "response"])
@pytest.mark.parametrize("backend", ["fused", "plain"])
def test_the_loss_is_the_same_however_the_batch_is_split(level, backend):
    batch = random_batch(pairs=4, seed=5)
    objective = build_objective("distillm2", {})
    part_N = torch.arange(len(batch.rows.targets_N)) % 5 // 2  # any cut into parts
    part_N = torch.cat(
        [part_N[batch.rows.response_N == r].sort().values for r in range(batch.rows.responses)]
    )

    def loss(pairs):
        some = batch.of_pairs(pairs)
        chosen = [r for pair in pairs for r in (batch.rows.pair_R == pair).nonzero().flatten().tolist()]
        parts = torch.cat([part_N[batch.rows.response_N == r] for r in chosen])
        weights = RowWeights(some.rows.response_N, some.rows.side_R, parts, level, 0.2)
        hidden = some.student_hidden_ND.requires_grad_()
        output = objective_loss(
            objective,
            hidden,
            *some.arguments[1:],
            alphas=lambda gap_R, cell_R: torch.full_like(gap_R, 0.1),
            beta=0.5,
            counts=batch.counts,
            row_weigher=weights,
            backend=backend,
        )
        output.loss.backward()
        return output.loss.detach(), hidden.grad

    whole, gradient = loss([0, 1, 2, 3])
    pieces = [loss(pairs) for pairs in ([0], [1, 2], [3])]
    assert torch.allclose(sum(piece for piece, _ in pieces), whole, rtol=1e-10)
    assert torch.allclose(torch.cat([g for _, g in pieces]), gradient, rtol=1e-8)


# --- tasks --------------------------------------------------------------------------------------------------


def test_task_weights_by_hand():
    # (0.19 + 0.01, 0.39 + 0.01), mean 0.3
    assert task_weights([0.19, 0.39], gamma=1) == pytest.approx([2 / 3, 4 / 3])
    assert task_weights([0.19, 0.39], gamma=0) == [1, 1]
    assert task_weights([0.2, 0.2, 0.2], gamma=3) == pytest.approx([1, 1, 1])
    assert task_weights([0.5], gamma=2) == pytest.approx([1])
    # a learned task keeps a quarter before the mean is restored, the hardest at most four times the mean
    low, high = task_weights([-1.0, 0.99], gamma=1)
    assert low / high == pytest.approx(0.25 / (2 * 1.0 / 1.01)) and low + high == pytest.approx(2)
    many = task_weights([0.0] * 9 + [0.99], gamma=2)
    assert max(many) / min(many) == pytest.approx(4 / 0.25) and sum(many) == pytest.approx(10)


def test_a_task_that_was_not_measured_counts_as_the_mean_and_shares_are_kept():
    assert task_weights([None, None], gamma=2) == [1, 1]
    first, unknown, last = task_weights([0.1, None, 0.3], gamma=1)
    assert first < unknown < last
    shares = [0.9, 0.1]
    weights = task_weights([0.1, 0.3], gamma=1, shares_K=shares)
    assert sum(w * s for w, s in zip(weights, shares, strict=True)) == pytest.approx(1)
    assert weights[1] / weights[0] == pytest.approx(0.31 / 0.11)


def test_moving_averages_of_gaps_survive_a_checkpoint():
    gaps = TaskGaps(["code", "math"], momentum=0.75)
    gaps.observe([1.0, 0.0], [2.0, 0.0])
    assert gaps.gap_K == [0.5, None]
    gaps.observe([0.1, 0.6], [1.0, 2.0])
    assert gaps.gap_K == pytest.approx([0.75 * 0.5 + 0.25 * 0.1, 0.3])
    again = TaskGaps(["code", "math"])
    again.load_state_dict(gaps.state_dict())
    assert again.gap_K == gaps.gap_K
    with pytest.raises(StoreError, match=r"of \['code', 'math'\], this run's of \['vqa'\]"):
        TaskGaps(["vqa"]).load_state_dict(gaps.state_dict())
