"""The training of one round: pairs in, updated student out, with held-out measurements and checkpoints.

Why not `transformers.Trainer`: docs/LOG.md records the trial. `accelerate` carries what does not depend on
the method: devices, mixed precision, wrapping, trackers.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from shared.adapter import Adapter
from shared.additions import NOTHING, Additions
from shared.config import TrainingConfig
from shared.data.layouts import footprint
from shared.data.rows import check_alignment, response_rows
from shared.errors import NonFiniteLossError
from shared.models.teachers import Signal, Teacher
from shared.models.vocabulary import SharedVocabulary
from shared.objectives.core import GlobalCounts, ObjectiveOutput, ResponseRows
from shared.objectives.curriculum import AlphaCurriculum, BetaSchedule
from shared.objectives.objective import SIDES, Objective, build_objective
from shared.training.auxiliary import Beside, split_rows
from shared.training.distiller import Distiller
from shared.training.layout import Layouts
from shared.training.memory import return_freed_memory
from shared.training.plan import MicroBatch, padding_share, plan_round
from shared.training.weighting import Weighting
from shared.types import Encoded, Group

RETURN_MEMORY_STEPS = 8
# What held-out responses are measured by, whatever the run minimises
WITH_TEACHER, WITHOUT_TEACHER = build_objective("kd", {}), build_objective("sft", {})


@dataclass
class Trainee:
    """Everything that is constant through the rounds of a run, and the counters that are not."""

    accelerator: Accelerator
    distiller: Distiller  # wrapped by the accelerator where there are several processes
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]  # a pure function of the step, so that resuming needs no state
    student_adapter: Adapter
    teacher: Teacher | None
    teacher_adapter: Adapter
    vocabulary: SharedVocabulary
    objective: Objective
    alpha: AlphaCurriculum
    beta: BetaSchedule
    tasks: tuple[str, ...]
    config: TrainingConfig
    seed: int
    total_steps: int
    layouts: Layouts
    weighting: Weighting
    additions: Additions = NOTHING
    step: int = 0  # optimiser steps taken in the run
    best_nats: float = field(default=float("inf"))  # of the held-out measurements

    @property
    def student(self) -> torch.nn.Module:
        """The student inside every wrapper."""
        distiller: Distiller = self.accelerator.unwrap_model(self.distiller)
        return distiller.student

    def state(self) -> dict[str, object]:
        """What a checkpoint holds besides tensors."""
        best = self.best_nats if self.best_nats < float("inf") else None
        weighting = self.weighting.state_dict()
        return {"alpha": self.alpha.state_dict(), "weighting": weighting, "best_nats": best}

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's counters."""
        self.step = step
        self.alpha.load_state_dict(state["alpha"])
        self.weighting.load_state_dict(state.get("weighting"))
        self.best_nats = float("inf") if state["best_nats"] is None else state["best_nats"]


class Prepared(NamedTuple):
    """A micro-batch on the device, as both models see it."""

    groups: Sequence[Group]
    student: Encoded
    teacher: Encoded | None
    rows: ResponseRows


def train_round(
    trainee: Trainee,
    groups: Sequence[Group],
    *,
    first_step: int,
    seed: int,
    on_step: Callable[[dict[str, float]], None],
    on_checkpoint: Callable[[], None],
    on_evaluate: Callable[[], None],
) -> None:
    """Train on every pair once, from optimiser step `trainee.step`, which may lie among these.

    Args:
        trainee: the student and all it needs; its step and curriculum advance.
        groups: the round's pairs, the same on every process.
        first_step: the run's step at which this round began.
        seed: of this round's shuffle.
        on_step: gets the metrics of every step, the same on all processes.
        on_checkpoint: called every `checkpoint_steps`.
        on_evaluate: called every `evaluate_steps`.

    Raises:
        NonFiniteLossError: before the optimiser step, so the weights are still good.
        AlignmentError: rows of teacher and student that do not correspond.
    """
    config, processes = trainee.config, trainee.accelerator.num_processes
    prompt_tokens = [trainee.student_adapter.prompt_tokens(group.sample) for group in groups]
    response_tokens = [[len(response.token_ids) for response in group.responses] for group in groups]
    trainee.weighting.begin_round(groups)
    assert max(map(max, response_tokens), default=0) <= trainee.layouts.response_tokens
    prints = [
        footprint(prompt, responses, trainee.layouts.student)
        for prompt, responses in zip(prompt_tokens, response_tokens, strict=True)
    ]
    longest = [p.longest for p in prints]
    sequences = max((p.sequences for p in prints), default=1)
    plan = plan_round(
        longest,
        pairs_per_step=config.pairs_per_step,
        micro_batch_tokens=config.micro_batch_tokens,
        sequences_per_pair=sequences,
        processes=processes,
        seed=seed,
    )
    padding = padding_share(plan, longest, [p.tokens for p in prints], sequences)
    # speed counts every response with its prompt, so that layouts compare
    read = [
        footprint(prompt, responses, "separate").tokens
        for prompt, responses in zip(prompt_tokens, response_tokens, strict=True)
    ]
    for step in plan[trainee.step - first_step :]:
        began = time.perf_counter()
        mine = step.by_process[trainee.accelerator.process_index]
        metrics = _optimiser_step(trainee, groups, mine)
        pairs = [i for process in step.by_process for micro in process if micro.counts for i in micro.pairs]
        metrics["train/tokens_per_second"] = sum(read[i] for i in pairs) / (time.perf_counter() - began)
        metrics["train/padding_share"] = padding
        on_step(metrics)
        if trainee.step % RETURN_MEMORY_STEPS == 0:
            return_freed_memory(everything=False)
        # the round's end has a checkpoint and measurement of its own
        last = trainee.step - first_step == len(plan)
        if not last and config.evaluate_steps and trainee.step % config.evaluate_steps == 0:
            on_evaluate()
        if not last and trainee.step % config.checkpoint_steps == 0:
            on_checkpoint()


def _optimiser_step(
    trainee: Trainee, groups: Sequence[Group], micro_batches: Sequence[MicroBatch]
) -> dict[str, float]:
    accelerator = trainee.accelerator
    # dropout noise is a function of the step, so a resumed run draws the same
    torch.manual_seed(step_seed(trainee.seed, trainee.step, accelerator.process_index))
    beta = trainee.beta.value(trainee.step, trainee.total_steps)
    prepared = [_prepare(trainee, [groups[i] for i in micro.pairs]) for micro in micro_batches]
    counted = [p for p, micro in zip(prepared, micro_batches, strict=True) if micro.counts]
    counts = _global_counts(trainee, counted)

    trainee.distiller.train()
    losses: list[Tensor] = []
    auxiliary = torch.zeros(1, dtype=torch.float64, device=accelerator.device)
    statistics = _StepStatistics(trainee.objective, len(trainee.tasks), accelerator.device)
    for index, (batch, micro) in enumerate(zip(prepared, micro_batches, strict=True)):
        output = _forward(trainee, batch, trainee.objective, beta, counts, additions=trainee.additions)
        # gradients are averaged over processes, and the loss is a sum over them
        loss = output.loss * (accelerator.num_processes if micro.counts else 0.0)
        if index + 1 < len(prepared):
            with accelerator.no_sync(trainee.distiller):
                accelerator.backward(loss)
        else:
            accelerator.backward(loss)
        losses.append(output.loss.detach())
        if micro.counts:
            statistics.add(output, batch.rows)
            auxiliary += 0.0 if output.auxiliary is None else output.auxiliary
    del output, loss
    sums = accelerator.reduce(statistics.packed(), reduction="sum")
    _refuse_non_finite(trainee, sums[0], losses, prepared)
    norm = accelerator.clip_grad_norm_(trainee.distiller.parameters(), trainee.config.max_grad_norm)
    _refuse_non_finite(trainee, norm, losses, prepared)
    rate = trainee.learning_rate(trainee.step)
    for parameter_group in trainee.optimizer.param_groups:
        parameter_group["lr"] = rate
    trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)
    trainee.step += 1
    metrics = statistics.observe(sums, trainee.alpha, trainee.weighting)
    if trainee.objective.uses_beta:
        metrics["train/beta"] = beta
    if trainee.additions.auxiliary is not None:
        metrics["train/auxiliary_loss"] = float(accelerator.reduce(auxiliary, reduction="sum"))
    return {
        "train/loss": float(sums[0]),
        "train/learning_rate": rate,
        "train/grad_norm": float(norm),
        **metrics,
    }


def heldout_nats(trainee: Trainee, groups: Sequence[Group]) -> float:
    """KL(teacher ‖ student) on held-out teacher responses, nats per token, over all processes.

    The mean over responses of their means over tokens, as the report's `kl_teacher_model`. Without a teacher
    the responses are reference answers, and it is −log q(y).
    """
    measured = WITHOUT_TEACHER if trainee.teacher is None else WITH_TEACHER
    accelerator = trainee.accelerator
    lengths = [
        trainee.student_adapter.prompt_tokens(g.sample) + len(g.responses[0].token_ids) for g in groups
    ]
    (step,) = plan_round(
        lengths,
        pairs_per_step=len(groups),
        micro_batch_tokens=trainee.config.micro_batch_tokens,
        sequences_per_pair=1,
        processes=accelerator.num_processes,
        seed=0,
    )
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    trainee.distiller.eval()
    with torch.no_grad():
        for micro in step.by_process[accelerator.process_index]:
            batch = _prepare(trainee, [groups[i] for i in micro.pairs])
            counts = GlobalCounts(1.0, (1.0, 1.0, 1.0))
            output = _forward(trainee, batch, measured, 0.5, counts)
            if micro.counts:
                response_N = batch.rows.response_N
                sums_R = torch.zeros(len(batch.groups), dtype=torch.float64, device=accelerator.device)
                sums_R.index_add_(0, response_N, output.nats_N.double())
                means_R = sums_R / torch.bincount(response_N, minlength=len(sums_R))
                total += torch.stack([means_R.sum(), means_R.new_tensor(len(means_R))])
    total = accelerator.reduce(total, reduction="sum")
    return float(total[0] / total[1])


def step_seed(*parts: int) -> int:
    """A 63-bit seed out of several numbers."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _prepare(trainee: Trainee, groups: Sequence[Group]) -> Prepared:
    layouts = trainee.layouts
    readers = {"student": (trainee.student_adapter, layouts.student)}
    if trainee.teacher is not None and trainee.teacher.reads_encodings:
        readers["teacher"] = (trainee.teacher_adapter, layouts.teacher)
    encodings = {}
    for name, (adapter, layout) in readers.items():
        encodings[name] = adapter.encode(groups, layout=layout)
        adapter.check(groups, encodings[name])
    check_alignment(groups, encodings, trainee.vocabulary)
    rows = response_rows(groups, encodings["student"], trainee.tasks)
    device = trainee.accelerator.device
    on_device = {name: to_device(encoded, device) for name, encoded in encodings.items()}
    rows = ResponseRows(*(tensor.to(device) for tensor in rows))
    return Prepared(groups, on_device["student"], on_device.get("teacher"), rows)


def _forward(
    trainee: Trainee,
    batch: Prepared,
    objective: Objective,
    beta: float,
    counts: GlobalCounts,
    additions: Additions = NOTHING,
) -> ObjectiveOutput:
    signal: Signal | None = None
    beside: Beside | None = None
    inner_N = None
    if trainee.teacher is not None and (objective.needs_teacher or additions.read_teacher):
        encoded = batch.teacher
        if additions.auxiliary is not None:
            assert encoded is not None
            rows = additions.auxiliary.activations(batch.groups, batch.student, encoded)
            encoded = encoded._replace(rows_N=torch.cat([encoded.rows_N, rows.teacher_rows_Y]))
        signal = trainee.teacher.signal(batch.groups, encoded)
        if additions.auxiliary is not None:
            signal, there = split_rows(signal, len(rows.teacher_rows_Y))
            beside = Beside(additions.auxiliary, there, rows)
        if additions.row_weights is not None:
            inner_N = additions.row_weights(batch, signal)
    weights_N = weigher = None
    if objective is trainee.objective:  # what is measured beside is measured plainly
        decode = trainee.student_adapter.decode
        weights_N = trainee.weighting.of_responses(batch.rows)
        weigher = trainee.weighting.within_responses(batch.groups, batch.rows, decode, inner_N)
        if weigher is None and inner_N is not None:
            weights_N = inner_N if weights_N is None else weights_N * inner_N
    output: ObjectiveOutput = trainee.distiller(
        batch.student.inputs,
        batch.student.rows_N,
        batch.rows,
        signal if objective.needs_teacher else None,
        objective=objective,
        alphas=trainee.alpha.alphas,
        alpha_needs_gap=trainee.alpha.needs_own_gap,
        beta=beta,
        counts=counts,
        row_weights_N=weights_N,
        row_weigher=weigher,
        beside=beside,
    )
    return output


def to_device(encoded: Encoded, device: torch.device) -> Encoded:
    """The same encoding with its tensors on another device."""
    inputs = {key: value.to(device) for key, value in encoded.inputs.items()}
    return Encoded(inputs, *(tensor.to(device) for tensor in encoded[1:]))


def _global_counts(trainee: Trainee, counted: Sequence[Prepared]) -> GlobalCounts:
    local = torch.zeros(1 + len(SIDES), dtype=torch.float64, device=trainee.accelerator.device)
    for batch in counted:
        local[0] += len(batch.groups)
        local[1:] += torch.bincount(batch.rows.side_R[batch.rows.response_N], minlength=len(SIDES))
    pairs, *rows = trainee.accelerator.reduce(local, reduction="sum").tolist()
    return GlobalCounts(pairs=pairs, rows_S=tuple(rows))


class _StepStatistics:
    """Sums over responses that become a step's metrics once they are added up over processes."""

    def __init__(self, objective: Objective, tasks: int, device: torch.device) -> None:
        self._objective = objective
        self._tasks = tasks
        self._cells = len(SIDES) * tasks
        self._loss = torch.zeros(1, dtype=torch.float64, device=device)
        self._sums_3C = torch.zeros(3, self._cells, dtype=torch.float64, device=device)  # count, gap, alpha

    def add(self, output: ObjectiveOutput, rows: ResponseRows) -> None:
        """Count a micro-batch."""
        self._loss += output.loss.detach().double()
        ones_R = torch.ones_like(rows.cell_R, dtype=torch.float64)
        for sums_C, values_R in zip(self._sums_3C, (ones_R, output.gap_R, output.alpha_R), strict=True):
            if values_R is not None:
                sums_C.index_add_(0, rows.cell_R, values_R.double())

    def packed(self) -> Tensor:
        """One vector to add up over processes; its first entry is the loss."""
        return torch.cat([self._loss, self._sums_3C.flatten()])

    def observe(self, sums: Tensor, alpha: AlphaCurriculum, weighting: Weighting) -> dict[str, float]:
        """Feed curriculum and weights with the global sums, and return what there is of gaps and skews."""
        count_C, gap_C, alpha_C = sums[1:].view(3, self._cells).cpu()
        if self._objective.uses_alpha_curriculum:
            alpha.observe(gap_C, count_C)
        metrics = weighting.observe(gap_C, count_C)
        for index, side in enumerate(SIDES):
            cells = slice(index * self._tasks, (index + 1) * self._tasks)
            count = count_C[cells].sum()
            if count > 0 and self._objective.needs_teacher:
                metrics[f"train/gap_{side}"] = float(gap_C[cells].sum() / count)
            if count > 0 and self._objective.uses_alpha_curriculum:
                metrics[f"train/alpha_{side}"] = float(alpha_C[cells].sum() / count)
        return metrics


def _refuse_non_finite(
    trainee: Trainee, value: Tensor, losses: Sequence[Tensor], prepared: Sequence[Prepared]
) -> None:
    if torch.isfinite(value):
        return
    bad = [
        group.sample.id
        for loss, batch in zip(losses, prepared, strict=True)
        if not torch.isfinite(loss)
        for group in batch.groups
    ]
    where = (
        f"in the micro-batch of samples {', '.join(bad)}" if bad else "in the gradient, or on another process"
    )
    raise NonFiniteLossError(
        f"step {trainee.step + 1}: the loss is not finite {where}. The weights are still those of step "
        f"{trainee.step}. Lower training.learning_rate, or look at these samples; the last checkpoint is "
        "intact."
    )
