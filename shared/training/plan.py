"""Which pairs train in which step, process and micro-batch? A pure function of lengths and settings.

A global batch is a fixed number of pairs. Token budgets and processes only cut it into micro-batches, so they
change memory and speed but not the gradient. Every process gets the same number of micro-batches in a step,
because wrapped models communicate in each forward and backward pass.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

# A pass costs as much as this share of its token budget even without tokens: weights are read, gradients
# added up, kernels started. About 20 tokens on a CPU (docs/PERFORMANCE.md), more on a GPU, where budgets are
# larger as well.
RUNS_PER_BUDGET = 32


class MicroBatch(NamedTuple):
    """Pairs of one forward and backward pass. With `counts` False: only to keep processes in step."""

    pairs: tuple[int, ...]
    counts: bool = True


class Step(NamedTuple):
    """One optimiser step: for each process its micro-batches, equally many everywhere."""

    by_process: tuple[tuple[MicroBatch, ...], ...]


def plan_round(
    tokens: Sequence[int],
    *,
    pairs_per_step: int,
    micro_batch_tokens: int,
    sequences_per_pair: int,
    processes: int = 1,
    seed: int,
) -> tuple[Step, ...]:
    """Shuffle the pairs once and cut them into steps and micro-batches.

    Args:
        tokens: of each pair, the longest of its sequences.
        pairs_per_step: the global batch; the last step of a round may have fewer.
        micro_batch_tokens: padded tokens of a micro-batch; a single pair may exceed it.
        sequences_per_pair: how many sequences a pair is laid out in.
        processes: over which each step is spread.
        seed: of the shuffle.
    """
    order = list(range(len(tokens)))
    random.Random(seed).shuffle(order)
    batches = [order[i : i + pairs_per_step] for i in range(0, len(order), pairs_per_step)]
    return tuple(
        _plan_step(batch, tokens, micro_batch_tokens // sequences_per_pair, processes) for batch in batches
    )


def fill(ordered: Sequence[int], tokens: Sequence[int], budget: int) -> list[list[int]]:
    """Cut indices, ascending by their tokens, into the runs that are cheapest to compute.

    A run costs its padded tokens, of which it may have `budget` (or be alone), and a fixed share of the
    budget for being one more: so lengths that differ much are not padded to each other only to fill one.
    """
    overhead = budget / RUNS_PER_BUDGET
    # cheapest[j]: of the first j, with the start of the last run; ties go to the longer last run
    cheapest: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, len(ordered) + 1):
        longest = tokens[ordered[stop - 1]]
        first = max(0, min(stop - 1, stop - budget // max(1, longest)))
        cheapest.append(
            min(
                (cheapest[start][0] + (stop - start) * longest + overhead, start)
                for start in range(first, stop)
            )
        )
    runs, stop = [], len(ordered)
    while stop:
        start = cheapest[stop][1]
        runs.append(list(ordered[start:stop]))
        stop = start
    return runs[::-1]


def padding_share(steps: Sequence[Step], tokens: Sequence[int], used: Sequence[int], sequences: int) -> float:
    """The share of padded positions in a plan; `used` are the real tokens of each pair."""
    counted = [m.pairs for step in steps for process in step.by_process for m in process if m.counts]
    padded = sum(len(pairs) * sequences * max(tokens[i] for i in pairs) for pairs in counted)
    return 1.0 - sum(used[i] for pairs in counted for i in pairs) / padded if padded else 0.0


def _plan_step(batch: Sequence[int], tokens: Sequence[int], budget: int, processes: int) -> Step:
    # similar lengths together: little padding; ties by index, so that the plan is reproducible
    ordered = sorted(batch, key=lambda i: (tokens[i], i))
    micro_batches = [MicroBatch(tuple(pairs)) for pairs in fill(ordered, tokens, budget)]
    per_process = math.ceil(len(micro_batches) / processes)
    # split the fullest ones before resorting to uncounted fillers
    while len(micro_batches) < per_process * processes:
        largest = max(range(len(micro_batches)), key=lambda i: len(micro_batches[i].pairs))
        pairs = micro_batches[largest].pairs
        if len(pairs) == 1:
            micro_batches.append(MicroBatch((ordered[0],), counts=False))
            continue
        half = len(pairs) // 2
        micro_batches[largest : largest + 1] = [MicroBatch(pairs[:half]), MicroBatch(pairs[half:])]
    return Step(tuple(tuple(micro_batches[p::processes]) for p in range(processes)))
