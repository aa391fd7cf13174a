"""What can be set of a vision-language run beside what all runs share? Everything here is off by default."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shared.config_section import Section


class ClipFilterConfig(Section):
    """Pairs are left out whose response scores less than `minimum` on its picture."""

    model: str = Field(description="an open_clip model with safetensors weights, hub id or folder")
    minimum: float = Field(gt=0, le=2.5, description="CLIPScore; that of usual captions is 0.6 to 0.9")
    roles: tuple[Literal["teacher", "student"], ...] = Field(("teacher",), min_length=1)


class AdvantageConfig(Section):
    """Tokens that the teacher would not have written without the picture count more."""

    kappa: float = Field(1.0, gt=0, description="a token e times as likely with the picture weighs 1 + kappa")


class PositionKLConfig(Section):
    """KL between teacher and student at the image tokens, beside the objective."""

    weight: float = Field(gt=0, description="of its mean over image tokens, in the loss")
    matching: Literal["grid", "hungarian"] = Field(
        "grid", description="by place, or by the likeness of what is predicted there"
    )


class VisionConfig(Section):
    """What is done with pictures in training."""

    tower_cache: tuple[Literal["teacher", "student"], ...] = Field(
        (), description="whose frozen tower looks at each picture once in the run, and remembers"
    )
    clip_filter: ClipFilterConfig | None = Field(None, description="responses unlike their picture")
    advantage: AdvantageConfig | None = Field(None, description="row weights by what the picture adds")
    position_kl: PositionKLConfig | None = Field(None, description="an auxiliary loss at image tokens")
