"""What does every part of a configuration have in common?

Unknown keys are errors, and so is a setting that cannot take effect beside the others, unless it only repeats
its default: so the resolved configuration of a run, defaults written out, can be read again.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of a configuration: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def refuse_idle(section: BaseModel, *names: str, where: str = "", because: str, instead: str) -> None:
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
