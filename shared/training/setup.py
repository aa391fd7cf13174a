"""How do a run's two models come to be? Loads them, prunes the student, and sets up its training."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.tracking import filter_trackers
from accelerate.utils import GradientAccumulationPlugin
from transformers import PreTrainedModel, get_scheduler

from shared.adapter import Adapter, AdapterKind
from shared.config import RunConfig, TrainingConfig
from shared.config_models import PruneConfig
from shared.errors import UserError
from shared.models.heads import causal_lm_of, check_head, logit_width
from shared.models.layer_choice import keep_layers
from shared.models.pruning import block_influence, blocks_of, prune_blocks
from shared.models.quantization import (
    check_quantized_student,
    in_number_format,
    is_quantized,
    refuse_other_bits,
)
from shared.models.teachers import LocalTeacher, fingerprint_of_model
from shared.models.vocabulary import SharedVocabulary, shared_vocabulary
from shared.objectives.curriculum import AlphaCurriculum, BetaSchedule
from shared.objectives.objective import Objective
from shared.training.distiller import Distiller
from shared.training.layout import Layouts
from shared.training.loop import Trainee
from shared.training.weighting import Weighting
from shared.types import Sample, TaskName

SUPPORTED_WRAPPING = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


@dataclass
class Models:
    """A run's teacher and the student's starting point, with what each needs to read a sample."""

    teacher: PreTrainedModel | None  # None where a run does without (sft)
    teacher_adapter: Adapter  # the student's own where there is no teacher
    teacher_fingerprint: str
    start: PreTrainedModel | None  # what the student is made of; None, to free its memory, once it has been
    student_adapter: Adapter
    vocabulary: SharedVocabulary
    kept_layers: tuple[int, ...] | None = None  # of the model that the student was pruned from


def open_accelerator(config: TrainingConfig, folder: str, name: str) -> Accelerator:
    """Devices, processes, mixed precision and trackers.

    Raises:
        UserError: a kind of wrapping that checkpoints do not support yet.
    """
    missing = [name for name in config.trackers if not _tracker_installed(name)]
    if missing:  # accelerate would leave them out and go on
        raise UserError(
            f"training.trackers: {', '.join(missing)} not installed. Install with pip, or remove."
        )
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=list(config.trackers) or None,
        project_dir=folder,
        # a plugin, because a plain number gives way to an environment variable: our loss is divided already
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # without it DDP regroups its buckets after the first pass, and a resumed run adds up in another order
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.distributed_type not in SUPPORTED_WRAPPING:
        raise UserError(
            f"distributed type {accelerator.distributed_type.value!r} is not supported yet. "
            "Launch with DDP (accelerate launch --multi_gpu) or as a single process."
        )
    if config.trackers:
        accelerator.init_trackers(name)
    return accelerator


def open_models(config: RunConfig, kind: AdapterKind, device: torch.device) -> Models:
    """Load the teacher and the model that the student starts from, not pruned yet.

    Raises:
        UserError: a model that cannot be loaded, vocabularies that do not correspond.
    """
    student_adapter = kind.open(config.origin, {})
    start: Any = kind.load(config.origin, dtype=getattr(torch, config.student.dtype))
    if is_quantized(start):
        check_quantized_student(config.student)
        refuse_other_bits(start)
    start.to(device)
    teacher: Any = None
    teacher_adapter = student_adapter
    if config.teacher is not None:
        if config.student.starts_from_teacher and not is_quantized(start):
            teacher = copy.deepcopy(start).to(getattr(torch, config.teacher.dtype))
        else:
            if not config.student.starts_from_teacher:
                teacher_adapter = kind.open(config.teacher.model, {})
            teacher = load_teacher(config, kind, device)
    vocabulary = shared_vocabulary(
        teacher_adapter.vocabulary,
        student_adapter.vocabulary,
        teacher_width=logit_width(start if teacher is None else teacher),
        student_width=logit_width(start),
    )
    return Models(
        teacher=teacher,
        teacher_adapter=teacher_adapter,
        teacher_fingerprint="" if teacher is None else fingerprint_of_model(teacher),
        start=start,
        student_adapter=student_adapter,
        vocabulary=vocabulary,
    )


def load_teacher(config: RunConfig, kind: AdapterKind, device: torch.device) -> PreTrainedModel:
    """The teacher's weights from where they came."""
    assert config.teacher is not None
    dtype = getattr(torch, config.teacher.dtype)
    # a student of the teacher's own weights was loaded first, and its number format may have rounded them
    read_as = getattr(torch, config.student.dtype) if config.student.starts_from_teacher else dtype
    teacher: Any = kind.load(config.teacher.model, dtype=read_as)
    if is_quantized(teacher) and read_as != dtype:  # it computes in what it is loaded for
        teacher = kind.load(config.teacher.model, dtype=dtype)
    return in_number_format(teacher, dtype).to(device)  # type: ignore[no-any-return]


def prune_start(
    config: RunConfig, models: Models, calibration: Sequence[Sample], kept_layers: Sequence[int] | None
) -> None:
    """Prune the student's start as configured, and prove on a prompt that we read both models' heads right.

    Args:
        config: the run.
        models: its `start` is replaced.
        calibration: at least one prompt that fits both models.
        kept_layers: the blocks that an earlier session of this run kept: not chosen anew.

    Raises:
        UserError: blocks that cannot be dropped, a head that we would compute otherwise than the model does.
    """
    assert models.start is not None
    prune = config.student.prune
    if prune is not None:
        if kept_layers is None:
            kept_layers = _choose_layers(prune, models.start, models.student_adapter, calibration)
        models.start = prune_blocks(models.start, kept_layers)
        models.kept_layers = tuple(kept_layers)
    if models.teacher is not None:
        check_head(models.teacher, _inputs(models.teacher_adapter, calibration[:1], models.teacher.device))
    check_head(models.start, _inputs(models.student_adapter, calibration[:1], models.start.device))


def make_trainee(
    config: RunConfig,
    kind: AdapterKind,
    models: Models,
    accelerator: Accelerator,
    objective: Objective,
    *,
    samples: Sequence[Sample],
    tasks: Sequence[TaskName],
    total_steps: int,
    layouts: Layouts,
) -> Trainee:
    """The student ready to train, made of `models.start`, which is given up."""
    assert models.start is not None
    training = config.training
    student = kind.make_student(
        config.student, models.start, models.student_adapter, samples, seed=config.seed
    )
    models.start = None
    if training.gradient_checkpointing:
        causal_lm_of(student).gradient_checkpointing_enable({"use_reentrant": False})
    distiller = Distiller(student, models.vocabulary, normalization=config.objective.normalization)
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": training.weight_decay},
            # norms and biases: decay would pull a scale towards 0
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=training.learning_rate,
        betas=training.betas,
    )
    schedule = get_scheduler(
        training.schedule, optimizer, round(training.warmup * total_steps), num_training_steps=total_steps
    )
    factor = schedule.lr_lambdas[0]  # a pure function of the step
    distiller, optimizer = accelerator.prepare(distiller, optimizer)
    alpha = config.objective.alpha
    beta = config.objective.beta
    teacher = None
    if models.teacher is not None:
        teacher = LocalTeacher(models.teacher, models.teacher_adapter, models.vocabulary)
    return Trainee(
        accelerator=accelerator,
        distiller=distiller,
        optimizer=optimizer,
        learning_rate=lambda step: training.learning_rate * factor(step),
        student_adapter=models.student_adapter,
        teacher=teacher,
        teacher_adapter=models.teacher_adapter,
        vocabulary=models.vocabulary,
        objective=objective,
        alpha=AlphaCurriculum(
            schedule=alpha.schedule,
            start=alpha.start,
            minimum=alpha.minimum,
            maximum=alpha.maximum,
            per=alpha.per,
            tasks=tuple(tasks),
            start_C=[
                alpha.start if entry.alpha is None else entry.alpha for entry in config.objective.cells(tasks)
            ],
        ),
        beta=BetaSchedule(schedule=beta.schedule, start=beta.start, maximum=beta.maximum),
        tasks=tuple(tasks),
        config=training,
        seed=config.seed,
        total_steps=total_steps,
        layouts=layouts,
        weighting=Weighting(config.objective, tasks),
    )


def _tracker_installed(name: str) -> bool:
    return bool(filter_trackers([name], logging_dir="."))


def _choose_layers(
    config: PruneConfig,
    model: PreTrainedModel,
    adapter: Adapter,
    calibration: Sequence[Sample],
) -> tuple[int, ...]:
    influence = None
    if config.block_influence is not None:
        batches = (_inputs(adapter, [sample], model.device) for sample in calibration)
        influence = block_influence(model, batches)
    return keep_layers(config, len(blocks_of(model)), influence)


def _inputs(adapter: Adapter, samples: Sequence[Sample], device: torch.device) -> dict[str, torch.Tensor]:
    return {key: value.to(device) for key, value in adapter.encode_prompts(samples).items()}
