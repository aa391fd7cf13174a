"""Does the fused loss cost little more than its matrix products, in constant memory?

    python benchmarks/loss_core.py [--short] [--out FILE] [--threads N]

Each case runs DistiLLM-2 forward and backward on pairs of responses, from hidden states to the gradients of
hidden states and, where it is trained, of the head. Contestants take turns (A B A B ...) in one process; a
ratio is the median of the rounds' ratios. Peak memory is measured apart from time; on a CPU, whose count
cannot be reset, in a process of its own for each.

    fused           this project's loss
    products        only the products that it makes, in the same chunks and buffers: it cannot be faster
    large_products  without the second projection and in chunks of 1,024 rows: what more memory would allow
    plain           full logits, each row only its own divergence: this project's reference
    naive           full logits, both divergences on all rows, then masked by side: the usual way
    compiled        this project's loss on what `torch.compile` makes of it, where there is a compiler
    fused_gkd       this project's loss for GKD's objective, a generalised JSD on all rows
    trl_chunked     TRL's `trl.kernels.chunked_divergence` for the same
    trl_full        the loss of TRL's `GKDTrainer` on full logits for the same

The ratios of the last two are to `fused_gkd`, and what they compute is compared with it. TRL (1.16 or newer)
is not a dependency: install it beside this project, or it is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shared.objectives.chunks import chunk_sizes, even_chunks, whole_units
from shared.objectives.core import GlobalCounts, ResponseRows, objective_loss
from shared.objectives.divergences import skew_kl, skew_reverse_kl
from shared.objectives.head import Head
from shared.objectives.kernels import Kernels, compiled_kernels
from shared.objectives.objective import build_objective
from shared.objectives.projection import Projection, multiplies_natively
from shared.objectives.signal import Dense

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGE_CHUNK = 1024  # rows


class Case(NamedTuple):
    """What is computed."""

    rows: int
    vocabulary: int
    width: int  # of the hidden states of both models
    response: int  # tokens
    head: str  # "frozen" or "trained"
    dtype: str = "float32"


class Inputs(NamedTuple):
    """Random models' outputs."""

    student_hidden_ND: Tensor
    student_head: Head
    teacher_hidden_NE: Tensor
    teacher_head: Head
    rows: ResponseRows
    counts: GlobalCounts


HEADS = ("frozen", "trained")
SHORT = tuple(Case(256, 49_152, 576, 64, head) for head in HEADS)
FULL = (
    *SHORT,
    *(Case(512, 49_152, 576, 64, head) for head in HEADS),
    *(Case(512, 151_936, 896, response, head) for head in HEADS for response in (64, 256)),
    Case(512, 49_152, 576, 64, "frozen", "bfloat16"),
    Case(512, 32_000, 2048, 64, "frozen"),
    Case(256, 262_144, 640, 32, "frozen"),
    Case(2048, 49_152, 576, 64, "frozen"),
    Case(8192, 49_152, 64, 64, "frozen"),
)
ON_A_GPU = tuple(
    Case(rows, vocabulary, width, min(256, rows // 2), head, "bfloat16")
    for vocabulary, width in ((32_000, 4096), (49_152, 960), (151_936, 2048), (262_144, 2304))
    for head in HEADS
    for rows in (256, 2048, 8192)
)
FULL_MEMORY = (
    *(Case(rows, 151_936, 896, 64, head) for head in HEADS for rows in (512, 2048)),
    Case(8192, 151_936, 64, 64, "frozen"),
    Case(2048, 151_936, 896, 256, "frozen"),
)
MEMORY_ON_A_GPU = tuple(case for case in ON_A_GPU if case.rows > 256)


def inputs_of(case: Case) -> Inputs:
    """Pairs of responses of equal length, at a scale that gives peaked distributions."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    responses = case.rows // case.response
    assert responses % 2 == 0, case

    def normal(rows: int, scale: float) -> Tensor:
        return (torch.randn(rows, case.width, device=DEVICE) * scale).to(dtype)

    side_R = torch.arange(responses, device=DEVICE) % 2
    weight_VD = normal(case.vocabulary, 3 * case.width**-0.5).requires_grad_(case.head == "trained")
    return Inputs(
        normal(case.rows, 1).requires_grad_(),
        Head(weight_VD),
        normal(case.rows, 1),
        Head(normal(case.vocabulary, 3 * case.width**-0.5)),
        ResponseRows(
            torch.randint(case.vocabulary, (case.rows,), device=DEVICE),
            torch.arange(responses, device=DEVICE).repeat_interleave(case.response),
            side_R,
            torch.arange(responses, device=DEVICE) // 2,
            side_R,
        ),
        GlobalCounts(responses / 2, (case.rows / 2, case.rows / 2, 0.0)),
    )


def alphas(gap_R: Tensor, cell_R: Tensor) -> Tensor:
    """A curriculum that looks at the gap, so that responses must be seen whole."""
    return (0.1 + 0.05 * torch.tanh(gap_R)).clamp(0.01, 0.3)


def run_objective(inputs: Inputs, backend: str, kernels: Kernels | None = None) -> None:
    """This project's loss, on any backend."""
    output = objective_loss(
        build_objective("distillm2", {}),
        inputs.student_hidden_ND,
        inputs.student_head,
        Dense(inputs.teacher_hidden_NE, inputs.teacher_head),
        inputs.rows,
        alphas=alphas,
        beta=0.5,
        counts=inputs.counts,
        backend=backend,
        kernels=kernels,
    )
    output.loss.backward()


def run_naive(inputs: Inputs) -> None:
    """Both divergences everywhere, then a mask."""
    student_NV = inputs.student_head.logits(inputs.student_hidden_ND)
    with torch.no_grad():
        teacher_NV = inputs.teacher_head.logits(inputs.teacher_hidden_NE)
    on_student_N = inputs.rows.side_R[inputs.rows.response_N] == 1
    forward_N = skew_kl(student_NV, teacher_NV, alpha=0.1)
    reverse_N = skew_reverse_kl(student_NV, teacher_NV, alpha=0.1)
    nats = (forward_N * ~on_student_N).sum() + (reverse_N * on_student_N).sum()
    (nats / inputs.counts.rows_S[0]).backward()


def run_gkd(inputs: Inputs) -> Tensor:
    """GKD's objective: half of the mean of a JSD over either side's rows."""
    output = objective_loss(
        build_objective("gkd", {}),
        inputs.student_hidden_ND,
        inputs.student_head,
        Dense(inputs.teacher_hidden_NE, inputs.teacher_head),
        inputs.rows,
        alphas=None,
        beta=0.5,
        counts=inputs.counts,
        normalization="token",
    )
    output.loss.backward()
    return output.loss.detach()


def run_trl_chunked(inputs: Inputs) -> Tensor:
    """TRL's fused divergence."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = (inputs.student_hidden_ND, inputs.student_head), inputs[2:4]
    nats_N, _ = ChunkedDivergenceFunction.apply(
        student[0], student[1].weight_VD, None, teacher[0], teacher[1].weight_VD, None, 0.5
    )
    loss = nats_N.mean()
    loss.backward()
    return loss.detach()


def run_trl_full(inputs: Inputs) -> Tensor:
    """TRL's loss on full logits."""
    from trl.experimental.gkd import GKDTrainer

    student_NV = inputs.student_hidden_ND @ inputs.student_head.weight_VD.T
    with torch.no_grad():
        teacher_NV = inputs.teacher_hidden_NE @ inputs.teacher_head.weight_VD.T
    loss = GKDTrainer.generalized_jsd_loss(student_NV, teacher_NV, num_items_in_batch=len(student_NV))
    loss.backward()
    return loss.detach()


def run_products(inputs: Inputs, *, chunk_rows: int | None) -> None:
    """The matrix products of the fused loss; None for its own chunks."""
    rows, vocabulary = len(inputs.rows.targets_N), inputs.student_head.vocabulary_size
    if chunk_rows is None:
        native = multiplies_natively(torch.device(DEVICE), inputs.student_head.weight_VD.dtype)
        sizes = chunk_sizes(
            rows, 4 * vocabulary, models=2, intermediates=3 if DEVICE == "cpu" else 0, rounded=native,
            on_cpu=DEVICE == "cpu", buffer_bytes=None,
        )  # fmt: skip
        response = rows // inputs.rows.responses
        spans = list(whole_units(range(0, rows, response), rows, sizes.chunk))
        chunk_rows = sizes.chunk
    else:
        spans = even_chunks(0, rows, chunk_rows)
    weight_VD = inputs.student_head.weight_VD
    with torch.no_grad():
        buffer_rows = min(rows, chunk_rows)
        student, teacher = (
            Projection(hidden, head, rows=buffer_rows, dtype=torch.float32) for hidden, head in (
                inputs[0:2], inputs[2:4],
            )
        )  # fmt: skip
        scale_N = torch.ones(rows, device=DEVICE)
        hidden_gradient_ND = torch.empty(inputs.student_hidden_ND.shape, device=DEVICE)
        trained = weight_VD.requires_grad
        weight_gradient_VD = torch.empty(weight_VD.shape, device=DEVICE) if trained else None
        for span in spans:
            chunks = even_chunks(*span, chunk_rows)
            for chunk in [*chunks, *chunks] if len(chunks) > 1 else chunks:
                teacher.logits(*chunk)
                logits_CV = student.logits(*chunk)
            for chunk in chunks:
                gradient_CV = student.factor(logits_CV[: chunk.stop - chunk.start])
                scale_C = scale_N[slice(*chunk)]
                student.hidden_gradient(gradient_CV, scale_C, out=hidden_gradient_ND[slice(*chunk)])
                if weight_gradient_VD is not None:
                    student.add_weight_gradient(
                        gradient_CV, scale_C, *chunk, into_VD=weight_gradient_VD, is_first=chunk.start == 0
                    )


CONTESTANTS: dict[str, Callable[[Inputs], Tensor | None]] = {
    "fused": lambda inputs: run_objective(inputs, "fused"),
    "products": lambda inputs: run_products(inputs, chunk_rows=None),
    "large_products": lambda inputs: run_products(inputs, chunk_rows=LARGE_CHUNK),
    "plain": lambda inputs: run_objective(inputs, "plain"),
    "naive": run_naive,
    "compiled": lambda inputs: run_objective(inputs, "fused", compiled_kernels()),
    "fused_gkd": run_gkd,
    "trl_chunked": run_trl_chunked,
    "trl_full": run_trl_full,
}
HOLD_LOGITS = ("plain", "naive", "trl_full")  # of all rows, several times


def now() -> float:
    """Seconds: the process's own on one CPU thread, where other work counts less, else of the clock."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if counts_cpu_time() else time.perf_counter()


def counts_cpu_time() -> bool:
    """Whether `now` is the processor's time."""
    return DEVICE == "cpu" and torch.get_num_threads() == 1


@cache
def has_trl() -> bool:
    """Whether the peer can be imported; a line where it cannot."""
    try:
        import trl.experimental.gkd
        import trl.kernels.chunked_divergence  # noqa: F401
    except ImportError as error:
        print(f"TRL is left out ({error}): pip install 'trl>=1.16' beside this project to compare with it")
        return False
    return True


def time_case(case: Case, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Median seconds of each contestant, and the median of the rounds' ratios of the fused loss to it."""
    inputs = inputs_of(case)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    values: dict[str, Tensor | None] = {}
    for turn in range(rounds + 1):
        for name in names:
            inputs.student_hidden_ND.grad = inputs.student_head.weight_VD.grad = None
            start = now()
            values[name] = CONTESTANTS[name](inputs)
            if turn > 0:  # the first is for warming up
                seconds[name].append(now() - start)
    ratios = {
        name: statistics.median(
            f / x for f, x in zip(seconds[same_objective(name)], seconds[name], strict=True)
        )
        for name in names
    }
    losses = {name: float(loss) for name, loss in values.items() if loss is not None}
    allowed = 1e-3 if case.dtype == "float32" else 3e-2  # TRL's logits have the head's precision
    for loss in losses.values():
        assert abs(loss - losses["fused_gkd"]) < allowed * abs(loss) + 1e-6, losses
    return {
        **case._asdict(),
        "seconds": {name: round(statistics.median(times), 4) for name, times in seconds.items()},
        "fused_over": {n: round(ratio, 3) for n, ratio in ratios.items() if not n.startswith("fused")},
    }


def same_objective(name: str) -> str:
    """The fused loss that a contestant is compared with."""
    return "fused_gkd" if name.startswith("trl") else "fused"


def measure_memory(case: Case, name: str) -> float:
    """Peak MiB of one contestant, beyond its inputs and the gradients that it returns."""
    inputs = inputs_of(case)
    returned = 4 * case.rows * case.width + (
        4 * case.vocabulary * case.width if case.head == "trained" else 0
    )
    if DEVICE == "cuda":
        CONTESTANTS[name](inputs)  # the libraries' own workspaces are there afterwards
        inputs.student_hidden_ND.grad = inputs.student_head.weight_VD.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        CONTESTANTS[name](inputs)
        return (torch.cuda.max_memory_allocated() - before - returned) / 2**20
    page = os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    peak, done = [before := resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    CONTESTANTS[name](inputs)
    done.set()
    watcher.join()
    return (peak[0] - before - returned) / 2**20


def memory_case(case: Case, names: Sequence[str], threads: int) -> dict[str, Any]:
    """Peak memory of each contestant."""
    megabytes = {}
    for name in names:
        if DEVICE == "cuda":
            megabytes[name] = round(measure_memory(case, name), 1)
            continue
        arguments = ["--memory-of", name, "--case", json.dumps(case), "--threads", str(threads)]
        child = subprocess.run(
            [sys.executable, __file__, *arguments], check=True, capture_output=True, text=True
        )
        megabytes[name] = round(float(child.stdout), 1)
    return {**case._asdict(), "extra_mib": megabytes}


def machine(threads: int) -> dict[str, Any]:
    """Where the numbers come from."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else model,
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": round(load := os.getloadavg()[0], 2),
        "note": "other work ran beside it" if load > 1 else "nothing else ran",
        "seconds": "of the processor" if counts_cpu_time() else "of the clock",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="small cases, under a minute")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loss_core.json"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(measure_memory(Case(*json.loads(arguments.case)), arguments.memory_of))
        return

    results: dict[str, Any] = {"machine": machine(arguments.threads), "time": [], "memory": []}

    def record(kind: str, result: dict[str, Any]) -> None:
        results[kind].append(result)
        print(json.dumps(result), flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")

    times, memories = (FULL, FULL_MEMORY) if DEVICE == "cpu" else (FULL + ON_A_GPU, MEMORY_ON_A_GPU)
    for case in SHORT if arguments.short else times:
        logits_gib = 4 * case.rows * case.vocabulary / 2**30
        full_logits_fit = logits_gib < (4 if DEVICE == "cuda" else 0.25)  # they take ten times this and more
        left_out = {
            *(() if full_logits_fit else HOLD_LOGITS),
            *(() if has_trl() else ("trl_chunked", "trl_full")),
            *(() if DEVICE == "cuda" or shutil.which("g++") else ("compiled",)),
        }
        names = [name for name in CONTESTANTS if name not in left_out]
        record("time", time_case(case, names, arguments.rounds))
    for case in SHORT[:1] if arguments.short else memories:
        names = ("fused", "plain", "naive") if arguments.short else ("fused",)
        record("memory", memory_case(case, names, arguments.threads))


if __name__ == "__main__":
    main()
