"""What can a vision-language run be configured with? The shared sections, and what is done with each part."""

from __future__ import annotations

from pydantic import Field, model_validator

from shared.config import RunConfig
from shared.config_models import StudentConfig
from shared.config_section import refuse_idle
from shared.objectives.objective import build_objective
from vlm_distill.config_vision import VisionConfig
from vlm_distill.parts import PartsConfig


class VlmStudentConfig(StudentConfig):
    """The model that is trained, whole or part by part."""

    parts: PartsConfig | None = Field(
        None, description="tower, projector and language model: each frozen, lora or full"
    )

    @model_validator(mode="after")
    def _parts_say_how(self) -> VlmStudentConfig:
        if self.parts is None:
            return self
        if self.method != "full" and "lora" not in self.parts.model_dump().values():
            raise ValueError(f"no effect of method: {self.method} where parts names no part lora; remove it")
        return self

    @property
    def how(self) -> str:
        """What of it is trained, in words."""
        if self.parts is None:
            return self.method
        return ", ".join(f"{part.replace('_', ' ')} {how}" for part, how in self.parts.model_dump().items())

    @property
    def uses_lora(self) -> bool:
        """Whether low-rank updates are trained, of the whole or of a part."""
        return self.method != "full" or (
            self.parts is not None and "lora" in self.parts.model_dump().values()
        )


class VlmRunConfig(RunConfig):
    """One vision-language distillation run: `distill-vlm run CONFIG`."""

    student: VlmStudentConfig
    vision: VisionConfig = VisionConfig()

    @model_validator(mode="after")
    def _vision_has_effect(self) -> VlmRunConfig:
        vision = self.vision
        for model in (self.student.model, *([self.teacher.model] if self.teacher is not None else [])):
            if model.quantization is not None:
                raise ValueError(
                    f"quantization of {model.name!r} is for language models so far; remove it, or give a "
                    "checkpoint that is stored quantised as the teacher"
                )
        for place in self.prompts.written:
            raise ValueError(
                f"prompts.{place}.written: a teacher writes words and no pictures. Give questions about "
                "pictures as a file"
            )
        if "teacher" in vision.tower_cache and self.teacher is None:
            raise ValueError("vision.tower_cache names the teacher, and there is none; remove it")
        if "student" in vision.tower_cache and (
            self.student.parts is None or self.student.parts.tower != "frozen"
        ):
            raise ValueError(
                "vision.tower_cache: the student's tower is trained, so what it saw does not last; set "
                "student.parts: {tower: frozen}, or keep the teacher's alone"
            )
        objective = build_objective(self.objective.name, self.objective.parameters)
        for name in ("advantage", "position_kl"):
            if getattr(vision, name) is None:
                continue
            if self.teacher is None:
                raise ValueError(f"vision.{name} asks the teacher, and there is none; remove it")
            if self.teacher.cache is not None:
                raise ValueError(
                    f"vision.{name} asks the teacher at every step, and with teacher.cache it is not in "
                    "memory then; remove one"
                )
        if objective.is_pairwise:
            refuse_idle(
                vision,
                "advantage",
                where="vision.",
                because=f"with objective {objective.name!r}, which weighs pairs and no rows",
                instead="choose another objective",
            )
        if vision.clip_filter is not None and not set(vision.clip_filter.roles) & set(objective.sides):
            refuse_idle(
                vision,
                "clip_filter",
                where="vision.",
                because=f"with objective {objective.name!r}, which trains on no response of "
                f"{' or '.join(vision.clip_filter.roles)}",
                instead="choose another objective",
            )
        return self
