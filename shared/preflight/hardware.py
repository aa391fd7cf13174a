"""How fast could a run be on a GPU that is not here? Published peaks of a few, and two rules.

Training is bound by arithmetic, sampling token by token by reading weights and caches from memory (or by
arithmetic, where a batch is large). The result is the time at the published peaks: no program is faster. What
large trainings reach of the arithmetic peak is 44 to 52 % (Narayanan et al. 2021, arXiv 2104.04473, table 1,
on A100s); `transformers` samples slower than memory allows, the more so the smaller the model. On the machine
itself, `check --models` measures instead.
"""

from __future__ import annotations

from typing import NamedTuple

from shared.preflight.sizing import FORWARD, Shape


class Device(NamedTuple):
    """A GPU by its maker's data sheet: dense bfloat16, no sparsity."""

    name: str
    memory_bytes: float
    flops: float  # operations a second, bfloat16 with float32 accumulation
    bandwidth: float  # bytes a second
    source: str


DEVICES = (
    Device(
        "RTX 4090, 24 GB", 24e9, 165.2e12, 1.008e12, "NVIDIA Ada GPU architecture white paper, V2, appendix A"
    ),
    Device("L40S, 48 GB", 48e9, 362.05e12, 0.864e12, "NVIDIA L40S data sheet"),
    Device("A100, 80 GB", 80e9, 312e12, 2.039e12, "NVIDIA A100 80GB SXM data sheet"),
    Device("H100, 80 GB", 80e9, 989.4e12, 3.35e12, "NVIDIA H100 SXM data sheet"),
)


class Work(NamedTuple):
    """What a round asks for."""

    prompts: int
    draws: int
    prompt_tokens: float  # mean
    response_tokens: float  # of one response
    batch_rows: float  # responses that are sampled together
    samplers: tuple[Shape, ...]  # the models that answer
    teacher_reads: bool  # whether the teacher reads both responses in training
    sides: int  # responses in a group


def seconds_of_round(device: Device, work: Work, teacher: Shape | None, student: Shape) -> dict[str, float]:
    """Seconds for sampling and training of one round, at the device's peaks."""
    answers = work.prompts * work.draws
    batches = answers / work.batch_rows
    sampling = 0.0
    for model in work.samplers:
        reading = work.batch_rows * work.prompt_tokens * model.forward / device.flops
        cached = model.kv_bytes * work.batch_rows * (work.prompt_tokens + work.response_tokens / 2)
        moved = (model.weight_bytes + cached) / device.bandwidth
        computed = work.batch_rows * (model.forward + FORWARD * model.head) / device.flops
        sampling += batches * (reading + work.response_tokens * max(moved, computed))
    tokens = answers * work.sides * (work.prompt_tokens + work.response_tokens)
    rows = answers * work.sides * work.response_tokens
    # the head's logits forward, and the gradients of hidden states and of a trained head
    heads = student.head * (3 if student.head_trained else 2) * FORWARD
    operations = tokens * student.training
    if work.teacher_reads and teacher is not None:
        operations += tokens * teacher.forward
        heads += FORWARD * teacher.head
    return {"sampling": sampling, "training": (operations + rows * heads) / device.flops}
