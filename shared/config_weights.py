"""What can be set of the weights of rows, tasks and responses beside the objective?"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from shared.config_section import Section, refuse_idle
from shared.types import TaskName

SegmenterName = Literal["sentences", "lines", "steps", "whole"]
SideName = Literal["teacher", "student", "reference"]


class TaskWeightsConfig(Section):
    """Tasks with a wide gap count more: w ∝ (relu(gap) + ε)^γ, clipped to [¼, 4], then a mean of 1."""

    gamma: float = Field(gt=0, description="1: in proportion to the gap; leave `tasks` out to switch it off")
    epsilon: float = Field(0.01, gt=0, description="keeps a learned task from vanishing; probability")
    momentum: float = Field(0.9, ge=0, lt=1, description="what a step leaves of the average gap before it")


class RowWeightsConfig(Section):
    """What a row counts within its response, and a response beside those of other tasks."""

    level: Literal["token", "segment", "response"] = Field(
        "token", description="the mean over rows, over segments, or over segments weighted by their gap"
    )
    tau: float | None = Field(None, gt=0, description="temperature of level response, in probability")
    tasks: TaskWeightsConfig | None = None

    @model_validator(mode="after")
    def _all_has_effect(self) -> RowWeightsConfig:
        if self.level == "response" and self.tau is None:
            raise ValueError("level: response needs tau, in units of probability; 0.1 is a start")
        if self.level != "response":
            because = f"with level: {self.level}, which looks at no gap"
            refuse_idle(self, "tau", because=because, instead="set level: response")
        return self


class CouplingConfig(Section):
    """What one side of one task has instead of the objective's own; what is left out stays."""

    divergence: str | None = Field(None, description="nll or a divergence; docs/OBJECTIVES.md has the table")
    weight: float = Field(1.0, gt=0, description="of this task's responses beside the other tasks'")
    alpha: float | None = Field(None, ge=0, lt=1, description="the skew's α₀")
    segmenter: SegmenterName | None = Field(None, description="what row_weights.level cuts into")

    @model_validator(mode="after")
    def _says_something(self) -> CouplingConfig:
        if self == CouplingConfig.model_construct():
            raise ValueError("couples nothing; give divergence, weight, alpha or segmenter, or remove it")
        return self


CouplingTable = dict[TaskName, dict[SideName, CouplingConfig]]
