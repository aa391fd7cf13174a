from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from builders import tiny_llama
from shared.data.layouts import PADDING, PROMPT, lay_out
from shared.errors import UserError
from shared.models.heads import hidden_rows
from shared.models.layout_support import TOLERANCES, joint_difference, joint_support
from shared.models.pair_attention import (
    BLOCK_ATTENTION,
    FLEX_IN_PAIRS,
    attend_in_blocks,
    block_mask,
    dense_mask,
    flex_obstacle,
    pair_mask,
    require_gpu,
    sees,
)

VOCABULARY = 97
BLOCK = 128  # tokens, flex attention's default
LENGTHS = [(40, 150, 170), (10, 200, 30)]  # prompt, y_t, y_s: in both, some y_s lie blocks behind y_t
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def eager_flex(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flex attention by its own formulas instead of a kernel: on a CPU, backward passes exist only there."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    with torch.compiler.set_stance("force_eager"):
        yield


class Pairs:
    """Stands for an adapter: lays out random pairs, given as (prompt, y_t, y_s) lengths."""

    def encode(self, groups, *, layout):
        generator = torch.Generator().manual_seed(0)
        ids = [
            [torch.randint(5, VOCABULARY, (n,), generator=generator).tolist() for n in group]
            for group in groups
        ]
        return lay_out([g[0] for g in ids], [g[1:] for g in ids], layout=layout, pad_id=0)


def segments_of(lengths) -> torch.Tensor:
    return Pairs().encode(lengths, layout="joint").inputs["segment_ids"]


def llama():
    return tiny_llama(hidden=64, positions=512)


def mistral():
    """Its window holds every prompt with one response, but not the whole sequence."""
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=256, initializer_range=0.2,
        pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MistralForCausalLM(config).eval()


def seen_by_hand(segments: list[int]) -> list[list[bool]]:
    rows = []
    for query, mine in enumerate(segments):
        if mine == PADDING:
            rows.append([key == query for key in range(len(segments))])
        else:
            rows.append([key <= query and other in (PROMPT, mine) for key, other in enumerate(segments)])
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_both_masks_say_of_every_token_what_it_sees(seed):
    lengths = torch.randint(1, 120, (3, 3), generator=torch.Generator().manual_seed(seed)).tolist()
    segment_BT = segments_of(lengths)
    expected = torch.tensor([seen_by_hand(row) for row in segment_BT.tolist()])
    dense_B1TT, blocks = dense_mask(segment_BT), block_mask(segment_BT)
    assert dense_B1TT.shape == blocks.shape and dense_B1TT.dtype == torch.bool
    assert torch.equal(dense_B1TT[:, 0], expected)
    sequences, tokens = segment_BT.shape
    everywhere = torch.meshgrid(*map(torch.arange, (sequences, 1, tokens, tokens)), indexing="ij")
    assert torch.equal(blocks.mask_mod(*everywhere)[:, 0], expected)
    # a block that is left out holds nothing that is seen
    width = -(-tokens // BLOCK) * BLOCK
    padded = torch.nn.functional.pad(expected, (0, width - tokens, 0, width - tokens))
    seen_in_block = padded.unfold(1, BLOCK, BLOCK).unfold(2, BLOCK, BLOCK).any(-1).any(-1)
    assert torch.equal(blocks.to_dense()[:, 0].bool(), seen_in_block)


def test_three_responses_share_a_prompt():
    segment_BT = torch.tensor([[0, 0, 1, 2, 2, 3, -1]])
    assert dense_mask(segment_BT)[0, 0, 5].tolist() == [True, True, False, False, False, True, False]
    assert sees(segment_BT)(*map(torch.tensor, (0, 0, 4, 3))) and not sees(segment_BT)(
        *map(torch.tensor, (0, 0, 4, 2))
    )


def test_blocks_between_the_responses_and_of_padding_are_left_out():
    long = block_mask(segments_of([(BLOCK, 2 * BLOCK, 2 * BLOCK), (BLOCK, BLOCK, BLOCK)]))
    # rows of blocks: prompt; y_t; y_s. Of the causal 15, 4 are of y_s with y_t
    assert long.to_dense()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [1, 0, 0, 1, 1],
    ]
    assert long.to_dense()[1, 0].sum(-1).tolist() == [1, 2, 2, 1, 1]  # padding computes its diagonal alone
    assert long.sparsity() == 100 * (1 - (11 + 7) / 50)


@pytest.mark.parametrize("attention", BLOCK_ATTENTION)
def test_a_model_gets_the_mask_of_its_attention(attention):
    model, segment_BT = llama(), segments_of([(3, 4, 5)])
    assert pair_mask(model, segment_BT).dtype == torch.bool
    model.set_attn_implementation("eager")
    eager = pair_mask(model, segment_BT)
    assert eager.dtype == model.dtype and torch.equal(eager == 0, dense_mask(segment_BT))
    model.config._attn_implementation = attention
    assert isinstance(pair_mask(model, segment_BT), BlockMask)
    assert joint_support(model).obstacle is None


def gradients_of(model, layout, *, device="cpu"):
    encoded = Pairs().encode(LENGTHS, layout=layout)
    inputs = {name: tensor.to(device) for name, tensor in encoded.inputs.items()}
    hidden_ND = hidden_rows(model, inputs, encoded.rows_N.to(device))
    towards_ND = torch.randn(hidden_ND.shape, generator=torch.Generator().manual_seed(1)).to(device)
    model.zero_grad()
    (hidden_ND * towards_ND).sum().backward()
    return hidden_ND.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_as_without_flex(model, *, device: str, checkpointing: bool = False) -> None:
    model = model.to(device).train()
    known = [gradients_of(model, layout, device=device) for layout in ("separate", "joint")]
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    attend_in_blocks(model)
    hidden_ND, gradients = gradients_of(model, "joint", device=device)
    for expected_ND, expected in known:
        torch.testing.assert_close(hidden_ND, expected_ND, atol=2e-5, rtol=1e-4)
        assert expected.keys() == gradients.keys()
        for name in expected:
            assert (gradients[name] - expected[name]).norm() < 2e-5 * expected[name].norm(), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model", [llama, mistral])
def test_hidden_states_and_gradients_are_those_of_sdpa_and_of_separate_sequences(
    model, checkpointing, eager_flex
):
    assert_as_without_flex(model(), device="cpu", checkpointing=checkpointing)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model", [llama, mistral])
def test_compiled_on_a_gpu_too(model, checkpointing, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    assert_as_without_flex(model(), device="cuda", checkpointing=checkpointing)


@pytest.mark.parametrize("device", DEVICES)
def test_under_autocast_all_three_operands_are_in_its_number_format(device, request):
    if device == "cpu":
        request.getfixturevalue("eager_flex")
    model = llama().to(device)
    plain = gradients_of(model, "separate", device=device)[0]
    attend_in_blocks(model)
    with torch.autocast(device, torch.bfloat16):
        flex = gradients_of(model, "joint", device=device)[0]
    assert (flex - plain).norm() < TOLERANCES[torch.bfloat16] * plain.norm()


def test_the_comparison_before_a_run_is_of_flex_with_sdpa(eager_flex, monkeypatch):
    model = llama()
    attend_in_blocks(model)
    assert 0 < joint_difference(model, Pairs(), LENGTHS) < 1e-5
    # blind to half the prompt, as a wrong kernel might be
    monkeypatch.setattr(
        "shared.models.pair_attention.sees",
        lambda segment_BT: lambda b, h, q, k: sees(segment_BT)(b, h, q, k) & ((k > 5) | (k == q)),
    )
    assert joint_difference(model, Pairs(), LENGTHS) > TOLERANCES[torch.float32]


def test_without_a_block_mask_it_is_sdpa(monkeypatch):
    model, ids = llama(), torch.randint(5, VOCABULARY, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = model(ids, attention_mask=mask).logits
    answers = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    kept = model.config.to_json_string()
    attend_in_blocks(model)
    assert torch.equal(model(ids, attention_mask=mask).logits, expected)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), answers)
    assert model.config.to_json_string() == kept  # nor does an export know of it


FLEX_FAMILIES = ["gemma3_text", "cohere2", "diffllama", "qwen3_moe", "opt"]


@pytest.mark.parametrize("family", FLEX_FAMILIES)
@torch.no_grad()
def test_families_with_other_attention_take_the_block_mask(family, eager_flex):
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "word_embed_proj_dim": 64,
        "ffn_dim": 64, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    known = CONFIG_MAPPING[family]()
    config = CONFIG_MAPPING[family](**{key: value for key, value in sizes.items() if hasattr(known, key)})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert flex_obstacle(model, trained=False) is None
    attend_in_blocks(model)
    assert joint_difference(model, Pairs(), LENGTHS) < 3e-5


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("gpt2", {}, "GPT2Model has no flex attention"),
        ("persimmon", {}, "PersimmonModel has no flex attention"),
        ("gemma2", {}, "its own attention is eager"),
        ("gpt_oss", {}, "its own attention is eager"),
        ("llama", {"hidden_size": 32}, "8 wide, and flex attention takes 16 or more"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    ],
)
def test_what_cannot_go_through_flex_attention_is_said(family, options, reason):
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**(sizes | options)))
    assert reason in flex_obstacle(model, trained=True)
    if "dropout" in reason:  # of which a teacher makes no use
        assert flex_obstacle(model, trained=False) is None


def test_flex_attention_is_for_gpus():
    require_gpu(torch.device("cuda"))
    with pytest.raises(UserError, match=r"pair_attention: flex needs a CUDA device.*'cpu'.*Set it to dense"):
        require_gpu(torch.device("cpu"))
    assert FLEX_IN_PAIRS in BLOCK_ATTENTION
