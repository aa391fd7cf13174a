"""Tiny vision-language models with real processors, built in code: one of each family, all of one vocabulary.

Sizes are the smallest that keep what is special to a family: tiles, unpadded grids, deep-stack features,
position axes, images that see both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image

from builders import tiny_tokenizer

HIDDEN = 32
IMAGE_WORDS = (
    "<image>",
    "<video>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)


class Family(NamedTuple):
    """How to build one: model and processor that belong together."""

    model: Callable[[int], Any]  # from a seed
    processor: Callable[[], Any]


def template(image: str, *, bos: str = "") -> str:
    """A chat template of parts, with a family's mark for an image."""
    return (
        bos + "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}"
        + image
        + "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def tokenizer(**named: str) -> Any:
    """The tokenizer that all families share; `named` says which tokens a family's processor asks for."""
    plain = tiny_tokenizer(chat_template=None)
    plain.add_special_tokens({"additional_special_tokens": list(IMAGE_WORDS)})
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(IMAGE_WORDS),
        extra_special_tokens=named or None,
    )


def token_id(token: str) -> int:
    """The id of a token in the shared vocabulary."""
    return tokenizer().convert_tokens_to_ids(token)


def picture(seed: int = 0, size: tuple[int, int] = (40, 24)) -> Image.Image:
    """A picture of noise, width and height in pixels."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def _text(kind: str = "LlamaConfig", **more: Any) -> Any:
    return getattr(transformers, kind)(
        **{
            "vocab_size": len(tokenizer()),
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": HIDDEN // 4,
            "max_position_embeddings": 1024,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "initializer_range": 0.2,
            **more,
        }
    )


def _tower(kind: str, size: int, patch: int, **more: Any) -> Any:
    return getattr(transformers, kind)(
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=patch,
        initializer_range=0.2,
        **more,
    )


def _build(kind: str, config: Any) -> Callable[[int], Any]:
    def build(seed: int) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # biases and norms start at 0 and 1, which would hide wrong wiring
            model = getattr(transformers, kind)(config)
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.data.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.1)
        return model.eval()

    return build


def _square_processor(size: int, kind: str = "CLIPImageProcessor") -> Any:
    return getattr(transformers, kind)(
        size={"height": size, "width": size}, do_center_crop=False, do_resize=True
    )


def llava(size: int = 16, patch: int = 4) -> Family:
    """LLaVA-1.5: one square of tokens an image."""
    config = transformers.LlavaConfig(
        vision_config=_tower("CLIPVisionConfig", size, patch),
        text_config=_text(),
        image_token_index=token_id("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )

    def processor() -> Any:
        return transformers.LlavaProcessor(
            image_processor=transformers.CLIPImageProcessor(
                size={"height": size, "width": size}, do_center_crop=False
            ),
            tokenizer=tokenizer(image_token="<image>"),
            patch_size=patch,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template("<image>\n"),
        )

    return Family(_build("LlavaForConditionalGeneration", config), processor)


def llava_next() -> Family:
    """LLaVA-NeXT: the whole picture, then unpadded tiles with newlines."""
    pinpoints = [[16, 32], [32, 16], [32, 32]]
    config = transformers.LlavaNextConfig(
        vision_config=_tower("CLIPVisionConfig", 16, 4),
        text_config=_text(),
        image_token_index=token_id("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
    )

    def processor() -> Any:
        return transformers.LlavaNextProcessor(
            image_processor=transformers.LlavaNextImageProcessor(
                size={"shortest_edge": 16},
                crop_size={"height": 16, "width": 16},
                image_grid_pinpoints=pinpoints,
            ),
            tokenizer=tokenizer(image_token="<image>"),
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template("<image>\n"),
        )

    return Family(_build("LlavaNextForConditionalGeneration", config), processor)


def llava_onevision() -> Family:
    """LLaVA-OneVision: as NeXT for one image, the whole picture alone for several."""
    pinpoints = [[16, 16], [16, 32], [32, 16], [32, 32]]
    config = transformers.LlavaOnevisionConfig(
        vision_config=_tower("SiglipVisionConfig", 16, 4, vision_use_head=False),
        text_config=_text("Qwen2Config"),
        image_token_index=token_id("<image>"),
        video_token_index=token_id("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )

    def processor() -> Any:
        return transformers.LlavaOnevisionProcessor(
            image_processor=transformers.LlavaOnevisionImageProcessor(
                size={"height": 16, "width": 16}, image_grid_pinpoints=pinpoints
            ),
            video_processor=transformers.LlavaOnevisionVideoProcessor(size={"height": 16, "width": 16}),
            tokenizer=tokenizer(image_token="<image>", video_token="<video>"),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            chat_template=template("<image>\n"),
        )

    return Family(_build("LlavaOnevisionForConditionalGeneration", config), processor)


def qwen2_5_vl(maximum_pixels: int = 32 * 32) -> Family:
    """Qwen2.5-VL: packed patches, windows in the tower, three position axes."""
    config = transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": HIDDEN,
            "intermediate_size": HIDDEN,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
            "patch_size": 4,
            "spatial_patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        text_config={
            **_text("LlamaConfig").to_dict(),
            "model_type": "qwen2_5_vl_text",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )

    def processor() -> Any:
        return transformers.Qwen2_5_VLProcessor(
            image_processor=transformers.Qwen2VLImageProcessor(
                patch_size=4, merge_size=2, min_pixels=64, max_pixels=maximum_pixels, temporal_patch_size=2
            ),
            video_processor=transformers.Qwen2VLVideoProcessor(patch_size=4, merge_size=2),
            tokenizer=tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>"),
            chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
        )

    return Family(_build("Qwen2_5_VLForConditionalGeneration", config), processor)


def qwen3_vl() -> Family:
    """Qwen3-VL: packed patches, three position axes, features of several tower layers."""
    config = transformers.Qwen3VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": HIDDEN,
            "intermediate_size": HIDDEN,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={
            **_text("LlamaConfig").to_dict(),
            "model_type": "qwen3_vl_text",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )

    def processor() -> Any:
        return transformers.Qwen3VLProcessor(
            image_processor=transformers.Qwen2VLImageProcessor(
                patch_size=4, merge_size=2, min_pixels=64, max_pixels=32 * 32, temporal_patch_size=2
            ),
            video_processor=transformers.Qwen3VLVideoProcessor(patch_size=4, merge_size=2),
            tokenizer=tokenizer(
                image_token="<|image_pad|>",
                video_token="<|video_pad|>",
                vision_start_token="<|vision_start|>",
                vision_end_token="<|vision_end|>",
            ),
            chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
        )

    return Family(_build("Qwen3VLForConditionalGeneration", config), processor)


def idefics3() -> Family:
    """Idefics 3: one entry a sample, tiles with tokens for their place, pixel shuffle."""
    config = transformers.Idefics3Config(
        vision_config=_tower("Idefics3VisionConfig", 16, 4),
        text_config=_text(),
        image_token_id=token_id("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )

    def processor() -> Any:
        return transformers.Idefics3Processor(
            image_processor=transformers.Idefics3ImageProcessor(
                size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
            ),
            tokenizer=tokenizer(),
            image_seq_len=4,
            chat_template=template("<image>"),
        )

    return Family(_build("Idefics3ForConditionalGeneration", config), processor)


def smolvlm() -> Family:
    """SmolVLM: as Idefics 3."""
    config = transformers.SmolVLMConfig(
        vision_config=_tower("SmolVLMVisionConfig", 16, 4),
        text_config=_text(),
        image_token_id=token_id("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )

    def processor() -> Any:
        return transformers.SmolVLMProcessor(
            image_processor=transformers.SmolVLMImageProcessor(
                size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
            ),
            video_processor=transformers.SmolVLMVideoProcessor(
                size={"longest_edge": 16}, video_sampling={"max_frames": 4, "fps": 1, "video_size": {}}
            ),
            tokenizer=tokenizer(image_token="<image>"),
            image_seq_len=4,
            chat_template=template("<image>"),
        )

    return Family(_build("SmolVLMForConditionalGeneration", config), processor)


def internvl() -> Family:
    """InternVL: tiles of all images in one row, their numbers dropped by the processor."""
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(
            hidden_size=HIDDEN,
            intermediate_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=[16, 16],
            patch_size=[4, 4],
        ),
        text_config=_text("Qwen2Config"),
        image_token_id=token_id("<IMG_CONTEXT>"),
        downsample_ratio=0.5,
        image_seq_length=4,
    )

    def processor() -> Any:
        return transformers.InternVLProcessor(
            image_processor=transformers.GotOcr2ImageProcessor(
                size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=4
            ),
            video_processor=transformers.InternVLVideoProcessor(size={"height": 16, "width": 16}),
            tokenizer=tokenizer(
                start_image_token="<img>",
                end_image_token="</img>",
                context_image_token="<IMG_CONTEXT>",
                video_token="<video>",
            ),
            image_seq_length=4,
            chat_template=template("<IMG_CONTEXT>"),
        )

    return Family(_build("InternVLForConditionalGeneration", config), processor)


def paligemma() -> Family:
    """PaliGemma: images first, a prefix that sees both ways, positions from 1, no chat template."""

    def processor() -> Any:
        images = transformers.SiglipImageProcessor(size={"height": 16, "width": 16})
        images.image_seq_length = 16
        return transformers.PaliGemmaProcessor(
            image_processor=images, tokenizer=tokenizer(image_token="<image>")
        )

    config = transformers.PaliGemmaConfig(
        vision_config=_tower("SiglipVisionConfig", 16, 4, vision_use_head=False),
        text_config=_text("GemmaConfig", vocab_size=len(processor().tokenizer)),
        image_token_index=token_id("<image>"),
        projection_dim=HIDDEN,
    )
    return Family(_build("PaliGemmaForConditionalGeneration", config), processor)


def gemma3() -> Family:
    """Gemma 3: images that see both ways, sliding windows, a soft token for every cell."""
    config = transformers.Gemma3Config(
        vision_config=_tower("SiglipVisionConfig", 16, 4, vision_use_head=False),
        text_config=_text("Gemma3TextConfig", sliding_window=16, query_pre_attn_scalar=8),
        image_token_index=token_id("<image_soft_token>"),
        boi_token_index=token_id("<start_of_image>"),
        eoi_token_index=token_id("<end_of_image>"),
        mm_tokens_per_image=4,
    )

    def processor() -> Any:
        return transformers.Gemma3Processor(
            image_processor=transformers.Gemma3ImageProcessor(
                size={"height": 16, "width": 16}, do_pan_and_scan=False
            ),
            tokenizer=tokenizer(
                boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"
            ),
            image_seq_length=4,
            chat_template=template("<start_of_image>"),
        )

    return Family(_build("Gemma3ForConditionalGeneration", config), processor)


FAMILIES: dict[str, Callable[[], Family]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "internvl": internvl,
    "paligemma": paligemma,
    "gemma3": gemma3,
}


def save_tiny_vlm(folder: Path, family: Family, seed: int = 0) -> Path:
    """Write a tiny model and its processor as a local model folder."""
    family.model(seed).save_pretrained(folder)
    family.processor().save_pretrained(folder)
    return folder
