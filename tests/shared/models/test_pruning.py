from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from builders import tiny_llama
from shared.config_models import PruneConfig
from shared.errors import UserError
from shared.models.heads import check_head
from shared.models.layer_choice import keep_layers
from shared.models.pruning import block_influence, blocks_of, prune_blocks

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
FULL, SLIDING = "full_attention", "sliding_attention"


def model_of(name: str, **options) -> transformers.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
        return transformers.AutoModelForCausalLM.from_config(config).eval()


MODELS = {
    "llama, tied": lambda: tiny_llama(layers=5, vocabulary_size=61, tied=True),
    "llama, untied": lambda: tiny_llama(layers=5, vocabulary_size=61, tied=False),
    "gpt2": lambda: model_of("GPT2", n_embd=16, n_layer=5, n_head=2, n_positions=64),
    "gemma2, mixed attention": lambda: model_of(
        "Gemma2", sliding_window=3, layer_types=[SLIDING, FULL, FULL, SLIDING, FULL]
    ),
    "qwen2": lambda: model_of(
        "Qwen2", use_sliding_window=True, max_window_layers=3, sliding_window=3, tie_word_embeddings=True
    ),
    "smollm3, blocks without rope": lambda: model_of("SmolLM3", no_rope_layers=[1, 0, 1, 1, 0]),
    "gpt-neo, mixed attention": lambda: model_of(
        "GPTNeo", attention_types=[[["global", "local", "local", "global", "local"], 1]], window_size=3
    ),
    "mixtral": lambda: model_of("Mixtral", num_local_experts=5, num_experts_per_tok=2),
}


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


class Skip(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.attention_type = getattr(block, "attention_type", None)
        self.gives_tuple = type(block).__name__ == "GPTNeoBlock"

    def forward(self, hidden_states, *args, **kwargs):
        return (hidden_states, None) if self.gives_tuple else hidden_states


def without_blocks(model, kept):
    """The same model with the other blocks short-circuited: what pruning must compute, by other means."""
    skipping = copy.deepcopy(model)
    blocks = blocks_of(skipping)
    for index in set(range(len(blocks))) - set(kept):
        blocks[index] = Skip(blocks[index])
    return skipping


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_model_is_the_model_with_those_blocks_skipped(name):
    model, kept = MODELS[name](), (0, 2, 4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pruned = prune_blocks(model, kept)
    inputs = batch()
    expected = without_blocks(model, kept)(**inputs, use_cache=False).logits
    torch.testing.assert_close(pruned(**inputs, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
    check_head(pruned, inputs)

    assert type(pruned) is type(model) and not pruned.training
    assert pruned.config.num_hidden_layers == 3 and model.config.num_hidden_layers == 5
    own = {tensor.data_ptr() for tensor in pruned.state_dict().values()}
    assert not own & {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_model_survives_saving_and_generates_with_its_cache(name, tmp_path):
    model = MODELS[name]()
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.3
    model.generation_config.eos_token_id = [2, 60]
    pruned = prune_blocks(model, (1, 2, 4))
    pruned.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = batch()
    torch.testing.assert_close(again(**inputs).logits, pruned(**inputs).logits, atol=0, rtol=0)
    assert again.generation_config.temperature == 0.3
    assert again.generation_config.eos_token_id == [2, 60]
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == tied
    assert (pruned.get_input_embeddings().weight is pruned.get_output_embeddings().weight) == tied

    prompt = inputs["input_ids"][:1]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = pruned.generate(prompt, use_cache=True, **options)
    assert cached.tolist() == pruned.generate(prompt, use_cache=False, **options).tolist()


def test_cache_indices_are_renumbered():
    pruned = prune_blocks(tiny_llama(layers=5), (1, 3, 4))
    assert [block.self_attn.layer_idx for block in blocks_of(pruned)] == [0, 1, 2]


def test_per_block_lists_of_the_configuration_are_cut_and_others_are_not():
    model = MODELS["gemma2, mixed attention"]()
    model.config.eos_token_id = [1, 2, 3, 4, 5]  # as many as blocks, and not one a block
    pruned = prune_blocks(model, (0, 1, 3))
    assert pruned.config.layer_types == [SLIDING, FULL, SLIDING]
    assert pruned.config.eos_token_id == [1, 2, 3, 4, 5]
    assert prune_blocks(MODELS["smollm3, blocks without rope"](), (1, 2, 4)).config.no_rope_layers == [
        0,
        1,
        0,
    ]


def test_dtype_and_mode_are_kept():
    pruned = prune_blocks(tiny_llama(layers=3).to(torch.bfloat16).train(), (0, 2))
    assert pruned.dtype == torch.bfloat16 and pruned.training


def test_pruning_twice_and_keeping_everything():
    model, inputs = tiny_llama(layers=4), batch()
    everything = prune_blocks(model, range(4))
    torch.testing.assert_close(everything(**inputs).logits, model(**inputs).logits, atol=0, rtol=0)
    twice = prune_blocks(prune_blocks(model, (0, 1, 3)), (0, 2))
    once = prune_blocks(model, (0, 3))
    torch.testing.assert_close(twice(**inputs).logits, once(**inputs).logits, atol=0, rtol=0)


def test_blocks_that_depend_on_their_place_are_refused():
    scaled = model_of(
        "GPT2", n_embd=16, n_layer=5, n_head=2, n_positions=64, scale_attn_by_inverse_layer_idx=True
    )
    with pytest.raises(UserError, match=r"blocks depend on their place: block 2 .*scal"):
        prune_blocks(scaled, (0, 2, 4))
    assert prune_blocks(scaled, (0, 1)).config.num_hidden_layers == 2  # the first ones keep theirs


def test_a_configuration_that_derives_its_blocks_when_read_again_is_refused(monkeypatch):
    def derive(config_class, values):
        return config_class(**{**values, "layer_types": None})

    model = MODELS["gemma2, mixed attention"]()
    monkeypatch.setattr(type(model.config), "from_dict", classmethod(derive))
    with pytest.raises(UserError, match=r"'gemma2' cannot be cut to 2 of 5"):
        prune_blocks(model, (1, 2))


# block influence


def reference_influence(model, inputs) -> list[float]:
    """Read from transformers' own hidden states; the last block's comes from a hook before the final norm."""
    states = []
    handles = [
        block.register_forward_hook(lambda _, args, out: states.append((args[0], out)))
        for block in blocks_of(model)
    ]
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    influence = []
    for before, after in states:
        total, count = 0.0, 0
        for b, row in enumerate(inputs["attention_mask"]):
            for t in row.nonzero().flatten().tolist():
                x, y = before[b, t].double(), after[b, t].double()
                total += 1 - float(x @ y / (x.norm() * y.norm()))
                count += 1
        influence.append(total / count)
    return influence


def test_block_influence_matches_its_definition_and_ignores_padding():
    model = tiny_llama(layers=4, vocabulary_size=61)
    influence = block_influence(model, [batch()])
    assert influence == pytest.approx(reference_influence(model, batch()), abs=1e-6)
    other_padding = batch()
    other_padding["input_ids"][1, 6:] = 50
    assert block_influence(model, [other_padding]) == pytest.approx(influence, abs=1e-6)


def test_block_influence_reads_blocks_that_give_tuples():
    model = MODELS["gpt-neo, mixed attention"]()
    influence = block_influence(model, [batch()])
    hidden = model(**batch(), output_hidden_states=True).hidden_states
    x, y = (hidden[i][batch()["attention_mask"].bool()] for i in (1, 2))
    expected = 1 - nn.functional.cosine_similarity(x, y, dim=-1).mean()
    assert influence[1] == pytest.approx(expected.item(), abs=1e-6)


def test_block_influence_is_a_mean_over_tokens_not_batches():
    model = tiny_llama(layers=3, vocabulary_size=61)
    whole = batch()
    apart = [{k: v[:1] for k, v in whole.items()}, {k: v[1:, :6] for k, v in whole.items()}]
    assert block_influence(model, apart) == pytest.approx(block_influence(model, [whole]), abs=1e-6)


def test_a_block_that_does_nothing_has_no_influence_and_goes_first():
    model = tiny_llama(layers=4)
    for parameter in (
        blocks_of(model)[2].self_attn.o_proj.weight,
        blocks_of(model)[2].mlp.down_proj.weight,
    ):
        nn.init.zeros_(parameter)
    influence = block_influence(model, [batch()])
    assert influence[2] == pytest.approx(0, abs=1e-6)
    kept = keep_layers(PruneConfig(block_influence=1), 4, influence)
    assert kept == (0, 1, 3)
    torch.testing.assert_close(prune_blocks(model, kept)(**batch()).logits, model(**batch()).logits)


def test_block_influence_leaves_the_model_as_it_was():
    model = tiny_llama(layers=3).train()
    block_influence(model, [batch()])
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_block_influence_works_in_bfloat16_and_without_a_mask():
    model = tiny_llama(layers=3, vocabulary_size=61)
    inputs = {"input_ids": batch()["input_ids"]}
    exact = block_influence(model, [inputs])
    assert block_influence(model.to(torch.bfloat16), [inputs]) == pytest.approx(exact, abs=0.02)


def test_block_influence_without_prompts_is_refused():
    with pytest.raises(UserError, match="at least one calibration prompt"):
        block_influence(tiny_llama(), [])


# which blocks stay


def test_keep_layers():
    influence = [0.9, 0.1, 0.3, 0.2, 0.1, 0.8]
    assert keep_layers(PruneConfig(drop_layers=(4, 1)), 6, None) == (0, 2, 3, 5)
    assert keep_layers(PruneConfig(keep_every=2), 6, None) == (0, 2, 4)
    assert keep_layers(PruneConfig(keep_every=4), 6, None) == (0, 4)
    assert keep_layers(PruneConfig(block_influence=1), 6, influence) == (0, 1, 2, 3, 5)  # a tie: the later
    assert keep_layers(PruneConfig(block_influence=3), 6, influence) == (0, 2, 5)
    assert keep_layers(PruneConfig(block_influence=5), 6, influence) == (0,)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PruneConfig(drop_layers=(1, 4, 7)), r"\[4, 7\] are not blocks of this model; it has 0 to 3"),
        (PruneConfig(drop_layers=(1, 1)), r"names a block twice: \[1, 1\]"),
        (PruneConfig(drop_layers=(0, 1, 2, 3)), "drops all 4 blocks"),
        (PruneConfig(block_influence=4), "drops all 4 blocks"),
        (PruneConfig(block_influence=9), "drops all 4 blocks"),
        (PruneConfig(keep_every=5), r"keep_every: 5 is more than this model's 4 blocks"),
    ],
)
def test_what_cannot_be_pruned(config, message):
    with pytest.raises(UserError, match=message):
        keep_layers(config, 4, [0.1, 0.2, 0.3, 0.4])
