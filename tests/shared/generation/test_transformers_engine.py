"""The engine samples each response for itself, and leaves the model as it was."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from builders import tiny_llama, tiny_tokenizer
from shared.errors import UserError
from shared.generation.transformers_engine import TransformersEngine
from shared.types import Message, Request, Sample, Sampling, TextPart
from text_distill.adapter import TextAdapter

MANY_STOPS = tuple(range(3, 30))


def requests(count=6, role="teacher"):
    return [
        Request(Sample(f"s{i}", (Message("user", (TextPart("word " * (1 + 3 * i % 7)),)),)), role, 1)
        for i in range(count)
    ]


def engine(model=None, *, stop_ids=(), **options):
    adapter = TextAdapter(tiny_tokenizer(), stop_ids=stop_ids)
    return TransformersEngine(model or tiny_llama(), adapter, **{"fingerprint": "tiny", **options})


SAMPLED = Sampling(max_new_tokens=20, temperature=1.0, top_p=0.95, seed=4)
GREEDY = Sampling(max_new_tokens=20, temperature=0.0)


def test_the_adapter_says_whether_images_are_seen():
    adapter = TextAdapter(tiny_tokenizer())
    assert TransformersEngine(tiny_llama(), adapter, fingerprint="tiny").accepts_images is False
    adapter.accepts_images = True
    assert TransformersEngine(tiny_llama(), adapter, fingerprint="tiny").accepts_images is True


def test_response_does_not_depend_on_its_neighbours():
    made = engine(stop_ids=MANY_STOPS)
    together = list(made.generate(requests(), SAMPLED))
    alone = [response for request in requests() for response in made.generate([request], SAMPLED)]
    shuffled = list(made.generate(requests()[::-1], SAMPLED))[::-1]
    assert together == alone == shuffled
    assert len({response.token_ids for response in together}) == 6
    assert list(made.generate([], SAMPLED)) == []


def test_roles_rounds_draws_and_seeds_have_their_own_noise():
    made = engine()
    (one,) = requests(1)
    variants = [one, one._replace(role="student"), one._replace(round=2), one._replace(draw=1)]
    assert len({r.token_ids for r in made.generate(variants, SAMPLED)}) == 4
    (other,) = made.generate([one], Sampling(max_new_tokens=20, temperature=1.0, top_p=0.95, seed=5))
    assert other.token_ids != next(made.generate([one], SAMPLED)).token_ids


def test_greedy_equals_the_models_own_greedy():
    model = tiny_llama()
    adapter = TextAdapter(tiny_tokenizer())
    inputs = adapter.encode_prompts([request.sample for request in requests()])
    config = GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=2, pad_token_id=0)
    expected = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :].tolist()
    found = [response.token_ids for response in engine(model).generate(requests(), GREEDY)]
    assert found == [tuple(row[: row.index(2) + 1] if 2 in row else row) for row in expected]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_stop_token_ends_a_response_and_pads_never_enter_it(sampling):
    free = list(engine().generate(requests(16), sampling))
    stopped = list(engine(stop_ids=MANY_STOPS).generate(requests(16), sampling))
    assert {response.finish_reason for response in stopped} == {"stop", "length"}
    for unstopped, response in zip(free, stopped, strict=True):
        end = next((i + 1 for i, t in enumerate(unstopped.token_ids) if t in {2, *MANY_STOPS}), None)
        assert response.token_ids == unstopped.token_ids[:end]
        assert response.finish_reason == ("length" if end is None else "stop")
    assert stopped[0].text == TextAdapter(tiny_tokenizer()).decode(stopped[0].token_ids)


def test_ids_outside_the_shared_vocabulary_are_never_drawn():
    free = {t for r in engine().generate(requests(), GREEDY) for t in r.token_ids}
    assert any(t >= 150 for t in free) and free & set(
        range(50, 100)
    )  # what is forbidden below would be drawn
    limited = engine(width=150, excluded_ids=range(50, 100))
    for sampling in (GREEDY, SAMPLED, Sampling(max_new_tokens=20, temperature=5.0, top_p=1.0)):
        drawn = {t for r in limited.generate(requests(), sampling) for t in r.token_ids}
        assert drawn <= {*range(50), *range(100, 150)}
    with pytest.raises(AssertionError, match="never be sampled"):
        engine(excluded_ids=(2,))


def test_models_own_generation_settings_have_no_effect_and_come_back():
    expected = list(engine().generate(requests(), SAMPLED))
    model = tiny_llama()
    own = GenerationConfig(
        repetition_penalty=9.0,
        suppress_tokens=[expected[0].token_ids[0]],
        forced_eos_token_id=2,
        min_new_tokens=9,
    )
    model.generation_config = own
    model.config.use_cache = False
    assert list(engine(model).generate(requests(), SAMPLED)) == expected
    assert model.generation_config is own and model.config.use_cache is False


def lora_model():
    config = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(tiny_llama(), config)


def test_lora_under_gradient_checkpointing_generates_as_merged_and_still_trains():
    merged = lora_model().eval().merge_and_unload()
    expected = [r.token_ids for r in engine(merged).generate(requests(), GREEDY)]
    assert expected != [r.token_ids for r in engine().generate(requests(), GREEDY)]
    model = lora_model()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    model.get_base_model().lm_head.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert [r.token_ids for r in engine(model).generate(requests(), GREEDY)] == expected
    assert {name: module.training for name, module in model.named_modules()} == modes
    ids = torch.arange(10, 30)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_keys_and_values_are_cached_also_under_gradient_checkpointing():
    model = tiny_llama().train()
    model.gradient_checkpointing_enable()
    widths = []
    model.model.register_forward_hook(
        lambda module, args, kwargs, out: widths.append(out[0].shape[1]), with_kwargs=True
    )
    list(engine(model).generate(requests(2), GREEDY))
    assert widths[0] > 1 and set(widths[1:]) == {1} and len(widths) == 20


def test_generation_ends_when_all_responses_have():
    model = tiny_llama()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    made = list(engine(model, stop_ids=range(3, 250)).generate(requests(), SAMPLED))
    assert len(calls) == max(len(response.token_ids) for response in made) < 20


def test_nan_logits_name_the_sample():
    model = tiny_llama(tied=False)
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    for sampling in (GREEDY, SAMPLED):
        with pytest.raises(UserError, match="teacher's logits are NaN or infinite for sample 's0'"):
            list(engine(model).generate(requests(), sampling))
    assert model.generation_config.eos_token_id == 2


def test_fingerprints_tell_apart_what_changes_the_responses():
    base = engine()
    others = [engine(fingerprint="x"), engine(width=200), engine(excluded_ids=(9,)), engine(stop_ids=(9,))]
    others.append(engine(tiny_llama().bfloat16()))
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert base.fingerprint == engine().fingerprint
    (one,) = requests(1)
    assert next(base.generate([one], SAMPLED)).fingerprint != next(base.generate([one], GREEDY)).fingerprint
