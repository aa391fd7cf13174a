"""What can be set of the two models of a run?"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shared.config_section import Section, refuse_idle
from shared.models.references import ModelRef


class CacheConfig(Section):
    """The teacher's likeliest tokens, on the disk: it is not in memory while the student trains."""

    top_k: int = Field(64, ge=1, description="tokens kept at every position; the rest is one tail")
    folder: str | None = Field(
        None, description="for runs that train on the same responses; default the run's own folder"
    )
    student_responses: bool = Field(
        False, description="also for offline student responses, where a top-k shows much less"
    )


class TeacherConfig(Section):
    """The model whose responses and distributions are learned."""

    model: ModelRef
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    cache: CacheConfig | None = Field(None, description="{} for all defaults; docs/SCALING.md")


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
            refuse_idle(
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
            refuse_idle(self, "lora", because="with method: full", instead="set method: lora or dora")
        if self.starts_from_teacher:
            refuse_idle(
                self.model,
                *(name for name in ModelRef.model_fields if name != "name"),
                where="model.",
                because="with model: teacher, which is the teacher as teacher.model gives it",
                instead="set it there",
            )
        return self

    @property
    def how(self) -> str:
        """What of it is trained, in words."""
        return self.method

    @property
    def uses_lora(self) -> bool:
        """Whether low-rank updates are trained."""
        return self.method != "full"

    @property
    def starts_from_teacher(self) -> bool:
        """Whether the student is made out of the teacher's weights."""
        return self.model.name == "teacher"
