"""Every family: what our batches compute is what the model computes for one sample alone."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from transformers.integrations.flex_attention import flex_attention_forward

from shared.adapter import Adapter
from shared.data.rows import check_alignment
from shared.errors import AlignmentError, UserError
from shared.models import pair_attention
from shared.models.heads import check_head, head_of, hidden_rows
from shared.models.layout_support import joint_support
from shared.models.pair_attention import attend_in_blocks
from shared.models.vocabulary import shared_vocabulary
from shared.types import Encoded, Group, ImagePart, Message, Response, Role, Sample, TextPart
from vlm_builders import FAMILIES, llava, picture, template, token_id
from vlm_distill.adapter import VlmAdapter
from vlm_distill.prompt_reader import PromptReader

SIZES = [(40, 24), (24, 40), (16, 16), (70, 20)]
PICTURES = {f"picture-{index}": picture(index, size) for index, size in enumerate(SIZES)}
IMAGES_PER_SAMPLE = (1, 0, 2, 1)
SEES_BOTH_WAYS = ("paligemma", "gemma3")  # images or prefix; such models read pairs in two sequences

Opened = tuple[torch.nn.Module, VlmAdapter]


def adapter_of(model, processor) -> VlmAdapter:
    return VlmAdapter(processor, model.config, open_image=open_picture, stop_ids=(2,))


@pytest.fixture(scope="module", params=FAMILIES)
def opened(request) -> Opened:
    family = FAMILIES[request.param]()
    model = family.model(0)
    return model, adapter_of(model, family.processor())


def name_of(model) -> str:
    return model.config.model_type


def samples_of(model) -> list[Sample]:
    # PaliGemma's processor takes no prompt without an image
    least = 1 if name_of(model) == "paligemma" else 0
    return [sample_of(index, max(least, count)) for index, count in enumerate(IMAGES_PER_SAMPLE)]


def sample_of(index: int, images: int, text: str = "what is it") -> Sample:
    pictures = [ImagePart(f"picture-{(index + k) % len(SIZES)}") for k in range(images)]
    return Sample(f"s{index}", (Message("user", (*pictures, TextPart(text + "?" * index))),), "vqa")


def response(sample: Sample, role: Role, *token_ids: int) -> Response:
    return Response(sample.id, role, 1, 0, token_ids, "", "stop", "x")


def pairs(samples: Sequence[Sample]) -> list[Group]:
    return [
        Group(s, (response(s, "teacher", 10 + i, 11, 12, 2), response(s, "student", 20, 21 + i, 2)))
        for i, s in enumerate(samples)
    ]


def layouts_of(model) -> tuple[str, ...]:
    return ("separate",) if name_of(model) in SEES_BOTH_WAYS else ("separate", "joint")


def plain_logits(model, adapter: VlmAdapter, group: Group, answer: Response) -> torch.Tensor:
    """The logits at the response's rows, from the processor's own output and nothing of ours."""
    reader = adapter._reader
    pictures = [PICTURES[name].copy() for name in group.sample.images]
    given = dict(
        reader.processor(
            text=[reader.text(group.sample)],
            images=[pictures] if pictures else None,
            return_tensors="pt",
            add_special_tokens=not reader.text(group.sample).startswith("<|im_start|>"),
        )
    )
    given.pop("labels", None)
    answer_ids = torch.tensor([answer.token_ids])
    prompt = given["input_ids"].shape[1]
    given["input_ids"] = torch.cat([given["input_ids"], answer_ids], 1)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in given:
            fill = 1 if name_of(model) == "paligemma" else 0
            given[key] = torch.cat([given[key], torch.full_like(answer_ids, fill)], 1)
    for module in model.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None
    return model(**given, use_cache=False).logits[0, prompt - 1 : -1]


@torch.no_grad()
def test_rows_are_those_of_one_plain_forward_alone(opened: Opened) -> None:
    model, adapter = opened
    groups = pairs(samples_of(model))
    expected = torch.cat([plain_logits(model, adapter, g, r) for g in groups for r in g.responses])
    for layout in layouts_of(model):
        encoded = adapter.encode(groups, layout=layout)
        ours = head_of(model, None).logits(hidden_rows(model, encoded.inputs, encoded.rows_N))
        assert (ours - expected).abs().max() < 1e-4 * expected.abs().max(), layout
        adapter.check(groups, encoded)


@torch.no_grad()
def test_pairs_about_images_take_a_block_mask(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = opened
    if "joint" not in layouts_of(model):
        pytest.skip("reads pairs in two sequences")
    encoded = adapter.encode(pairs(samples_of(model)), layout="joint")
    expected = hidden_rows(model, encoded.inputs, encoded.rows_N)
    decoder = model.config.get_text_config(decoder=True)
    monkeypatch.setattr(decoder, "_attn_implementation_internal", decoder._attn_implementation)  # put back
    attend_in_blocks(model)
    seen = []
    monkeypatch.setattr(
        pair_attention,
        "flex_attention_forward",
        lambda *inputs, **options: seen.append(1) or flex_attention_forward(*inputs, **options),
    )
    with torch.compiler.set_stance("force_eager"):  # by flex attention's formulas, not its kernels
        flex = hidden_rows(model, encoded.inputs, encoded.rows_N)
    assert len(seen) == decoder.num_hidden_layers  # of the decoder alone, not of the tower
    assert (flex - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_left_padded_prompts_generate_as_each_does_alone(opened: Opened) -> None:
    model, adapter = opened
    samples = samples_of(model)
    check_head(model, adapter.encode_prompts(samples))
    together = model.generate(**adapter.encode_prompts(samples), max_new_tokens=4, do_sample=False)
    alone = [
        model.generate(**adapter.encode_prompts([s]), max_new_tokens=4, do_sample=False) for s in samples
    ]
    assert together[:, -4:].tolist() == [ids[0, -4:].tolist() for ids in alone]


def test_images_see_both_ways_only_where_no_ready_mask_can_undo_it(opened: Opened) -> None:
    model, _ = opened
    support = joint_support(model)
    if name_of(model) in SEES_BOTH_WAYS:
        assert support.obstacle is not None
    else:
        assert support.obstacle is None and support.family_known


def test_the_tower_runs_once_for_a_pair(opened: Opened) -> None:
    model, adapter = opened
    groups = pairs(samples_of(model))
    looks = []
    tower = next(
        m for name, m in model.named_modules() if name.endswith(("vision_tower", "visual", "vision_model"))
    )
    handle = tower.register_forward_hook(
        lambda _, args, kwargs, out: looks.append(args or kwargs), with_kwargs=True
    )
    for layout in layouts_of(model):
        looks.clear()
        encoded = adapter.encode(groups, layout=layout)
        hidden_rows(model, encoded.inputs, encoded.rows_N)
        assert len(looks) == 1
    handle.remove()
    # and what enters is every image once
    for key in ("pixel_values", "image_grid_thw"):
        if key in encoded.inputs:
            alone = sum(len(adapter.encode([group]).inputs.get(key, ())) for group in groups)
            assert len(encoded.inputs[key]) == alone


def test_gradients_of_two_sequences_reach_the_shared_look(opened: Opened) -> None:
    model, adapter = opened
    groups = pairs(samples_of(model))
    gradients = []
    for parts in ([groups], [[Group(g.sample, (r,))] for g in groups for r in g.responses]):
        model.zero_grad()
        for part in parts:
            encoded = adapter.encode(part, layout="separate")
            hidden_rows(model, encoded.inputs, encoded.rows_N).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    together, alone = gradients
    assert together.keys() == alone.keys()
    largest = max(float(gradient.abs().max()) for gradient in alone.values())
    for name, gradient in together.items():  # a key's bias has none but rounding
        assert (gradient - alone[name]).abs().max() <= 1e-4 * alone[name].abs().max() + 1e-6 * largest, name


def test_every_image_token_is_placed(opened: Opened) -> None:
    model, adapter = opened
    sample = samples_of(model)[2]
    text = adapter.describe(sample)
    assert f"{adapter.prompt_tokens(sample)} prompt tokens" in text
    assert "image 1" in text and "image 2" in text and "the whole picture" in text
    from vlm_distill.image_tokens import input_map

    found = input_map(adapter._reader, sample, adapter.image_token_id)
    shown = sum(len(piece.cells) for piece in found.pieces)
    assert shown == list(found.ids).count(adapter.image_token_id) > 0
    # pieces cover the prompt without gap or overlap
    assert [piece.start for piece in found.pieces] == [0, *(piece.stop for piece in found.pieces)][:-1]
    assert found.pieces[-1].stop == len(found.ids)
    # no two tokens of an image show the same cell
    for image in (0, 1):
        cells = [c for piece in found.pieces if piece.image == image for c in piece.cells]
        assert len(set(cells)) == len(cells)


def test_an_adapter_can_be_sent_to_another_process(opened: Opened) -> None:
    model, adapter = opened
    there = pickle.loads(pickle.dumps(adapter))
    groups = pairs(samples_of(model))
    here, sent = adapter.encode(groups), there.encode(groups)
    assert there.fingerprint == adapter.fingerprint
    assert all(torch.equal(here.inputs[key], sent.inputs[key]) for key in here.inputs)


def open_picture(name: str):
    return PICTURES[name].copy()


# --- what must fail loudly ---


def vocabulary_of(adapter: Adapter, model):
    width = model.get_output_embeddings().weight.shape[0]
    return shared_vocabulary(adapter.vocabulary, adapter.vocabulary, teacher_width=width, student_width=width)


def test_rows_shifted_by_one(opened: Opened) -> None:
    model, adapter = opened
    groups = pairs(samples_of(model))
    encoded = adapter.encode(groups)
    vocabulary = vocabulary_of(adapter, model)
    check_alignment(groups, {"student": encoded}, vocabulary)
    with pytest.raises(AlignmentError, match="s0"):
        check_alignment(groups, {"student": encoded._replace(rows_N=encoded.rows_N + 1)}, vocabulary)


def test_images_swapped(opened: Opened) -> None:
    model, adapter = opened
    groups = pairs(samples_of(model))
    encoded = adapter.encode(groups)
    pixels = encoded.inputs["pixel_values"]
    swapped = Encoded({**encoded.inputs, "pixel_values": pixels.flip(0)}, *encoded[1:])
    with pytest.raises(AlignmentError, match=r"sample 's\d': 'pixel_values' is not its own"):
        adapter.check(groups, swapped)


def test_a_vision_key_is_missing(opened: Opened) -> None:
    model, adapter = opened
    groups = pairs(samples_of(model))
    encoded = adapter.encode(groups)
    for key in set(adapter._reader.family.batching) & set(encoded.inputs):
        without = {name: value for name, value in encoded.inputs.items() if name != key}
        with pytest.raises(AlignmentError, match=rf"sample 's0': the model's '{key}' is missing"):
            adapter.check(groups, encoded._replace(inputs=without))


def test_the_other_models_processor() -> None:
    teacher, student = llava(16), llava(24)
    groups = pairs([sample_of(0, 1)])
    model = teacher.model(0)
    theirs = adapter_of(student.model(0), student.processor()).encode(groups)
    with pytest.raises(AlignmentError, match="does not begin with its own prompt"):
        adapter_of(model, teacher.processor()).check(groups, theirs)


def test_image_placeholders_are_outside_the_shared_vocabulary(opened: Opened) -> None:
    model, adapter = opened
    vocabulary = vocabulary_of(adapter, model)
    assert adapter.image_token_id not in vocabulary
    sample = samples_of(model)[0]
    groups = [Group(sample, (response(sample, "teacher", 10, adapter.image_token_id, 2),))]
    with pytest.raises(AlignmentError, match="not in the vocabulary that teacher and student share"):
        check_alignment(groups, {"student": adapter.encode(groups)}, vocabulary)


def test_a_prompt_that_holds_the_placeholder_as_text() -> None:
    family = llava()
    adapter = adapter_of(family.model(0), family.processor())
    with pytest.raises(UserError, match=r"sample 's0' .*its text holds '<image>' itself"):
        adapter.prompt_tokens(sample_of(0, 1, "what is <image>"))


def test_a_template_that_leaves_images_out() -> None:
    family = llava()
    processor = family.processor()
    processor.chat_template = template("")
    adapter = adapter_of(family.model(0), processor)
    with pytest.raises(UserError, match=r"1 images, but the rendered prompt has 0 places .*chat_template"):
        adapter.prompt_tokens(sample_of(0, 1))


def test_an_image_that_cannot_be_opened_names_the_sample() -> None:
    from shared.data.images import open_image

    family = llava()
    adapter = VlmAdapter(family.processor(), family.model(0).config, open_image=open_image)
    sample = Sample("s7", (Message("user", (ImagePart("nowhere.png"),)),), "vqa", source="prompts.jsonl:7")
    with pytest.raises(UserError, match=r"sample 's7' \(prompts.jsonl:7\): image 'nowhere.png'"):
        adapter.prompt_tokens(sample)


def test_template_arguments_that_nothing_reads() -> None:
    family = llava()
    with pytest.raises(UserError, match=r"thinking.*not read by the chat template"):
        VlmAdapter(
            family.processor(),
            family.model(0).config,
            open_image=open_picture,
            template_arguments={"thinking": True},
        )


def test_a_processor_whose_image_tensors_are_not_known() -> None:
    family = llava()
    model, processor = family.model(0), family.processor()
    model.config.model_type = "qwen2_5_vl"  # what this processor gives is not how that family takes images
    adapter = adapter_of(model, processor)
    adapter._reader.family = adapter._reader.family._replace(batching={}, position_axes=False)
    with pytest.raises(UserError, match="'pixel_values', and how a batch of qwen2_5_vl holds"):
        adapter.prompt_tokens(sample_of(0, 1))


@torch.no_grad()
def test_a_family_that_is_not_in_the_table_repeats_its_images() -> None:
    family = llava()
    model = family.model(0)
    groups = pairs([sample_of(0, 1), sample_of(1, 2)])
    known = adapter_of(model, family.processor()).encode(groups)
    expected = hidden_rows(model, known.inputs, known.rows_N)
    model.config.model_type = "newcomer"
    adapter = adapter_of(model, family.processor())
    encoded = adapter.encode(groups)
    assert "image_entries" not in encoded.inputs and len(encoded.inputs["pixel_values"]) == 6
    assert torch.allclose(hidden_rows(model, encoded.inputs, encoded.rows_N), expected, atol=1e-5)
    assert "4 x 4 cells" in adapter.describe(groups[0].sample)


# --- memory ---


def test_a_prompt_is_read_once() -> None:
    family = llava()
    opened = []

    def open_image(name: str):
        opened.append(name)
        return PICTURES[name].copy()

    adapter = VlmAdapter(family.processor(), family.model(0).config, open_image=open_image)
    first, again, other = sample_of(0, 1), sample_of(0, 1), sample_of(0, 1, "and now")
    one = adapter.encode_prompts([first])
    two = adapter.encode_prompts([again])
    adapter.prompt_tokens(other)
    assert opened == ["picture-0"]
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_known_chats_with_other_pictures_are_read_as_if_alone(opened: Opened) -> None:
    model, adapter = opened
    processor, pictures = adapter._processor, {**PICTURES, "twin": picture(9, SIZES[0])}
    names = [("picture-0",), ("picture-1",), ("twin",), ("picture-0", "picture-3"), ("picture-3", "twin")]
    chats = [("user", "what is it"), ("user", "what is it?"), ("user", "and now")]
    samples = [
        Sample(f"{images}{text}", (Message(role, (*map(ImagePart, images), TextPart(text))),), "vqa")
        for role, text in chats
        for images in names
    ]

    def fresh() -> PromptReader:
        return VlmAdapter(processor, model.config, open_image=lambda name: pictures[name].copy())._reader

    together = fresh()
    for sample in samples:
        own, alone = together.read(sample), fresh().read(sample)
        assert own.ids == alone.ids and own.token_types == alone.token_types
        assert own.vision.keys() == alone.vision.keys()
        assert all(torch.equal(tensor, alone.vision[key]) for key, tensor in own.vision.items())
        assert (own.positions_AP is None) == (alone.positions_AP is None)
        assert own.positions_AP is None or torch.equal(own.positions_AP, alone.positions_AP)


def test_a_known_chat_about_known_pictures_needs_no_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_of((family := llava()).model(0), family.processor())
    here, there = sample_of(0, 1), sample_of(0, 1, "and now")
    elsewhere = replace(here, id="x", messages=(Message("user", (ImagePart("picture-2"), TextPart("x"))),))
    for sample in (here, there, elsewhere):
        adapter.prompt_tokens(sample)
    read: list[Sample] = []
    monkeypatch.setattr(adapter._reader, "_read", read.append)
    known = replace(there, id="another question of the same words")
    assert adapter.encode_prompts([known])["input_ids"].tolist() == (
        adapter.encode_prompts([there])["input_ids"].tolist()
    )
    assert not read


def test_of_a_family_that_is_not_in_the_table_every_prompt_is_read() -> None:
    family = llava()
    model = family.model(0)
    model.config.model_type = "newcomer"
    adapter = adapter_of(model, family.processor())
    adapter.prompt_tokens(sample_of(0, 1))
    assert not adapter._reader._chats._items


def test_what_is_forgotten_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    family = llava()
    adapter = adapter_of(family.model(0), family.processor())
    samples = [sample_of(index, 1) for index in range(4)]
    before = [adapter.encode_prompts([sample]) for sample in samples]
    for cache in (adapter._reader._images, adapter._reader._opened, adapter._reader._prompts):
        cache.budget = 1
    for _ in range(2):
        for sample, expected in zip(samples, before, strict=True):
            again = adapter.encode_prompts([sample])
            assert all(torch.equal(again[key], expected[key]) for key in expected)


def test_reading_changes_nothing_for_the_next_reader() -> None:
    """What an image processor remembers is not what a processor takes keys out of."""
    family = FAMILIES["idefics3"]()
    adapter = adapter_of(family.model(0), family.processor())
    first, second = sample_of(0, 1), sample_of(0, 1, "the same picture")
    assert adapter.prompt_tokens(first) > 40 and adapter.prompt_tokens(second) > 40
    assert token_id("<image>") == adapter.image_token_id


def test_a_model_that_would_not_see_shared_images_is_refused(monkeypatch) -> None:
    model = FAMILIES["llava"]().model(0)
    monkeypatch.setattr(type(model.model), "forward", lambda self, input_ids=None, **ignored: None)
    with pytest.raises(UserError, match=r"LlavaModel of transformers .* Install transformers>=5\.18"):
        hidden_rows(model, {"image_entries": torch.tensor([0, 0])}, torch.tensor([0]))
