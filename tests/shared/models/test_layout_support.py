from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from builders import tiny_llama
from shared.data.layouts import lay_out
from shared.models.heads import hidden_rows
from shared.models.layout_support import (
    JOINT_FAMILIES,
    TOLERANCES,
    joint_difference,
    joint_saves,
    joint_support,
)

VOCABULARY = 97
# Whichever of these a family's configuration knows makes it tiny; wide weights make attention matter.
TINY = {
    "vocab_size": VOCABULARY, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32, "head_dim": 8,
    "intermediate_size": 64, "n_inner": 64, "ffn_dim": 64, "ffn_hidden_size": 64, "kv_channels": 8,
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "rotary_dim": 8,
    "max_position_embeddings": 256, "n_positions": 256,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip


def tiny(family: str, **options):
    """A model of a family, with random weights."""
    known = CONFIG_MAPPING[family]()
    config = CONFIG_MAPPING[family](**{k: v for k, v in TINY.items() if hasattr(known, k)} | options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


class Pairs:
    """Stands for an adapter: lays out random pairs, given as (prompt, y_t, y_s) lengths."""

    def encode(self, groups: Sequence[tuple[int, ...]], *, layout):
        generator = torch.Generator().manual_seed(0)
        ids = [
            [torch.randint(5, VOCABULARY, (n,), generator=generator).tolist() for n in group]
            for group in groups
        ]
        return lay_out([g[0] for g in ids], [g[1:] for g in ids], layout=layout, pad_id=0)


UNEVEN = [(24, 7, 5), (3, 1, 9), (11, 12, 1)]


@pytest.mark.parametrize("family", sorted(JOINT_FAMILIES))
def test_a_known_family_has_the_same_hidden_states_in_both_layouts(family):
    model = tiny(family)
    support = joint_support(model)
    assert support.family_known and support.obstacle_at(40) is None
    assert joint_difference(model, Pairs(), UNEVEN) < 3e-5


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mistral", {"sliding_window": 16}),
        ("gemma2", {"sliding_window": 16}),  # eager, every other layer
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}),
        ("phi3", {"sliding_window": 16}),
        ("gpt_oss", {"sliding_window": 16}),
        ("cohere2", {"sliding_window": 16}),
    ],
)
def test_a_window_bounds_the_length_and_would_be_lost_beyond_it(family, options):
    model = tiny(family, **options)
    support = joint_support(model)
    assert support.longest == 16
    assert support.obstacle_at(16) is None and "last 16 tokens" in support.obstacle_at(17)
    within = [(10, 6, 4), (3, 2, 13)]  # a sequence of 20 tokens, in which no token looks 16 back
    assert joint_difference(model, Pairs(), within) < 3e-5
    assert joint_difference(model, Pairs(), [(20, 6, 4)]) > TOLERANCES[torch.float32]


def test_a_window_that_is_switched_off_bounds_nothing():
    assert joint_support(tiny("qwen2", sliding_window=16, use_sliding_window=False)).longest is None
    assert joint_support(tiny("mistral", sliding_window=None)).longest is None


def test_chunks_bound_the_length():
    model = tiny_llama()
    model.config.layer_types = ["full_attention", "chunked_attention"]
    model.config.attention_chunk_size = 8
    assert joint_support(model).longest == 8


@pytest.mark.parametrize("family", ["bamba", "jamba", "qwen3_next", "recurrent_gemma", "nemotron_h"])
def test_recurrent_layers_are_refused_and_would_carry_one_response_into_the_other(family):
    model = tiny(family)
    assert "do not obey a mask" in joint_support(model).obstacle
    assert joint_difference(model, Pairs(), UNEVEN) > TOLERANCES[torch.float32]


def test_short_convolutions_are_refused():
    model = tiny("lfm2", layer_types=["conv", "full_attention", "conv", "conv"])
    assert "conv" in joint_support(model).obstacle


@pytest.mark.parametrize("family", ["mpt", "bloom", "rwkv"])
def test_models_without_positions_are_refused(family):
    config = CONFIG_MAPPING[family](vocab_size=VOCABULARY, num_hidden_layers=1, hidden_size=32, n_heads=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert "no positions" in joint_support(model).obstacle


def test_alibi_is_refused():
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["falcon"](**sizes, alibi=True)).eval()
    assert "ALiBi" in joint_support(model).obstacle


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
def test_attention_without_a_ready_mask_is_refused(attention):
    model = tiny_llama()
    model.config._attn_implementation = attention
    assert attention in joint_support(model).obstacle


def test_attention_that_looks_both_ways_is_refused():
    model = tiny("gemma2")
    model.config.use_bidirectional_attention = True
    assert "both ways" in joint_support(model).obstacle


def test_images_that_see_both_ways_are_refused():
    text = {k: v for k, v in TINY.items() if hasattr(CONFIG_MAPPING["gemma3_text"](), k)}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = CONFIG_MAPPING["gemma3"](text_config=text, vision_config={**vision, "image_size": 56})
    from transformers import Gemma3ForConditionalGeneration

    with torch.device("meta"):
        support = joint_support(Gemma3ForConditionalGeneration(config))
    assert "images" in support.obstacle


def test_a_family_that_was_not_compared_is_told_apart():
    model = tiny_llama()
    model.config.model_type = "llama-of-tomorrow"
    support = joint_support(model)
    assert not support.family_known and support.obstacle is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_number_formats_stay_within_their_tolerance(dtype, attention):
    model = tiny_llama(layers=4).to(dtype)
    model.set_attn_implementation(attention)
    assert joint_difference(model, Pairs(), UNEVEN) < TOLERANCES[dtype] / 2


def test_eager_attention_gets_the_mask_that_it_adds():
    model = tiny_llama(layers=3)
    encoded = Pairs().encode(UNEVEN, layout="joint")
    sdpa_ND = hidden_rows(model, encoded.inputs, encoded.rows_N)
    model.set_attn_implementation("eager")
    eager_ND = hidden_rows(model, encoded.inputs, encoded.rows_N)
    torch.testing.assert_close(sdpa_ND, eager_ND, atol=1e-5, rtol=1e-4)


def test_lora_layers_are_read_too():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert joint_support(model).obstacle is None
    plain = joint_difference(tiny_llama(), Pairs(), UNEVEN)
    assert 0 < joint_difference(model, Pairs(), UNEVEN) < 3e-5 and plain < 3e-5


def test_the_difference_is_seen_where_the_responses_see_each_other():
    class Leaky(Pairs):
        def encode(self, groups, *, layout):
            encoded = super().encode(groups, layout=layout)
            if layout == "joint":  # as if y_s went on with y_t
                one = encoded.inputs["segment_ids"].clamp(max=1)
                encoded = encoded._replace(inputs={**encoded.inputs, "segment_ids": one})
            return encoded

    assert joint_difference(tiny_llama(), Leaky(), UNEVEN) > 0.05


def test_measuring_leaves_training_mode_as_it_was():
    model = tiny_llama().train()
    joint_difference(model, Pairs(), UNEVEN)
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("prompt_tokens", "response_tokens", "saves"),
    [(200, 128, True), (600, 8, True), (50, 53, True), (50, 512, False), (2000, 512, True)],
)
def test_sharing_pays_unless_responses_are_long_and_prompts_short(prompt_tokens, response_tokens, saves):
    with torch.device("meta"):  # SmolLM2-135M; the first four were measured
        config = CONFIG_MAPPING["llama"](
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
    assert joint_saves(model, prompt_tokens=prompt_tokens, response_tokens=response_tokens) == saves
