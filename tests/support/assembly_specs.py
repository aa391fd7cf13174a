"""Tiny parts of assembled models, for tests: every kind of tower, one language model made here."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from vlm_distill.assembly import AssemblySpec

TEXTS = ["Is there a red triangle?", "What colour is the shape?", "yes no red blue green circle triangle"]
TOKENIZER = {"kind": "word_level", "texts": TEXTS}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,  # large enough that random models disagree visibly
}
CLIP_TOWER = {
    "model": {
        "embed_dim": 16,
        "vision_cfg": {"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    }
}
TOWERS: dict[str, dict[str, Any]] = {
    "clip": CLIP_TOWER,
    "resnet": {
        "model": {
            "embed_dim": 16,
            "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 32},
        },
        "layer": 2,
    },
    "timm-transformer": {"model": {"vision_cfg": {"timm_model_name": "test_vit2", "image_size": 64}}},
    "timm-computed-buffers": {
        "model": {"vision_cfg": {"timm_model_name": "test_vit_relpos", "image_size": 64}}
    },
    "timm-convolutional": {"model": {"vision_cfg": {"timm_model_name": "test_convnext", "image_size": 64}}},
}


def assembly(tower: str | dict[str, Any] = "clip", **changes: Any) -> AssemblySpec:
    """The settings of a tiny model, around one of `TOWERS` or another tower."""
    settings: dict[str, Any] = {
        "vision": TOWERS[tower] if isinstance(tower, str) else tower,
        "language": {"config": LLAMA, "tokenizer": TOKENIZER},
    }
    return AssemblySpec.model_validate(settings | changes)


def pictures(count: int, size: tuple[int, int] = (50, 40)) -> list[Image.Image]:
    """Different pictures of noise with a few large areas."""
    generator = np.random.default_rng(0)
    small = [generator.integers(0, 255, (5, 4, 3), dtype=np.uint8) for _ in range(count)]
    return [Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR) for pixels in small]


def chats(processor: Any) -> tuple[list[str], list[list[Image.Image]]]:
    """Three prompts, with two pictures, none and one."""
    shown = pictures(3)
    contents = [
        [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Is there a red triangle?"}],
        [{"type": "text", "text": "What colour is the shape?"}],
        [{"type": "image"}, {"type": "text", "text": "What colour?"}],
    ]
    texts = [
        processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        for content in contents
    ]
    return texts, [shown[:2], [], shown[2:]]


def model_inputs(processor: Any) -> dict[str, Any]:
    """The three prompts as one left-padded batch, its positions passed explicitly."""
    texts, images = chats(processor)
    inputs = dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return inputs
