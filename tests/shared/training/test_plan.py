from __future__ import annotations

import random
from itertools import pairwise

import pytest

from shared.training.plan import RUNS_PER_BUDGET, fill, padding_share, plan_round


def plan(tokens, **options):
    defaults = {"pairs_per_step": 8, "micro_batch_tokens": 400, "sequences_per_pair": 2, "seed": 3}
    return plan_round(tokens, **(defaults | options))


@pytest.fixture
def tokens() -> list[int]:
    source = random.Random(0)
    return [source.randint(5, 120) for _ in range(53)]


def counted(step) -> list[int]:
    return [i for process in step.by_process for m in process if m.counts for i in m.pairs]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_every_pair_trains_exactly_once_in_the_same_step_for_any_number_of_processes(tokens, processes):
    steps = plan(tokens, processes=processes)
    alone = plan(tokens)
    assert sorted(i for step in steps for i in counted(step)) == list(range(len(tokens)))
    assert [set(counted(step)) for step in steps] == [set(counted(step)) for step in alone]


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_processes_get_equally_many_micro_batches(tokens, processes):
    for step in plan(tokens, processes=processes):
        assert len({len(process) for process in step.by_process}) == 1


def test_fewer_pairs_than_processes_are_filled_up_without_counting():
    (step,) = plan([10, 12], processes=4)
    assert sorted(counted(step)) == [0, 1]
    assert sum(not m.counts for process in step.by_process for m in process) == 2


def test_micro_batches_keep_to_the_token_budget(tokens):
    for step in plan(tokens):
        for m in step.by_process[0]:
            padded = 2 * len(m.pairs) * max(tokens[i] for i in m.pairs)
            assert padded <= 400 or len(m.pairs) == 1


def test_the_budget_does_not_move_pairs_between_steps(tokens):
    small, large = plan(tokens, micro_batch_tokens=100), plan(tokens, micro_batch_tokens=10_000)
    assert [set(counted(s)) for s in small] == [set(counted(s)) for s in large]
    assert sum(len(step.by_process[0]) for step in large) < sum(len(step.by_process[0]) for step in small)


def test_the_plan_depends_on_the_seed_alone(tokens):
    assert plan(tokens) == plan(tokens)
    assert plan(tokens) != plan(tokens, seed=4)


def test_padding_share_counts_padded_positions():
    steps = plan([10, 20], micro_batch_tokens=1000)
    # two sequences a pair, all padded to 20; pair 0 uses 10 + 6 of them, pair 1 20 + 4
    assert padding_share(steps, [10, 20], [16, 24], 2) == pytest.approx(1 - 40 / 80)


def cost(runs, tokens, budget) -> float:
    """What `fill` minimises; infinite beyond the budget."""
    padded = [len(run) * max(tokens[i] for i in run) for run in runs]
    if any(size > budget and len(run) > 1 for size, run in zip(padded, runs, strict=True)):
        return float("inf")
    return sum(padded) + len(runs) * budget / RUNS_PER_BUDGET


@pytest.mark.parametrize("budget", [1, 60, 200, 1000, 10_000])
@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_runs_are_the_cheapest_that_keep_the_order(count, budget):
    source = random.Random(count + budget)
    for _ in range(10):
        tokens = sorted(source.randint(1, 100) for _ in range(count))
        runs = fill(range(count), tokens, budget)
        assert [i for run in runs for i in run] == list(range(count))
        cuts = (
            [
                list(range(a, b))
                for a, b in pairwise([0, *(i for i in range(1, count) if mask >> i & 1), count])
            ]
            for mask in range(0, 2**count, 2)
        )
        assert count == 0 or cost(runs, tokens, budget) == min(cost(cut, tokens, budget) for cut in cuts)


def test_lengths_that_differ_are_not_padded_to_each_other_to_fill_a_budget():
    assert fill(range(4), [10, 12, 300, 310], 2000) == [[0, 1], [2, 3]]
    assert fill(range(4), [300, 301, 302, 303], 2000) == [[0, 1, 2, 3]]


def test_little_is_padded_on_prompts_and_responses_like_the_demos():
    """36 to 109 tokens of prompt; responses up to 64, of which the student's are short or reach the limit."""
    source = random.Random(0)
    for student in (lambda: 64, lambda: min(64, 1 + int(source.expovariate(1 / 11)))):
        tokens = [source.randint(36, 109) + source.randint(5, 64) + student() for _ in range(288)]
        steps = plan(tokens, pairs_per_step=4, micro_batch_tokens=768, sequences_per_pair=1)
        assert padding_share(steps, tokens, tokens, 1) < 0.05
        assert sum(len(step.by_process[0]) for step in steps) < 2.5 * len(steps)


def test_an_empty_round_has_no_steps():
    assert plan([]) == ()
