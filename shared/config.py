"""What can be set in a run? The sections that every modality shares.

A setting that cannot take effect beside the others is an error, unless it only repeats its default: so the
resolved configuration of a run, defaults written out, can be read again. `config_files` does the reading.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.errors import UserError
from shared.models.references import ModelRef
from shared.objectives.objective import build_objective
from shared.types import TaskName

Column = Literal[
    "messages",
    "conversations",
    "prompt",
    "question",
    "instruction",
    "input",
    "system",
    "image",
    "images",
    "id",
    "task",
    "reference",
    "output",
    "answer",
    "chosen",
    "rejected",
]
PairLayout = Literal["auto", "joint", "separate"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A part of a configuration: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _refuse_idle(section: BaseModel, *names: str, where: str = "", because: str, instead: str) -> None:
    """Refuse settings that differ from their default where they have no effect."""
    fields = type(section).model_fields
    idle = [
        f"{where}{name}"
        for name in names
        if getattr(section, name) != fields[name].get_default(call_default_factory=True)
    ]
    if idle:
        them = "them" if len(idle) > 1 else "it"
        raise ValueError(f"no effect of {', '.join(idle)} {because}; remove {them}, or {instead}")


class TeacherConfig(Section):
    """The model whose responses and distributions are learned."""

    model: ModelRef
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


class LoraConfig(Section):
    """Low-rank updates; defaults are the paper's rank with peft's usual scaling."""

    r: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.05, ge=0.0, lt=1.0)
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class PruneConfig(Section):
    """Which blocks of the starting model are left out. Exactly one of the three."""

    drop_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, min_length=1, description="indices of the blocks to drop"
    )
    keep_every: int | None = Field(None, ge=2, description="keep block 0, n, 2n, ...")
    block_influence: int | None = Field(
        None,
        ge=1,
        description="how many of the least influential blocks to drop, measured on training prompts",
    )
    calibration_prompts: int = Field(16, ge=1, description="prompts that block influence is measured on")

    @model_validator(mode="after")
    def _exactly_one(self) -> PruneConfig:
        given = [k for k in ("drop_layers", "keep_every", "block_influence") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of drop_layers, keep_every, block_influence; got "
                f"{', '.join(given) or 'none'}"
            )
        if self.block_influence is None:
            _refuse_idle(
                self, "calibration_prompts", because=f"with {given[0]}", instead="prune by block_influence"
            )
        return self


class StudentConfig(Section):
    """The model that is trained. `model: teacher` starts from the teacher's own weights."""

    model: ModelRef
    method: Literal["full", "lora", "dora"] = "full"
    lora: LoraConfig | None = None
    prune: PruneConfig | None = None
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the weights that are stored and trained"
    )

    @model_validator(mode="after")
    def _all_has_effect(self) -> StudentConfig:
        if not self.uses_lora:
            _refuse_idle(self, "lora", because="with method: full", instead="set method: lora or dora")
        if self.starts_from_teacher:
            _refuse_idle(
                self.model,
                *(name for name in ModelRef.model_fields if name != "name"),
                where="model.",
                because="with model: teacher, which is the teacher as teacher.model gives it",
                instead="set it there",
            )
        return self

    @property
    def uses_lora(self) -> bool:
        """Whether low-rank updates are trained."""
        return self.method != "full"

    @property
    def starts_from_teacher(self) -> bool:
        """Whether the student is made out of the teacher's weights."""
        return self.model.name == "teacher"


class HubData(Section):
    """A data set of the hub, or a local folder of data files, read through `datasets`."""

    id: str = Field(min_length=1, description="as in HuggingFaceH4/ultrachat_200k, or a folder")
    config: str | None = None
    split: str = "train"
    revision: str | None = Field(None, description="branch, tag or commit")

    @property
    def label(self) -> str:
        """How messages call it."""
        return "/".join(filter(None, (self.id, self.config, self.split)))


class PromptSource(Section):
    """A file or a data set of prompts. docs/DATA.md shows the rows."""

    path: str | None = Field(None, description="a file, or pkg://PACKAGE/FILE")
    hub: HubData | None = None
    task: TaskName | None = Field(None, description="for rows that name none; default instruction")
    limit: int | None = Field(None, ge=1, description="how many prompts to take, after the shuffle")
    shuffle: bool = False
    weight: float | None = Field(None, gt=0, description="this source's share of the mixture, in proportion")
    columns: dict[Column, str | int] = Field(
        default_factory=dict, description="our name: the source's; a number where rows are lists"
    )
    ids: Literal["own", "place"] = Field("own", description="place: FILE:ROW, for ids that are not unique")
    turns: Literal["last", "all"] = Field("last", description="all: each user turn of a chat is a prompt")
    system: str | None = Field(None, description="put before chats that have no system turn")
    template: str | None = Field(None, description="around a plain prompt, which takes the place of {}")
    image_root: str | None = Field(None, description="folder that holds all images; default the file's")
    image_name: str | None = Field(None, description="path of an image, its column in the place of {}")

    @model_validator(mode="after")
    def _one_place(self) -> PromptSource:
        if (self.path is None) == (self.hub is None):
            raise ValueError(f"give path or hub; got {'both' if self.path else 'neither'}")
        for name in ("template", "image_name"):
            text = getattr(self, name)
            if text is not None and text.count("{}") != 1:
                raise ValueError(f"{name}: {text!r} needs {{}} once, where the row's own text goes")
        return self

    @property
    def label(self) -> str:
        """How messages call it."""
        return self.hub.label if self.hub else str(self.path)


class ImagesConfig(Section):
    """What is refused of the images in prompts, before it is read or decoded."""

    allow_remote: bool = Field(False, description="fetch the images that rows name by http(s) URL")
    timeout_s: float = Field(20.0, gt=0, description="for one image of the web")
    max_bytes: int = Field(64 * 2**20, ge=1, description="of the encoded file")
    max_pixels: int = Field(64_000_000, ge=1, le=178_956_970, description="at most where Pillow stops")

    @model_validator(mode="after")
    def _all_has_effect(self) -> ImagesConfig:
        if not self.allow_remote:
            _refuse_idle(
                self, "timeout_s", because="without allow_remote: true", instead="set allow_remote: true"
            )
        return self


class DecontaminationConfig(Section):
    """Training prompts that are in the evaluation are left out, and named."""

    against: tuple[str, ...] = Field((), description="evaluation files, of the types that prompt files have")
    heldout: bool = Field(False, description="compare with the held-out prompts as well")
    ngram: int = Field(13, ge=4, description="words in a row that must not be shared")

    @model_validator(mode="after")
    def _all_has_effect(self) -> DecontaminationConfig:
        if not self.against and not self.heldout:
            raise ValueError("give evaluation files as `against`, or set heldout: true")
        return self


class PromptsConfig(Section):
    """What is asked: for training, and held out to measure."""

    train: tuple[PromptSource, ...] = Field(min_length=1)
    heldout: tuple[PromptSource, ...] = Field(min_length=1)
    over_length: Literal["fail", "drop"] = Field("fail", description="prompts that do not fit the context")
    on_bad_row: Literal["fail", "skip"] = Field("fail", description="rows that cannot be used")
    images: ImagesConfig = ImagesConfig()
    decontamination: DecontaminationConfig | None = None


class FilterConfig(Section):
    """Responses that are not trained on; their pairs are left out, counted and listed."""

    roles: tuple[Literal["teacher", "student"], ...] = Field(
        ("teacher",), min_length=1, description="whose responses; a student learns from its own bad ones"
    )
    min_tokens: int = Field(1, ge=1, description="the turn's end counted")
    max_tokens: int | None = Field(None, ge=1)
    max_repetition: Fraction | None = Field(
        None, description="share of 4-grams that repeat, over all tokens or the last 64; 0.5 finds loops"
    )
    refusals: bool | tuple[str, ...] = Field(
        False, description="true for usual phrases, or phrases that an answer must not open with"
    )

    @model_validator(mode="after")
    def _possible(self) -> FilterConfig:
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(f"needs min_tokens <= max_tokens; got {self.min_tokens} and {self.max_tokens}")
        return self


class OfflineConfig(Section):
    """Responses out of files instead of a model: `columns` of the prompts, a file, or another run's store."""

    teacher: str | None = Field(None, description="columns: `chosen` or the reference answer")
    student: str | None = Field(None, description="columns: `rejected`")


class GenerationConfig(Section):
    """How responses are sampled (the paper's temperature 0.8 and top-p 0.95)."""

    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(0.8, ge=0.0, description="0 is greedy")
    top_p: float = Field(0.95, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=0, description="0 switches it off")
    batch_tokens: int = Field(
        8192, ge=1, description="prompt and response tokens of one batch, padding included"
    )
    truncated: Literal["keep", "drop"] = Field("keep", description="responses cut by max_new_tokens")
    filters: FilterConfig | None = None
    draws: int = Field(1, ge=1, description="responses of each model to a prompt, each a pair of its own")
    reuse_teacher: bool = Field(False, description="every round trains on the first one's teacher responses")
    offline: OfflineConfig = OfflineConfig()

    @model_validator(mode="after")
    def _all_has_effect(self) -> GenerationConfig:
        if self.offline.teacher is not None:
            _refuse_idle(
                self, "reuse_teacher", because="with offline.teacher", instead="have the teacher sample"
            )
        if self.draws > 1 and "columns" in (self.offline.teacher, self.offline.student):
            raise ValueError(f"draws: {self.draws}, and columns hold one answer a prompt; set draws: 1")
        if self.temperature == 0:
            _refuse_idle(
                self,
                "top_p",
                "top_k",
                because="with temperature: 0, which takes the most likely token",
                instead="set a temperature",
            )
        return self


class AlphaConfig(Section):
    """The skew's curriculum. `schedule: fixed` keeps `start` throughout."""

    schedule: Literal["curriculum", "fixed"] = "curriculum"
    start: float = Field(0.1, ge=0.0, lt=1.0)
    minimum: float = Field(0.01, ge=0.0, lt=1.0)
    maximum: float = Field(0.1, ge=0.0, lt=1.0)
    per: Literal["sample", "batch"] = "sample"

    @model_validator(mode="after")
    def _ordered(self) -> AlphaConfig:
        if self.schedule == "fixed":
            _refuse_idle(
                self,
                "minimum",
                "maximum",
                "per",
                because="with schedule: fixed",
                instead="set schedule: curriculum",
            )
        elif not self.minimum <= self.start <= self.maximum:
            raise ValueError(
                f"needs minimum <= start <= maximum; got {self.minimum}, {self.start}, {self.maximum}"
            )
        return self


class BetaConfig(Section):
    """The balance between the two sides. `schedule: fixed` keeps `start`."""

    schedule: Literal["curriculum", "fixed"] = "curriculum"
    start: Fraction = 0.5
    maximum: Fraction = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> BetaConfig:
        if self.schedule == "fixed":
            _refuse_idle(self, "maximum", because="with schedule: fixed", instead="set schedule: curriculum")
        elif self.start > self.maximum:
            raise ValueError(f"needs start <= maximum; got {self.start}, {self.maximum}")
        return self


class ObjectiveConfig(Section):
    """What is minimised; docs/OBJECTIVES.md has the table."""

    name: str = "distillm2"
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="phi, omega, lambda ... of that objective"
    )
    alpha: AlphaConfig = AlphaConfig()
    beta: BetaConfig = BetaConfig()
    normalization: Literal["response", "token"] = "response"

    @model_validator(mode="after")
    def _known_and_all_has_effect(self) -> ObjectiveConfig:
        try:
            objective = build_objective(self.name, self.parameters)
        except UserError as error:  # pydantic collects these with all other problems of the file
            raise ValueError(str(error)) from None
        because, instead = f"with objective {self.name!r}", "choose distillm2"
        if not objective.uses_alpha_curriculum:
            _refuse_idle(self, "alpha", because=because, instead=instead)
        if not objective.uses_beta:
            _refuse_idle(self, "beta", because=because, instead=instead)
        if objective.is_pairwise:
            _refuse_idle(self, "normalization", because=because, instead="choose another objective")
        return self


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
        if self.schedule == "constant" and self.warmup != 0:
            _refuse_idle(
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
    examples: int = Field(8, ge=0, description="prompts shown with the three answers in the report")
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
            _refuse_idle(
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
            _refuse_idle(
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
        for side in ("teacher", "student"):
            if side not in objective.sides:
                _refuse_idle(
                    self.generation.offline,
                    side,
                    where="generation.offline.",
                    because=f"with objective {objective.name!r}, which trains on no {side} response",
                    instead="choose another objective",
                )
        if self.training.rounds == 1 or "teacher" not in objective.sides:
            _refuse_idle(
                self.generation,
                "reuse_teacher",
                where="generation.",
                because="without teacher responses in a second round",
                instead="train more rounds",
            )
        if objective.sides == ("reference",):
            _refuse_idle(
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
        return self

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
