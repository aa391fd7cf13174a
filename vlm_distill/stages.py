"""What can a stage of a vision-language recipe be, besides a run: a tower's warm-up, a model's assembly."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from shared.config_data import PromptSource
from shared.progress import Speaker
from shared.recipe import RecipeConfig, Stage, StageKind
from vlm_distill.assembly import AssemblySpec
from vlm_distill.config import VlmRunConfig
from vlm_distill.towers import WEIGHTS_FILE, TowerSpec
from vlm_distill.warm_up import ImageCaption, WarmUpConfig

SMOKE_STEPS = 3


class WarmUpStage(WarmUpConfig):
    """Contrastive training of a tower on pictures and what they show."""

    tower: TowerSpec
    captions: Literal["easy-vqa"] | tuple[PromptSource, ...] = Field(
        description="rows with one image, whose reference is the caption; or easy-VQA's training pictures"
    )


class VlmStage(Stage):
    """A stage of a recipe: exactly one of the three."""

    warm_up: WarmUpStage | None = None
    assemble: AssemblySpec | None = None
    run: VlmRunConfig | None = None


class VlmRecipeConfig(RecipeConfig):
    """Stages that end in a distilled model."""

    stages: tuple[VlmStage, ...] = Field(min_length=1)


def warm_up(stage: WarmUpStage, folder: Path, seed: int, speaker: Speaker) -> None:
    """Train the tower, or finish what was begun.

    Raises:
        UserError: rows that are no picture with a caption, or whatever the warm-up meets.
    """
    from vlm_distill.warm_up import warm_up_tower

    settings = WarmUpConfig(**{name: getattr(stage, name) for name in WarmUpConfig.model_fields})
    with speaker.bar("warm-up") as bar:
        done = warm_up_tower(
            stage.tower,
            _captions(stage, folder),
            folder,
            settings,
            seed=seed,
            progress=lambda step, loss: bar(step, settings.steps, f"loss {loss:.3f}"),
        )
    speaker.say(f"  loss {done.loss:.3f} nats; {done.accuracy:.0%} of a batch nearest to their own caption")


def put_together(spec: AssemblySpec, folder: Path, seed: int, speaker: Speaker) -> None:
    """Assemble the model."""
    from vlm_distill.assembly import assemble

    assemble(spec, folder, seed=seed)
    speaker.say(f"  {folder}: {_first_paragraph(folder / 'README.md')}")


def _captions(stage: WarmUpStage, folder: Path) -> list[ImageCaption]:
    if stage.captions == "easy-vqa":
        from vlm_distill.easy_vqa import captioned_images

        return captioned_images("train")
    from shared.data.image_references import Handling, in_folder
    from shared.data.prompts import load_prompts
    from shared.errors import DataError

    images = folder.with_name(f"{folder.name}.images")
    samples, _ = load_prompts(
        stage.captions, seed=0, on_bad_row="fail", images=Handling(keep=in_folder(images), look="decode")
    )
    unusable = [sample.source for sample in samples if len(sample.images) != 1 or not sample.reference]
    if unusable:
        raise DataError(
            f"a warm-up needs one image and a caption (the reference answer) in every row; {len(unusable)} "
            f"rows have not ({', '.join(unusable[:3])}). Take them out."
        )
    return [ImageCaption(sample.images[0], sample.reference or "") for sample in samples]


def _first_paragraph(path: Path) -> str:
    paragraphs = path.read_text(encoding="utf-8").split("\n\n")
    return next((" ".join(p.split()) for p in paragraphs if p[:1] not in ("#", "-", "`")), "")


STAGE_KINDS = {
    "warm_up": StageKind(
        WEIGHTS_FILE, warm_up, lambda stage: stage.model_copy(update={"steps": min(stage.steps, SMOKE_STEPS)})
    ),
    "assemble": StageKind("", put_together),
}
