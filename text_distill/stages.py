"""What can a stage of a text recipe be? A run, and nothing else yet."""

from __future__ import annotations

from pydantic import Field

from shared.recipe import RecipeConfig, Stage
from text_distill.config import TextRunConfig


class TextStage(Stage):
    """A stage of a recipe."""

    run: TextRunConfig | None = None


class TextRecipeConfig(RecipeConfig):
    """Runs that follow each other, such as sft and then distillation."""

    stages: tuple[TextStage, ...] = Field(min_length=1)
