"""When is an assembled model a plain Llava, and how does it become one?

A tower with CLIP's layout computes what transformers' CLIPVisionModel does; only names and the fused weights
of query, key and value differ. With LLaVA's projector the whole is then a `LlavaForConditionalGeneration`,
which transformers loads without us.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from vlm_distill.modeling import OpenClipLlavaForConditionalGeneration

RENAMED = (
    (r"class_embedding", "embeddings.class_embedding"),
    (r"conv1\.weight", "embeddings.patch_embedding.weight"),
    (r"positional_embedding", "embeddings.position_embedding.weight"),
    (r"ln_pre\.", "pre_layrnorm."),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"encoder.layers.\1.self_attn.out_proj."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"encoder.layers.\1.mlp.fc1."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"encoder.layers.\1.mlp.fc2."),
)
FUSED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj\.(weight|bias)")
RESAMPLING = {"bilinear": 2, "bicubic": 3}  # PIL's numbers


def obstacles(model: OpenClipLlavaForConditionalGeneration, preprocess: dict[str, Any]) -> list[str]:
    """Why a model cannot be a plain Llava, in words; empty where it can."""
    config = model.config
    found = _tower_obstacles(model.model.vision_tower.tower)
    size = config.vision_config.image_size  # type: ignore[union-attr]
    if not isinstance(size, int) and len(set(size)) > 1:
        found.append("its pictures are not square")
    if config.projector != "mlp" or config.reduction != "none":
        found.append("its projector is not LLaVA's two layers on all patch tokens")
    head = model.lm_head
    if head.bias is not None or head.logit_scale != 1.0 or head.softcap is not None:
        found.append("its language-model head does more than one product")
    if (
        config.tie_word_embeddings
        and model._tied_weights_keys != LlavaForConditionalGeneration._tied_weights_keys
    ):
        found.append("its language model names its embeddings in its own way")
    if preprocess["resize_mode"] == "longest":
        found.append("its pictures are padded")
    return found


def as_llava(model: OpenClipLlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """The same model as transformers' own; needs `obstacles` to be none."""
    ours = model.config
    tower: Any = model.model.vision_tower.tower
    block = tower.transformer.resblocks[0]
    vision = CLIPVisionConfig(
        hidden_size=tower.conv1.out_channels,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(tower.transformer.resblocks),
        num_attention_heads=block.attn.heads,
        image_size=tower.image_size[0],
        patch_size=tower.patch_size[0],
        hidden_act="gelu" if isinstance(block.mlp.gelu, nn.GELU) else "quick_gelu",
        layer_norm_eps=block.ln_1.eps,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=ours.text_config,
        image_token_index=ours.image_token_index,
        image_seq_length=ours.image_seq_length,
        vision_feature_layer=-1,  # what follows was cut off
        tie_word_embeddings=ours.tie_word_embeddings,
    )
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("model.vision_tower.")
    }
    for name, tensor in clip_vision_state(tower).items():
        state[f"model.vision_tower.{name}"] = tensor
    native: Any = LlavaForConditionalGeneration(config)
    native.to(model.dtype)
    own = native.state_dict()
    unused = {f"model.vision_tower.post_layernorm.{kind}" for kind in ("weight", "bias")}  # of pooled outputs
    assert own.keys() - state.keys() <= unused, sorted(own.keys() - state.keys())
    native.load_state_dict({name: own[name] for name in own.keys() & unused} | state)
    native.generation_config = model.generation_config
    return native.eval()


def clip_vision_state(tower: nn.Module) -> dict[str, Tensor]:
    """The weights of a CLIP-shaped open_clip tower by the names of transformers' CLIPVisionModel."""
    state: dict[str, Tensor] = {}
    for name, tensor in tower.state_dict().items():
        if fused := FUSED.fullmatch(name):
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                state[f"encoder.layers.{fused[1]}.self_attn.{part}_proj.{fused[2]}"] = piece.clone()
            continue
        pattern, new = next((p, new) for p, new in RENAMED if re.match(p, name))
        state[re.sub(pattern, new, name)] = tensor
    return state


def clip_image_processor(preprocess: dict[str, Any]) -> CLIPImageProcessorPil:
    """Transformers' image processor that does what open_clip's preprocessing does."""
    size = preprocess["size"]
    side = size if isinstance(size, int) else size[0]
    square = {"height": side, "width": side}
    crops = preprocess["resize_mode"] == "shortest"
    return CLIPImageProcessorPil(
        size={"shortest_edge": side} if crops else square,
        do_center_crop=crops,
        crop_size=square,
        resample=RESAMPLING[preprocess["interpolation"]],
        image_mean=list(preprocess["mean"]),
        image_std=list(preprocess["std"]),
    )


def _tower_obstacles(tower: nn.Module) -> list[str]:
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer

    if not isinstance(tower, VisionTransformer):
        return [f"its tower is a {type(getattr(tower, 'trunk', tower)).__name__}, not a CLIP transformer"]
    blocks: Any = tower.transformer.resblocks
    plain = all(
        type(block) is ResidualAttentionBlock
        and isinstance(block.ls_1, nn.Identity)
        and isinstance(block.ls_2, nn.Identity)
        and type(block.mlp.gelu) in (nn.GELU, QuickGELU)
        and getattr(block.mlp.gelu, "approximate", "none") == "none"
        for block in blocks
    )
    same_norms = {m.eps for m in tower.modules() if isinstance(m, nn.LayerNorm)}
    patch = tower.patch_size
    if not plain or isinstance(tower.ln_pre, nn.Identity) or len(same_norms) != 1 or patch[0] != patch[1]:
        return ["its tower has blocks or norms that CLIP's transformer does not have"]
    return []
