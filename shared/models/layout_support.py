"""Which models may read a pair as one sequence, [prompt | y_t | y_s], and up to which length?

That layout hands the model a ready mask (`shared.models.pair_attention`) and positions that restart.
transformers passes such a mask on as it is (`masking_utils._preprocess_mask_arguments`, 5.23), so a layer
with a sliding window or with chunks loses them, and a recurrent layer reads y_s after y_t whatever the mask
says. The answer therefore comes from the configuration; `joint_difference` then measures it on the model
itself.

Shapes in names: N rows that predict response tokens, D width of the hidden states.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shared.adapter import Adapter
from shared.models.heads import backbone_of, causal_lm_of, hidden_rows
from shared.models.pair_attention import BLOCK_ATTENTION
from shared.types import Group, Layout

# Families whose joint and separate hidden states were compared (tests/shared/models/test_layout_support.py).
# fmt: off
JOINT_FAMILIES = frozenset({
    "apertus", "arcee", "biogpt", "bitnet", "codegen", "cohere", "cohere2", "diffllama", "ernie4_5",
    "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox",
    "gpt_oss", "gptj", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "jetmoe", "llama",
    "ministral", "ministral3", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt",
    "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3",
    "stablelm", "starcoder2",
})
# The same, of models whose text decoder is one of those and whose images are ordinary tokens to it
# (tests/vlm_distill/test_families.py).
JOINT_VISION_FAMILIES = frozenset({
    "idefics3", "internvl", "llava", "llava_next", "llava_onevision", "vlm_distill_llava", "qwen2_5_vl",
    "qwen3_vl", "smolvlm",
})
VISION_DECODERS = frozenset({"qwen2_5_vl_text", "qwen3_vl_text"})  # text decoders that only such models have
# fmt: on
# What each kind of layer needs, by its name in `config.layer_types`: the key of the length within which it
# sees everything, or None where it always does. A kind that is not here (mamba, linear attention, short
# convolution, compressed attention ...) is not known to obey a mask.
LAYER_SPANS = {
    "full_attention": None,
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}
# Implementations of attention that take a ready mask; flash attention takes none.
MASKED_ATTENTION = ("sdpa", "eager", *BLOCK_ATTENTION)

# Largest allowed difference of a response's hidden rows, relative to their norm. SmolLM2-135M's 30 layers
# gave 1e-6 in float32 and 2e-2 in bfloat16; a window or a recurrence that is ignored gives 0.1 to 2.
# Eager attention takes its softmax in float32 even in float64 models.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}


# How much dearer an operation of masked attention is than one of a linear layer: on a CPU with bfloat16
# units, 2 in float32 and 8 in bfloat16. benchmarks/pair_layout.py holds the rule that uses it against whole
# steps.
ATTENTION_COST = 4.0


class JointSupport(NamedTuple):
    """What a model's configuration says of the joint layout."""

    obstacle: str | None = None  # why it would be wrong at any length
    longest: int | None = None  # tokens of prompt and response up to which it is right; None: any
    family_known: bool = True

    def obstacle_at(self, longest: int) -> str | None:
        """Why the layout would be wrong with a prompt and response of that many tokens, or None."""
        if self.obstacle is None and self.longest is not None and longest > self.longest:
            return (
                f"some layers see only the last {self.longest} tokens, and prompt and response take up to "
                f"{longest}: a ready mask would undo that window"
            )
        return self.obstacle


def joint_support(model: nn.Module) -> JointSupport:
    """What a model's configuration says of the joint layout, without running it."""
    causal_lm = causal_lm_of(model)
    config = causal_lm.config.get_text_config(decoder=True)
    family_known = config.model_type in JOINT_FAMILIES | VISION_DECODERS and (
        config is causal_lm.config or causal_lm.config.model_type in JOINT_VISION_FAMILIES
    )
    obstacle = _obstacle(causal_lm, config)
    if obstacle is not None:
        return JointSupport(obstacle, None, family_known)
    spans = [getattr(config, key, None) for key in _span_keys(config)]
    return JointSupport(None, min((span for span in spans if span), default=None), family_known)


def joint_saves(model: nn.Module, *, prompt_tokens: float, response_tokens: float) -> bool:
    """Whether sharing a pair's prompt saves more in the linear layers than the longer sequence costs.

    Attention under a mask computes every product of a query and a key, hidden or not: (P + 2L)^2 in one
    sequence of a prompt and two responses, 2 (P + L)^2 in two. Long responses to short prompts are cheaper
    apart.

    Args:
        model: gives the size of its linear layers and of its attention.
        prompt_tokens: P, typical.
        response_tokens: L, of one response.
    """
    backbone: Any = backbone_of(model)
    config = causal_lm_of(model).config.get_text_config(decoder=True)
    in_layers = sum(p.numel() for p in backbone.parameters()) - backbone.get_input_embeddings().weight.numel()
    attention_width = config.num_hidden_layers * config.hidden_size
    # operations: 2 for each parameter and token, 4 for each unit of width and query-key product
    products_per_token = in_layers / (2 * attention_width) / ATTENTION_COST
    more_products = (prompt_tokens + 2 * response_tokens) ** 2 - 2 * (prompt_tokens + response_tokens) ** 2
    return bool(prompt_tokens * products_per_token > more_products)


@torch.no_grad()
def joint_difference(model: nn.Module, adapter: Adapter, groups: Sequence[Group]) -> float:
    """How far a response's hidden rows differ between the layouts, at most, relative to their norm.

    Over whole responses, because in bfloat16 a single row may be off by several per cent.
    """
    was_training = model.training
    model.eval()
    try:
        joint, separate = (_hidden(model, adapter, groups, layout) for layout in ("joint", "separate"))
    finally:
        model.train(was_training)
    squares_2R = torch.zeros(2, int(separate.response_N.max()) + 1, dtype=torch.float64)
    for sums_R, hidden_ND in zip(
        squares_2R, (joint.hidden_ND - separate.hidden_ND, separate.hidden_ND), strict=True
    ):
        sums_R.index_add_(0, separate.response_N, hidden_ND.square().sum(-1))
    return float((squares_2R[0] / squares_2R[1].clamp(min=1e-300)).sqrt().max())


class _Rows(NamedTuple):
    hidden_ND: Tensor  # float64, on the CPU
    response_N: Tensor


def _hidden(model: nn.Module, adapter: Adapter, groups: Sequence[Group], layout: Layout) -> _Rows:
    encoded = adapter.encode(groups, layout=layout)
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in encoded.inputs.items()}
    hidden_ND = hidden_rows(model, inputs, encoded.rows_N.to(device))
    return _Rows(hidden_ND.cpu().double(), encoded.response_N)


def _obstacle(causal_lm: Any, config: Any) -> str | None:
    if config._attn_implementation not in MASKED_ATTENTION:
        return f"its attention is {config._attn_implementation}, which takes no ready mask"
    if "position_ids" not in inspect.signature(backbone_of(causal_lm).forward).parameters:
        return "it takes no positions, so they cannot restart"
    if getattr(config, "alibi", False):
        return "its positions are distances in the sequence (ALiBi), which the first response lengthens"
    other = sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_SPANS.keys())
    if other:
        return f"it has layers that do not obey a mask, or are not known to: {', '.join(other)}"
    # Gemma 3 and PaliGemma: image tokens see each other in both directions, which only their own masks know
    if "token_type_ids" in inspect.signature(backbone_of(causal_lm).forward).parameters and hasattr(
        causal_lm.config, "vision_config"
    ):
        return "its images are blocks that see both ways, which a ready mask would undo"
    if getattr(config, "use_bidirectional_attention", None):
        return "its attention looks both ways"
    return None


def _span_keys(config: Any) -> list[str]:
    layer_types = getattr(config, "layer_types", None)
    if not layer_types:  # one kind of layer throughout: windowed if the configuration gives a window
        return [key for key in LAYER_SPANS.values() if key is not None]
    return [key for kind in set(layer_types) if (key := LAYER_SPANS[kind]) is not None]
