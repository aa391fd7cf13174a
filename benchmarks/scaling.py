"""Does a training step take twice as long for twice the tokens, and half as long in two processes?

    python benchmarks/scaling.py [--short] [--out FILE] [--rounds N]

A step is the teacher's pass and the student's forward and backward pass in the joint layout, as in
pair_layout.py. `tokens`: 1, 2, 4 and 8 times as many pairs in one micro-batch, in turns
(A B C D A B ...; from 16 pairs on a GPU);
`fixed_tokens` is what a pass costs without any, in tokens, by a line through all times. `processes`: two
processes of one thread each under DDP with gloo; by turns the first does all pairs alone while the other
waits, and both do half of them and average their gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from loss_core import DEVICE, machine
from pair_layout import Case, Model, batch_of, seconds
from torch.nn.parallel import DistributedDataParallel

TIMES = (1, 2, 4, 8) if DEVICE == "cpu" else (16, 32, 64, 128)  # a GPU is idle in between with fewer
SHAPE = (100, (64, 64))  # tokens of prompt and responses
PAIRS = 4  # of the comparison of processes


def measure_tokens(rounds: int, times: tuple[int, ...]) -> dict[str, Any]:
    """Step time by the number of tokens."""
    model = Model(torch.float32)
    batches = {n: batch_of(Case(n, *SHAPE), "joint") for n in times}
    tokens = {n: batch[0].inputs["input_ids"].numel() for n, batch in batches.items()}
    taken: dict[int, list[float]] = {n: [] for n in times}
    for turn in range(rounds + 1):
        for n, (encoded, rows) in batches.items():
            spent = seconds(lambda e=encoded, r=rows, n=n: model.step(e, r, n))
            if turn > 0:  # the first warms up
                taken[n].append(spent)
    medians = {n: statistics.median(values) for n, values in taken.items()}
    line = statistics.linear_regression([tokens[n] for n in times], [medians[n] for n in times])
    per_token = {n: medians[n] / tokens[n] for n in times}
    first = times[0]
    return {
        "tokens": list(tokens.values()),
        "seconds": {n: round(value, 3) for n, value in medians.items()},
        "per_token_over_first": {n: round(per_token[n] / per_token[first], 3) for n in times},
        "fixed_tokens": round(line.intercept / line.slope, 1),
        "seconds_by_round": {n: [round(value, 3) for value in values] for n, values in taken.items()},
    }


def measure_processes(rounds: int) -> dict[str, Any] | None:
    """What the two processes of `worker` found."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        arguments = [__file__, "--worker", "--out", str(target), "--rounds", str(rounds)]
        subprocess.run([*command, *arguments], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        result: dict[str, Any] = json.loads(target.read_text())
    return result


def worker(rounds: int, target: Path) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = Model(torch.float32)
    plain = model.distiller
    wrapped = DistributedDataParallel(plain)
    whole = batch_of(Case(PAIRS, *SHAPE), "joint")
    half = batch_of(Case(PAIRS // 2, *SHAPE), "joint")
    taken: dict[str, list[float]] = {"one": [], "two": []}

    def together(module: torch.nn.Module, batch: Any, pairs: int, *, works: bool) -> float:
        model.distiller = module
        dist.barrier()

        def step() -> None:
            if works:
                model.step(*batch, pairs)
            dist.barrier()

        return seconds(step, time.perf_counter)  # waiting counts

    for turn in range(rounds + 1):
        spent = {
            "one": together(plain, whole, PAIRS, works=rank == 0),
            "two": together(wrapped, half, PAIRS // 2, works=True),
        }
        if turn > 0:
            for name, value in spent.items():
                taken[name].append(value)
    if rank == 0:
        speedup = statistics.median(a / b for a, b in zip(taken["one"], taken["two"], strict=True))
        result = {
            "pairs": PAIRS,
            "pairs_per_second": {n: round(PAIRS / statistics.median(t), 3) for n, t in taken.items()},
            "two_over_one": round(speedup, 2),
            "seconds_by_round": {n: [round(value, 2) for value in t] for n, t in taken.items()},
        }
        target.write_text(json.dumps(result))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="up to 4 times the tokens, no processes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaling.json"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.rounds, arguments.out)
        return
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {"machine": machine(arguments.threads), "rounds": arguments.rounds}

    def record(name: str, result: dict[str, Any] | None) -> None:
        results[name] = result
        print(json.dumps({name: result}), flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")

    record("tokens", measure_tokens(arguments.rounds, TIMES[:3] if arguments.short else TIMES))
    if not arguments.short and DEVICE == "cpu":
        record("processes", measure_processes(arguments.rounds))


if __name__ == "__main__":
    main()
