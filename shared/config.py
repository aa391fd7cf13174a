"""What can be set in a run? The sections that every modality shares; `config_files` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from shared.config_data import GenerationConfig, PromptsConfig
from shared.config_models import CacheConfig, StudentConfig, TeacherConfig
from shared.config_objective import ObjectiveConfig
from shared.config_section import Fraction, Section, refuse_idle
from shared.models.references import ModelRef
from shared.objectives.objective import Objective, build_objective

PairLayout = Literal["auto", "joint", "separate"]
PairAttention = Literal["dense", "flex"]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]


class TrainingConfig(Section):
    """Rounds, steps and the optimiser."""

    rounds: int = Field(2, ge=1, description="each samples responses, then trains on them for one epoch")
    pairs_per_step: int = Field(ge=1, description="the global batch; does not depend on processes or memory")
    micro_batch_tokens: int = Field(4096, ge=1, description="padded tokens of one forward and backward pass")
    pair_layout: PairLayout = Field(
        "auto",
        description="joint: [prompt | y_t | y_s], the prompt computed once; separate: a sequence a response; "
        "auto: joint wherever a model is known to read it right",
    )
    pair_attention: PairAttention = Field(
        "dense",
        description="of joint pairs. dense: the model's own (SDPA) under a mask of all tokens by all; flex: "
        "flex attention, which skips what a response does not see; needs CUDA",
    )
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0)
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup: Fraction = Field(0.1, description="share of all steps")
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    checkpoint_steps: int = Field(50, ge=1, description="optimiser steps between checkpoints")
    evaluate_steps: int | None = Field(
        None, ge=1, description="between held-out measurements; default: round ends"
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "clearml"], ...] = ()

    @model_validator(mode="after")
    def _all_has_effect(self) -> TrainingConfig:
        if self.pair_layout == "separate":
            refuse_idle(
                self,
                "pair_attention",
                because="with pair_layout: separate",
                instead="set pair_layout: auto",
            )
        if self.schedule == "constant" and self.warmup != 0:
            refuse_idle(
                self,
                "warmup",
                because="with schedule: constant",
                instead="set schedule: constant_with_warmup",
            )
        return self


class ExportConfig(Section):
    """Which weights the export holds."""

    checkpoint: Literal["last", "best"] = Field("last", description="best: lowest held-out KL")


class EvaluationConfig(Section):
    """What is measured at the end: `agreement` on held-out prompts, and tasks of `distill-eval`.

    Tasks are named here and known to the harness, which checks them before the run.
    """

    limit: int | None = Field(
        None, ge=1, description="held-out prompts, and questions of a task that sets no limit; default all"
    )
    suites: tuple[str, ...] = Field((), description="of tasks, such as code")
    tasks: tuple[str | dict[str, Any], ...] = Field(
        (), description="gsm8k, or {name: gsm8k, limit: 50, data: {path: FILE}}"
    )
    judge: dict[str, Any] | None = Field(
        None, description="grades the instruction tasks: {model: server:URL#MODEL, mode: single}"
    )
    max_new_tokens: int | None = Field(None, ge=1, description="of a task that sets none; default its own")
    batch_tokens: int | None = Field(
        None, ge=1, description="of the tasks' batches; default generation.batch_tokens"
    )
    allow_unsafe_execution: bool = Field(
        False, description="run programs that a model wrote even where nothing isolates them"
    )

    @model_validator(mode="after")
    def _all_has_effect(self) -> EvaluationConfig:
        if not self.suites and not self.tasks:
            refuse_idle(
                self,
                "judge",
                "max_new_tokens",
                "batch_tokens",
                "allow_unsafe_execution",
                because="without evaluation.tasks or suites",
                instead="name tasks",
            )
        return self


class RunConfig(Section):
    """One run. Modality packages compose their own from it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output: str | None = Field(None, description="run folder; default runs/NAME")
    seed: int = Field(0, ge=0)
    teacher: TeacherConfig | None = Field(None, description="left out only where no objective needs one: sft")
    student: StudentConfig
    prompts: PromptsConfig
    generation: GenerationConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig
    export: ExportConfig = ExportConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _all_has_effect(self) -> RunConfig:
        if self.training.rounds == 1:
            refuse_idle(
                self.objective.alpha,
                "minimum",
                "maximum",
                "per",
                where="objective.alpha.",
                because="with training.rounds: 1, which only measures what a second round would use",
                instead="train more rounds",
            )
        objective = build_objective(self.objective.name, self.objective.parameters)
        if self.teacher is None and (objective.sides != ("reference",) or self.student.starts_from_teacher):
            raise ValueError(
                "teacher: required, and not given. Only objective sft with a student.model of its own does "
                f"without; this is {objective.name!r} with student.model {self.student.model.name!r}."
            )
        for place in self.prompts.written:
            if self.teacher is None:
                raise ValueError(
                    f"prompts.{place}.written: the teacher writes these prompts, and this run has none. "
                    "Give a teacher, or prompts as a file"
                )
            if place.startswith("train") and "reference" in objective.sides:
                raise ValueError(
                    f"prompts.{place}.written: the teacher writes prompts without reference answers, and "
                    f"objective {objective.name!r} trains on them. Choose another objective, or give prompts "
                    "as a file"
                )
        for side in ("teacher", "student"):
            if side not in objective.sides:
                refuse_idle(
                    self.generation.offline,
                    side,
                    where="generation.offline.",
                    because=f"with objective {objective.name!r}, which trains on no {side} response",
                    instead="choose another objective",
                )
        if "student" not in objective.sides:
            refuse_idle(
                self.generation,
                "refresh",
                where="generation.",
                because=f"with objective {objective.name!r}, which trains on no student response",
                instead="choose another objective",
            )
        if self.training.rounds == 1 or "teacher" not in objective.sides:
            refuse_idle(
                self.generation,
                "reuse_teacher",
                where="generation.",
                because="without teacher responses in a second round",
                instead="train more rounds",
            )
        if objective.sides == ("reference",):
            refuse_idle(
                self.generation,
                "truncated",
                "filters",
                "draws",
                where="generation.",
                because=f"with objective {objective.name!r}, which trains on no sampled response",
                instead="choose another objective",
            )
        if len(objective.sides) < 2 and self.training.pair_layout == "joint":
            raise ValueError(
                f"no effect of training.pair_layout: joint with objective {objective.name!r}, which has "
                "one response a prompt; remove it, or choose another objective"
            )
        if len(objective.sides) < 2:
            refuse_idle(
                self.training,
                "pair_attention",
                where="training.",
                because=f"with objective {objective.name!r}, which has one response a prompt",
                instead="choose another objective",
            )
        if self.teacher is not None and self.teacher.cache is not None:
            self._refuse_uncacheable(self.teacher.cache, objective)
        return self

    def _refuse_uncacheable(self, cache: CacheConfig, objective: Objective) -> None:
        generation, sides = self.generation, objective.sides
        if not objective.needs_teacher:
            raise ValueError(
                f"no effect of teacher.cache with objective {objective.name!r}, which trains on responses "
                "alone; remove it, or choose another objective"
            )
        if "student" not in sides:
            refuse_idle(
                cache,
                "student_responses",
                where="teacher.cache.",
                because=f"with objective {objective.name!r}, which trains on no student response",
                instead="choose another objective",
            )
        elif not cache.student_responses or generation.offline.student is None:
            raise ValueError(
                f"teacher.cache: objective {objective.name!r} trains on student responses, and here they are "
                f"{'sampled anew' if generation.offline.student is None else 'offline'}. A cache serves them "
                "only out of files (generation.offline.student) and only if asked "
                "(teacher.cache.student_responses: true), because a top-k shows much less of the divergence "
                "there. Do both, choose an objective of teacher responses such as kd, or remove the cache"
            )
        reused = (
            self.training.rounds == 1 or generation.reuse_teacher or generation.offline.teacher is not None
        )
        if "teacher" in sides and not reused:
            raise ValueError(
                f"teacher.cache: the teacher answers anew in each of {self.training.rounds} rounds, and a "
                "cache is of responses that are used again. Set generation.reuse_teacher: true, "
                "generation.offline.teacher, or training.rounds: 1"
            )

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output or f"runs/{self.name}")

    @property
    def origin(self) -> ModelRef:
        """The model that the student is made from."""
        if self.student.starts_from_teacher and self.teacher is not None:
            return self.teacher.model
        return self.student.model
