"""What can be set of the objective and its curricula?"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from shared.config_section import Fraction, Section, refuse_idle
from shared.errors import UserError
from shared.objectives.objective import build_objective


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
            refuse_idle(
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
            refuse_idle(self, "maximum", because="with schedule: fixed", instead="set schedule: curriculum")
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
            refuse_idle(self, "alpha", because=because, instead=instead)
        if not objective.uses_beta:
            refuse_idle(self, "beta", because=because, instead=instead)
        if objective.is_pairwise:
            refuse_idle(self, "normalization", because=because, instead="choose another objective")
        return self
