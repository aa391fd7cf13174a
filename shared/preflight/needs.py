"""What will a run take of memory, disk and time, by its configuration alone?"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from shared.config import RunConfig
from shared.objectives.objective import Objective
from shared.preflight.hardware import DEVICES, Work, seconds_of_round
from shared.preflight.page import Findings, duration, millions, size
from shared.preflight.sizing import Shape, activation_bytes, disk, memory, peak
from shared.preflight.survey import Readers
from shared.session import sampling_dtype

AS_ASKED = "as asked for"  # why an estimate is made


class Plan(NamedTuple):
    """What sizes and times are worked out from."""

    config: RunConfig
    objective: Objective
    readers: Readers
    teacher: Shape | None
    student: Shape
    prompts: int  # of a round
    heldout: int
    prompt_tokens: float  # mean, of the student's
    longest: int

    @property
    def answers(self) -> int:
        """Groups of a round."""
        return self.prompts * self.config.generation.draws

    @property
    def samplers(self) -> tuple[str, ...]:
        """The models that answer in every round."""
        offline = self.config.generation.offline
        return tuple(
            role for role in ("teacher", "student")
            if role in self.objective.sides and getattr(offline, role) is None
        )  # fmt: skip

    @property
    def response_tokens(self) -> int:
        """The longest that a response may be."""
        return self.config.generation.max_new_tokens

    @property
    def batch_rows(self) -> int:
        """Responses that are sampled together."""
        return max(1, int(self.config.generation.batch_tokens / (self.prompt_tokens + self.response_tokens)))


def size_up(found: Findings, plan: Plan, student: Any, *, on_cpu: bool) -> int:
    """Memory and disk as topics; the bytes of memory that the run needs."""
    config, training = plan.config, plan.config.training
    length = int(plan.prompt_tokens) + plan.response_tokens
    bf16 = training.mixed_precision == "bf16"
    sampled_in = sampling_dtype(config)
    converted = sampled_in != getattr(torch, config.student.dtype)
    copied = plan.student.parameters * sampled_in.itemsize if converted or config.student.uses_lora else 0
    parts = memory(
        plan.teacher,
        plan.student,
        activations=activation_bytes(
            student,
            max(length, training.micro_batch_tokens),
            length,
            autocast=bf16,
            checkpointing=training.gradient_checkpointing,
        ),
        kv_tokens=max(length, config.generation.batch_tokens),
        copy_bytes=copied,
        on_cpu=on_cpu,
    )
    needed = peak(parts)
    lines = [
        f"{millions(plan.student.parameters)} parameters in the student, {millions(plan.student.trained)} of "
        f"them trained ({config.student.how})"
        + (f"; {millions(plan.teacher.parameters)} in the teacher" if plan.teacher else "")
    ]
    for when, of in parts.items():
        lines += [f"{when:9} {name:26} {size(count):>8}" for name, count in of.items()]
    lines.append(f"{'at most':9} {'':26} {size(needed):>8}   (activations of the language model only)")
    found.add("Memory", lines)
    responses = (plan.answers * len(plan.samplers)) * training.rounds + plan.heldout
    export = plan.student.weight_bytes
    if config.origin.quantization is not None:  # plain, and beside the LoRA its base
        export += plan.student.parameters * getattr(torch, config.student.dtype).itemsize
    kept = disk(config, plan.student, responses=responses, export_bytes=export)
    lines = [f"{name:36} {size(count):>8}" for name, count in kept.items()]
    found.add("Disk, at most", [*lines, f"{'all':36} {size(sum(kept.values())):>8}"])
    found.facts["memory bytes"] = {name: dict(of) for name, of in parts.items()}
    found.facts["memory bytes at most"] = needed
    found.facts["disk bytes"] = kept
    made = plan.answers * plan.response_tokens * len(plan.samplers)
    read = round(plan.answers * len(plan.objective.sides) * (plan.prompt_tokens + plan.response_tokens))
    found.add(
        "Tokens of a round, at most",
        [
            f"{made:,} sampled by {' and '.join(plan.samplers) or 'nobody'}",
            f"{read:,} trained on: {plan.answers:,} prompts of {plan.prompt_tokens:.0f} tokens with answers "
            f"of {plan.response_tokens}, {training.rounds} rounds",
        ],
    )
    found.facts["tokens of a round"] = {"sampled": made, "trained on": read}
    return needed


def estimate_time(found: Findings, plan: Plan, needed: int, reason: str) -> None:
    """The time of the published peaks of some GPUs."""
    by_name = {"teacher": plan.teacher, "student": plan.student}
    work = Work(
        prompts=plan.prompts,
        draws=plan.config.generation.draws,
        prompt_tokens=plan.prompt_tokens,
        response_tokens=plan.response_tokens,
        batch_rows=plan.batch_rows,
        samplers=tuple(shape for role in plan.samplers if (shape := by_name[role]) is not None),
        teacher_reads=plan.objective.needs_teacher,
        sides=len(plan.objective.sides),
    )
    lines, facts = [], {}
    rounds = plan.config.training.rounds
    for device in DEVICES:
        seconds = seconds_of_round(device, work, plan.teacher, plan.student)
        fits = needed <= device.memory_bytes
        facts[device.name] = {**seconds, "fits": fits}
        lines.append(
            f"{device.name:16} sampling {duration(seconds['sampling']):>7}, training "
            f"{duration(seconds['training']):>7}; {rounds} rounds "
            f"{duration(rounds * sum(seconds.values())):>7}; "
            + ("fits" if fits else f"does not fit: {size(needed)} needed")
        )
    lines.append(
        "at the peak rates of the data sheets (shared/preflight/hardware.py), which no program reaches:"
    )
    lines.append(
        "large trainings reach about half of the arithmetic; `check --models` there measures instead"
    )
    because = "" if reason == AS_ASKED else f", because {reason}"
    found.add(f"Time of a round, worked out{because}", lines)
    found.facts["seconds of a round at peak rates"] = facts
