"""How does a LLaVA-style model come to be: tower + projector + language model, written as a model folder?

A tower of CLIP's shape gives a plain `LlavaForConditionalGeneration`; any other the registered model, which
transformers loads after `import vlm_distill`. The README of the folder says which.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from shared.config_section import Section
from shared.durable import committed_folder
from shared.errors import UserError
from shared.models.references import resolve_path
from vlm_distill.language import CHAT_TEMPLATE, IMAGE_TOKEN, LanguageSpec
from vlm_distill.towers import TowerSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


class ReductionSpec(Section):
    """How the grid of patch tokens shrinks: at most one of the two, by a factor for each side."""

    average_pool: int | None = Field(None, ge=2)
    pixel_shuffle: int | None = Field(None, ge=2)

    @model_validator(mode="after")
    def _at_most_one(self) -> ReductionSpec:
        if self.average_pool and self.pixel_shuffle:
            raise ValueError("give average_pool or pixel_shuffle, not both")
        return self

    @property
    def kind_and_factor(self) -> tuple[Literal["none", "average_pool", "pixel_shuffle"], int]:
        """As `projectors.Projector` takes it."""
        if self.average_pool:
            return "average_pool", self.average_pool
        return ("pixel_shuffle", self.pixel_shuffle) if self.pixel_shuffle else ("none", 1)


class AssemblySpec(Section):
    """A LLaVA-style model to be made."""

    vision: TowerSpec
    projector: Literal["linear", "mlp"] = "mlp"
    reduction: ReductionSpec = ReductionSpec()
    language: LanguageSpec
    chat_template: str | None = Field(None, description="Jinja text or a .jinja file; default LLaVA-1.5's")
    image_token: str = IMAGE_TOKEN
    dtype: Literal["float32", "bfloat16"] = "float32"


class Assembled(NamedTuple):
    """A model in memory."""

    model: PreTrainedModel
    processor: ProcessorMixin
    native: bool  # whether transformers loads it without us
    card: str


def assemble(spec: AssemblySpec, folder: Path, *, seed: int) -> None:
    """Write a complete model folder: configuration, weights, tokenizer, processor, chat template, README.

    Args:
        spec: the parts.
        folder: must not exist yet, or be empty; appears whole or not at all.
        seed: of every weight that is not loaded.

    Raises:
        UserError: a folder that holds something, or parts that do not exist or fit.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{str(folder)!r} is not empty. Assemble into a new folder.")
    made = build(spec, seed=seed)
    with committed_folder(folder) as unfinished:
        made.model.save_pretrained(unfinished)
        made.processor.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(made.card, encoding="utf-8")


def build(spec: AssemblySpec, *, seed: int) -> Assembled:
    """The assembled model in memory; a plain Llava where it can be one."""
    from vlm_distill.clip_conversion import as_llava, clip_image_processor, obstacles

    model, preprocess, tokenizer, sources = build_registered(spec, seed=seed)
    why_not = obstacles(model, preprocess)
    template = {"chat_template": tokenizer.chat_template, "image_token": spec.image_token}
    tokens = model.config.image_seq_length
    if why_not:
        from vlm_distill.processing import OpenClipImageProcessor, OpenClipLlavaProcessor

        own = OpenClipLlavaProcessor(
            OpenClipImageProcessor(**preprocess), tokenizer, image_seq_length=tokens, **template
        )
        return Assembled(model, own, False, _card(sources, tokens, why_not))
    from transformers import LlavaProcessor

    native: Any = as_llava(model)
    processor = LlavaProcessor(
        clip_image_processor(preprocess),
        tokenizer,
        patch_size=native.config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which that strategy takes away
        **template,
    )
    return Assembled(native, processor, True, _card(sources, tokens, []))


def build_registered(spec: AssemblySpec, *, seed: int) -> Any:
    """Model, preprocessing, tokenizer and the names of the parts, whatever the tower's shape."""
    import torch

    from vlm_distill.language import open_language
    from vlm_distill.modeling import (
        OpenClipLlavaConfig,
        OpenClipLlavaForConditionalGeneration,
        OpenClipVisionConfig,
    )
    from vlm_distill.projectors import reduced_tokens
    from vlm_distill.towers import open_tower

    tower = open_tower(spec.vision, seed=seed)
    language = open_language(
        spec.language,
        dtype=spec.dtype,
        chat_template=_template(spec.chat_template),
        image_token=spec.image_token,
        seed=seed,
    )
    reduction, factor = spec.reduction.kind_and_factor
    grid = tower.config["grid"]
    if reduction != "none" and (grid[0] % factor or grid[1] % factor):
        raise UserError(
            f"reduction {reduction}: {factor} does not divide the tower's grid of {grid[0]} x {grid[1]} "
            "patch tokens. Choose a factor that does, another layer, or another image_size."
        )
    causal: Any = language.model
    tokenizer: Any = language.tokenizer
    config = OpenClipLlavaConfig(
        vision_config=OpenClipVisionConfig(**tower.config),
        text_config=causal.config,
        image_token_index=tokenizer.convert_tokens_to_ids(spec.image_token),
        image_seq_length=reduced_tokens(grid, reduction, factor),
        projector=spec.projector,
        reduction=reduction,
        reduction_factor=factor,
        head_bias=getattr(causal.get_output_embeddings(), "bias", None) is not None,
        tie_word_embeddings=causal.config.tie_word_embeddings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = OpenClipLlavaForConditionalGeneration(config).to(causal.dtype)
    model.model.vision_tower.tower.load_state_dict(tower.module.state_dict())
    model.model.language_model.load_state_dict(causal.base_model.state_dict())
    model.lm_head.load_state_dict(causal.get_output_embeddings().state_dict())
    model.generation_config = causal.generation_config
    model.generation_config.pad_token_id = language.tokenizer.pad_token_id
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = language.tokenizer.eos_token_id
    return model.eval(), tower.preprocess, language.tokenizer, (tower.source, language.source)


def _template(text: str | None) -> str:
    if text is None:
        return CHAT_TEMPLATE
    if not text.endswith((".jinja", ".jinja2")):
        return text
    path = resolve_path(text)
    if path is None or not path.is_file():
        raise UserError(f"chat_template {text!r}: no such file. Give a .jinja file, or the template itself.")
    return path.read_text(encoding="utf-8")


def _card(sources: tuple[str, str], tokens: int, why_not_native: list[str]) -> str:
    needs = "import vlm_distill  # makes transformers know this model\n" if why_not_native else ""
    reason = (
        f"It is no plain Llava, because {'; '.join(why_not_native)}. So the package `vlm-distill` has to be "
        "installed and imported before it is loaded.\n"
        if why_not_native
        else "It is a plain `LlavaForConditionalGeneration`, which transformers loads by itself.\n"
    )
    return f"""\
---
library_name: transformers
pipeline_tag: image-text-to-text
---

A LLaVA-style model, assembled from a vision tower, a projector and a language model. It has to be trained
before it says anything about a picture: its projector is new.

| part | from |
| --- | --- |
| vision tower | {sources[0]} |
| language model | {sources[1]} |
| tokens of a picture | {tokens} |

{reason}
```python
{needs}from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER)
processor = AutoProcessor.from_pretrained(FOLDER)
```
"""
