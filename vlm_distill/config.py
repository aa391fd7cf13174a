"""What can a vision-language run be configured with? The shared sections, and what is done with each part."""

from __future__ import annotations

from pydantic import Field, model_validator

from shared.config import RunConfig
from shared.config_models import StudentConfig
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
    def uses_lora(self) -> bool:
        """Whether low-rank updates are trained, of the whole or of a part."""
        return self.method != "full" or (
            self.parts is not None and "lora" in self.parts.model_dump().values()
        )


class VlmRunConfig(RunConfig):
    """One vision-language distillation run: `distill-vlm run CONFIG`."""

    student: VlmStudentConfig
