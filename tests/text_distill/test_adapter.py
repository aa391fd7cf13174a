from __future__ import annotations

import json
import pickle

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
)

import text_distill.adapter as adapter_module
from builders import CHAT_TEMPLATE, save_tiny_model, tiny_llama, tiny_tokenizer
from shared.errors import AlignmentError, UserError
from shared.generation.transformers_engine import TransformersEngine
from shared.models.references import ModelRef
from shared.models.teachers import LocalTeacher
from shared.types import Group, ImagePart, Message, Request, Response, Sample, Sampling, TextPart
from text_distill.adapter import TextAdapter, TextAdapterKind

END_OF_TEXT, START, END = 0, 1, 2


def chat(index: int = 0, text: str = "hello", *, system: str | None = None) -> Sample:
    turns = [("system", system)] if system else []
    turns.append(("user", text))
    messages = tuple(Message(role, (TextPart(content),)) for role, content in turns)  # type: ignore[arg-type]
    return Sample(f"s{index}", messages, source=f"prompts.jsonl:{index + 1}")


def group(sample: Sample, *answers: tuple[int, ...]) -> Group:
    roles = ("teacher", "student")
    responses = (
        Response(sample.id, role, 1, 0, ids, "", "stop" if ids[-1:] == (END,) else "length", "f")
        for role, ids in zip(roles, answers, strict=False)
    )
    return Group(sample, tuple(responses))


MIXED = [
    group(chat(0, "a"), (10, 11, 12, END), (20,)),
    group(chat(1, "a much longer question than the first"), (END,), (30, 31, 32, 33, 34, 35)),
    group(chat(2, "middle"), (40, 41), (50, 51, 52)),
]


def tiny_model(kind: str):
    if kind == "llama":
        return tiny_llama()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"vocab_size": 259, "initializer_range": 0.2, "bos_token_id": START, "eos_token_id": END}
        if kind == "bloom":
            return BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, **shape)).eval()
        if kind == "mpt":
            return MptForCausalLM(MptConfig(d_model=32, n_layers=2, n_heads=4, **shape)).eval()
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **shape)).eval()


def opened(folder, model) -> TextAdapter:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return TextAdapterKind().open(ModelRef(name=str(folder)))


# --- rows ---------------------------------------------------------------------------------------------


def test_rows_start_at_the_last_prompt_token_and_cover_every_response_token():
    adapter = TextAdapter(tiny_tokenizer())
    encoded = adapter.encode(MIXED)
    ids_BT = encoded.inputs["input_ids"]
    flat = ids_BT.flatten()
    responses = [response for each in MIXED for response in each.responses]
    assert encoded.target_ids_N.tolist() == [token for r in responses for token in r.token_ids]
    assert torch.equal(flat[encoded.rows_N + 1], encoded.target_ids_N)
    for index, response in enumerate(responses):
        rows = encoded.rows_N[encoded.response_N == index]
        prompt = adapter.prompt_tokens(MIXED[index // 2].sample)
        start = index * ids_BT.shape[1] + prompt - 1
        assert rows.tolist() == list(range(start, start + len(response.token_ids)))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "mpt"])
def test_logits_at_response_rows_are_those_of_an_unpadded_pass(tmp_path, kind):
    model = tiny_model(kind)
    adapter = opened(tmp_path, model)
    encoded = adapter.encode(MIXED)
    with torch.no_grad():
        ours_NV = model(**encoded.inputs).logits.flatten(0, 1)[encoded.rows_N]
        alone = []
        for sample, responses in MIXED:
            prompt = adapter.prompt_ids(sample)
            for response in responses:
                ids = torch.tensor([[*prompt, *response.token_ids]])
                logits_TV = model(input_ids=ids).logits[0]
                alone.append(logits_TV[len(prompt) - 1 : -1])
    torch.testing.assert_close(ours_NV, torch.cat(alone), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_hidden_rows_give_the_responses_log_probabilities(tmp_path, kind):
    model = tiny_model(kind)
    adapter = opened(tmp_path, model)
    encoded = adapter.encode(MIXED)
    signal = LocalTeacher(model, adapter, None).signal(MIXED, encoded)
    log_p_NV = signal.head.logits(signal.hidden_NE).log_softmax(-1)
    ours_N = log_p_NV.gather(1, encoded.target_ids_N[:, None])[:, 0]
    expected = []
    with torch.no_grad():
        for sample, responses in MIXED:
            for response in responses:
                ids = adapter.prompt_ids(sample)
                for token in response.token_ids:  # one token at a time, as the model would write it
                    logits_V = model(input_ids=torch.tensor([ids])).logits[0, -1]
                    expected.append(logits_V.log_softmax(-1)[token])
                    ids = [*ids, token]
    torch.testing.assert_close(ours_N, torch.stack(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "takes"), [("llama", True), ("gpt2", True), ("bloom", False), ("mpt", False)]
)
def test_position_ids_go_to_models_that_take_them(tmp_path, kind, takes):
    encoded = opened(tmp_path, tiny_model(kind)).encode(MIXED)
    assert ("position_ids" in encoded.inputs) is takes


def test_a_model_that_transformers_does_not_know_gets_position_ids(tmp_path, monkeypatch):
    save_tiny_model(tmp_path)
    monkeypatch.setattr(adapter_module, "read_model_config", lambda ref: {"model_type": "brand_new"})
    encoded = TextAdapterKind().open(ModelRef(name=str(tmp_path))).encode(MIXED)
    assert "position_ids" in encoded.inputs


# --- ends ---------------------------------------------------------------------------------------------


def test_the_end_is_among_the_rows_only_where_the_model_wrote_it():
    adapter = TextAdapter(tiny_tokenizer())
    encoded = adapter.encode(MIXED)
    with_end = [r.token_ids[-1] == END for each in MIXED for r in each.responses]
    taught = [
        END in encoded.target_ids_N[encoded.response_N == index].tolist() for index in range(len(with_end))
    ]
    assert taught == with_end == [True, False, True, False, False, False]


def test_stop_ids_come_from_the_generation_configuration_too(tmp_path):
    save_tiny_model(tmp_path)
    assert TextAdapterKind().open(ModelRef(name=str(tmp_path))).vocabulary.stop_ids == (END,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [END_OF_TEXT, END]}))
    adapter = TextAdapterKind().open(ModelRef(name=str(tmp_path)))
    assert adapter.vocabulary.stop_ids == (END_OF_TEXT, END)


def test_generation_ends_at_a_stop_id_of_the_generation_configuration(tmp_path):
    save_tiny_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [77]}))
    adapter = TextAdapterKind().open(ModelRef(name=str(tmp_path)))
    model = LlamaForCausalLM.from_pretrained(tmp_path)

    class Says77(torch.nn.Module):
        def forward(self, hidden):
            logits = torch.zeros(*hidden.shape[:-1], 259)
            logits[..., 77] = 1.0
            return logits

    model.lm_head = Says77()
    engine = TransformersEngine(model, adapter, fingerprint="f")
    (response,) = engine.generate([Request(chat(), "teacher", 1)], Sampling(8, temperature=0.0))
    assert response.token_ids == (77,) and response.finish_reason == "stop"


@pytest.mark.parametrize(
    ("turn_end", "eos", "stops"),
    [
        ("<|im_end|>\n", "<|endoftext|>", (END_OF_TEXT, END)),  # a base model's eos, a chat template's end
        (" <|im_end|><|endoftext|>", "<|endoftext|>", (END_OF_TEXT, END)),  # words before it, more after it
        ("\n", "<|endoftext|>", (END_OF_TEXT,)),  # no special token ends the turn
    ],
)
def test_the_turns_end_is_the_first_special_token_after_an_answer(turn_end, eos, stops):
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        + turn_end.replace("\n", "{{ '\\n' }}")
        + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenizer.eos_token = eos
    adapter = TextAdapter(tokenizer)
    assert adapter.vocabulary.stop_ids == stops
    assert adapter.encode_text("hi", stop=True)[-1] == stops[-1]
    assert adapter.encode_text("hi", stop=False) == adapter.encode_text("hi", stop=True)[:-1]


def test_a_template_that_refuses_chats_without_a_system_turn_still_opens():
    template = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    adapter = TextAdapter(tiny_tokenizer(chat_template=template), system_prompt="be brief")
    assert adapter.vocabulary.stop_ids == (END,)
    assert "be brief" in adapter.describe(chat())


# --- prompts ------------------------------------------------------------------------------------------


def test_the_rendered_prompt_is_tokenised_without_further_special_tokens():
    adapter = TextAdapter(tiny_tokenizer())
    ids = adapter.prompt_ids(chat(text="hi"))
    assert adapter.describe(chat(text="hi")) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(START) == 2 and ids.count(END) == 1 and ids[0] == START
    assert adapter.prompt_tokens(chat(text="hi")) == len(ids)


def test_prompts_for_generation_are_padded_on_the_left_and_masked():
    adapter = TextAdapter(tiny_tokenizer())
    samples = [each.sample for each in MIXED]
    inputs = adapter.encode_prompts(samples)
    longest = max(map(adapter.prompt_tokens, samples))
    assert inputs["input_ids"].shape == (3, longest)
    for row, mask, sample in zip(*inputs.values(), samples, strict=True):
        prompt = adapter.prompt_ids(sample)
        assert row[-len(prompt) :].tolist() == prompt
        assert mask.tolist() == [0] * (longest - len(prompt)) + [1] * len(prompt)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "mpt"])
def test_greedy_responses_do_not_depend_on_padding(tmp_path, kind):
    model = tiny_model(kind)
    adapter = opened(tmp_path, model)
    engine = TransformersEngine(model, adapter, fingerprint="f")
    requests = [Request(each.sample, "teacher", 1) for each in MIXED]
    sampling = Sampling(6, temperature=0.0)
    together = [response.token_ids for response in engine.generate(requests, sampling)]
    alone = [next(iter(engine.generate([request], sampling))).token_ids for request in requests]
    assert together == alone


def test_a_tokenizer_without_padding_token_pads_with_a_stop_token():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    adapter = TextAdapter(tokenizer)
    encoded = adapter.encode(MIXED)
    masked = encoded.inputs["input_ids"][encoded.inputs["attention_mask"] == 0]
    assert set(masked.tolist()) == {END}


def test_the_system_prompt_goes_before_chats_that_have_none():
    adapter = TextAdapter(tiny_tokenizer(), system_prompt="be brief")
    assert adapter.describe(chat()).startswith("<|im_start|>system\nbe brief<|im_end|>")
    own = adapter.describe(chat(system="be long"))
    assert "be long" in own and "be brief" not in own


THINKING = CHAT_TEMPLATE + "{% if add_generation_prompt and not thinking %}<think></think>{% endif %}"


def test_template_arguments_reach_the_template():
    tokenizer = tiny_tokenizer(chat_template=THINKING)
    assert TextAdapter(tokenizer).describe(chat()).endswith("<think></think>")
    thinking = TextAdapter(tokenizer, template_arguments={"thinking": True})
    assert thinking.describe(chat()).endswith("assistant\n")
    assert thinking.fingerprint != TextAdapter(tokenizer).fingerprint


@pytest.mark.parametrize("name", ["thinkin", "add_generation_prompt", "tokenize"])
def test_template_arguments_that_cannot_take_effect_are_refused(name):
    with pytest.raises(UserError, match=f"template_arguments '{name}'"):
        TextAdapter(tiny_tokenizer(chat_template=THINKING), template_arguments={name: True})


@pytest.mark.parametrize(
    ("broken", "cause"),
    [
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ 'a' + 1 }}", "str"),
        ("{{ x.y.z }}", "undefined"),
    ],
)
def test_what_a_template_refuses_is_named_with_its_sample(broken, cause):
    template = "{% if messages[-1]['content'] == 'bad' %}" + broken + "{% endif %}" + CHAT_TEMPLATE
    adapter = TextAdapter(tiny_tokenizer(chat_template=template))
    adapter.describe(chat(0, "good"))
    with pytest.raises(UserError, match=rf"'s4' \(prompts.jsonl:5\).*refuses it: .*{cause}"):
        adapter.describe(chat(4, "bad"))


def test_samples_with_images_are_refused():
    message = Message("user", (ImagePart("cat.png"), TextPart("what is this?")))
    sample = Sample("s0", (message,), source="prompts.jsonl:1")
    adapter = TextAdapter(tiny_tokenizer())
    for use in (adapter.describe, adapter.prompt_tokens, lambda s: adapter.encode([group(s, (5,))])):
        with pytest.raises(UserError, match=r"'s0' \(prompts.jsonl:1\) has images.*distill-vlm"):
            use(sample)


# --- responses that cannot be used --------------------------------------------------------------------


def test_an_empty_response_is_refused():
    with pytest.raises(AlignmentError, match="sample 's1': a response has no tokens"):
        TextAdapter(tiny_tokenizer()).encode([MIXED[0], group(chat(1), (5,), ())])


@pytest.mark.parametrize("foreign", [259, -1, 100_000])
def test_a_token_that_this_model_does_not_have_is_refused(foreign):
    with pytest.raises(AlignmentError, match=f"sample 's0': a response holds token id {foreign}, .*259 ids"):
        TextAdapter(tiny_tokenizer()).encode([group(chat(), (5, foreign, 6))])


# --- the whole ----------------------------------------------------------------------------------------


def test_an_adapter_survives_pickling():
    adapter = TextAdapter(
        tiny_tokenizer(chat_template=THINKING),
        system_prompt="be brief",
        template_arguments={"thinking": True},
    )
    again = pickle.loads(pickle.dumps(adapter))
    assert again.fingerprint == adapter.fingerprint and again.vocabulary == adapter.vocabulary
    assert again.describe(chat()) == adapter.describe(chat())
    for ours, theirs in zip(adapter.encode(MIXED)[1:], again.encode(MIXED)[1:], strict=True):
        assert torch.equal(ours, theirs)


def test_decoded_text_has_no_special_tokens_and_encodes_back():
    adapter = TextAdapter(tiny_tokenizer())
    text = "naïve café, 3 × 4"
    assert adapter.decode(adapter.encode_text(text, stop=True)) == text


@pytest.mark.parametrize(
    ("config", "claimed"),
    [({"model_type": "llama"}, True), ({"model_type": "llava", "vision_config": {}}, False)],
)
def test_language_models_are_claimed_and_others_left(config, claimed):
    assert TextAdapterKind().claims(config) is claimed


def test_options_are_refused(tmp_path):
    with pytest.raises(UserError, match="no options; got pixels"):
        TextAdapterKind().open(ModelRef(name=str(save_tiny_model(tmp_path))), {"pixels": 3})


def test_a_model_without_chat_template_is_refused_by_name(tmp_path):
    save_tiny_model(tmp_path, tokenizer_options={"chat_template": None})
    with pytest.raises(UserError, match="no chat template"):
        TextAdapterKind().open(ModelRef(name=str(tmp_path)))


@pytest.mark.parametrize(("arguments", "warned"), [({}, True), ({"date_string": "26 Jul 2024"}, False)])
def test_a_template_that_writes_the_day_is_warned_of(caplog, arguments, warned):
    # as Llama 3's
    template = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "Today is {{ date_string }}." + CHAT_TEMPLATE
    )
    TextAdapter(tiny_tokenizer(chat_template=template), template_arguments=arguments)
    assert ("writes today's date into prompts" in caplog.text) == warned
