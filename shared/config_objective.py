"""What can be set of the objective and its curricula?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from shared.config_section import Fraction, Section, refuse_idle
from shared.config_weights import CouplingConfig, CouplingTable, RowWeightsConfig
from shared.errors import UserError
from shared.objectives.coupling import Coupling, Table, couple
from shared.objectives.objective import SIDES, Objective, build_objective


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
    row_weights: RowWeightsConfig = RowWeightsConfig()
    coupling: CouplingTable = Field(
        default_factory=dict, description="task: {teacher or student: {divergence, weight, alpha, segmenter}}"
    )

    @model_validator(mode="after")
    def _known_and_all_has_effect(self) -> ObjectiveConfig:
        try:
            objective = self.build(tuple({*self.coupling, "instruction", "vqa"}))
        except UserError as error:  # pydantic collects these with all other problems of the file
            raise ValueError(str(error)) from None
        because, instead = f"with objective {self.name!r}", "choose distillm2"
        if not objective.uses_alpha_curriculum:
            refuse_idle(self, "alpha", because=because, instead=instead)
        if not objective.uses_beta:
            refuse_idle(self, "beta", because=because, instead=instead)
        if objective.is_pairwise:
            refuse_idle(
                self, "normalization", "row_weights", because=because, instead="choose another objective"
            )
        if not objective.needs_teacher and (self.row_weights.level == "response" or self.row_weights.tasks):
            raise ValueError(
                f"no effect of row_weights {because}, which asks for no distribution of the teacher and so "
                "knows no gap; remove level: response and tasks, or choose another objective"
            )
        for task, sides in self.coupling.items():
            for side, entry in sides.items():
                self._refuse_idle_entry(objective, f"coupling.{task}.{side}", entry)
        return self

    def build(self, tasks: Sequence[str]) -> Objective:
        """The objective, with a term for each of these tasks where the coupling tells them apart.

        Raises:
            UserError: an entry for a task that is not there, or that cannot take effect.
        """
        objective = build_objective(self.name, self.parameters)
        table: Table = {
            (task, side): Coupling(entry.divergence, entry.weight, entry.alpha)
            for task, sides in self.coupling.items()
            for side, entry in sides.items()
        }
        if self.row_weights.tasks is not None and len(tasks) == 1:
            raise UserError(
                f"no effect of objective.row_weights.tasks: all prompts are of task {tasks[0]!r}. Remove it, "
                "or name the tasks of the prompts (`task` of a source or a row)."
            )
        return couple(objective, tasks, table)

    def cells(self, tasks: Sequence[str]) -> list[CouplingConfig]:
        """The entry of each side of each task; one that says nothing where the table has none."""
        given = {(str(task), side): e for task, sides in self.coupling.items() for side, e in sides.items()}
        return [given.get((task, side), CouplingConfig.model_construct()) for side in SIDES for task in tasks]

    def _refuse_idle_entry(self, objective: Objective, where: str, entry: CouplingConfig) -> None:
        alpha = self.alpha
        if entry.segmenter is not None and self.row_weights.level == "token":
            raise ValueError(
                f"no effect of {where}.segmenter with row_weights.level: token; remove it, or "
                "set another level"
            )
        graded = entry.alpha is not None and objective.uses_alpha_curriculum and alpha.schedule != "fixed"
        if graded and not alpha.minimum <= (entry.alpha or 0.0) <= alpha.maximum:
            raise ValueError(
                f"{where}.alpha is {entry.alpha}; needs alpha.minimum <= it <= alpha.maximum, "
                f"{alpha.minimum} to {alpha.maximum}"
            )
