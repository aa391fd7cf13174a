import copy

import peft
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from assembly_specs import CLIP_TOWER, assembly, model_inputs
from shared.config_models import LoraConfig
from shared.errors import UserError
from shared.models.students import merged
from vlm_distill.assembly import build, build_registered
from vlm_distill.attention import with_plain_attention
from vlm_distill.parts import PartsConfig, apply_parts, part_of

NOT_NATIVE = {"reduction": {"average_pool": 2}}  # keeps open_clip's own transformer


def made(tower="clip", **changes):
    """A model, its inputs and the arguments of its image features."""
    assembled = build(assembly(tower, **changes), seed=0)
    inputs = model_inputs(assembled.processor)
    return assembled.model, inputs, {"pixel_values": inputs["pixel_values"]}


def without_gradient(model, inputs) -> list[str]:
    """Trained weights that a step would not move."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which keeps lora_A's gradient at zero
            nn.init.normal_(parameter, std=0.1)
    model(**inputs).logits.square().mean().backward()
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]


@pytest.mark.parametrize(
    ("tower", "changes"),
    [("clip", NOT_NATIVE), ("clip", {}), ("timm-transformer", {}), ("timm-computed-buffers", {})],
)
def test_every_lora_receives_a_gradient(tower, changes):
    model, inputs, vision = made(tower, **changes)
    everything = PartsConfig(tower="lora", projector="lora", language_model="lora")
    student = apply_parts(model, everything, vision_inputs=vision)
    adapted = {part_of(name) for name, p in student.named_parameters() if p.requires_grad}
    assert adapted == {"tower", "projector", "language_model"}
    assert all("lora_" in name for name, p in student.named_parameters() if p.requires_grad)
    assert without_gradient(student.train(), inputs) == []


def test_all_linear_reaches_open_clips_attention_too():
    model, inputs, _ = made("clip", **NOT_NATIVE)
    student = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    adapted = [name for name, p in student.named_parameters() if p.requires_grad and ".attn." in name]
    assert {name.split(".attn.")[1].split(".")[0] for name in adapted} == {"in_proj", "out_proj"}
    assert without_gradient(student, inputs) == []


def test_plain_attention_is_the_same_attention():
    torch.manual_seed(0)
    source = nn.Sequential(nn.MultiheadAttention(16, 4, batch_first=True)).double()
    nn.init.normal_(source[0].in_proj_bias)
    tokens = torch.randn(2, 5, 16, dtype=torch.float64)
    expected = source[0](tokens, tokens, tokens, need_weights=False)[0]
    plain = copy.deepcopy(source)
    with_plain_attention(plain)
    torch.testing.assert_close(plain[0](tokens, tokens, tokens, need_weights=False)[0], expected)
    assert sorted(plain.state_dict()) == [
        "0.in_proj.bias",
        "0.in_proj.weight",
        "0.out_proj.bias",
        "0.out_proj.weight",
    ]


@pytest.mark.parametrize("trained", ["tower", "projector", "language_model"])
def test_only_the_chosen_part_moves(trained):
    model, inputs, vision = made("resnet")
    frozen = dict.fromkeys(("tower", "projector", "language_model"), "frozen")
    student = apply_parts(model, PartsConfig(**frozen | {trained: "full"}), vision_inputs=vision)
    assert student is model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**inputs).logits.square().mean().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and {part_of(name) for name in moved} == {trained}
    assert all(part_of(name) == trained for name, p in model.named_parameters() if p.grad is not None)


def test_full_parts_and_lora_parts_go_together_and_merge():
    model, inputs, vision = made("clip", **NOT_NATIVE)
    mixed = PartsConfig(tower="lora", projector="full", language_model="frozen")
    student = apply_parts(model, mixed, vision_inputs=vision, lora=LoraConfig(r=2, dropout=0.0), seed=1)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert {part_of(name) for name in trained} == {"tower", "projector"}
    assert all(("lora_" in name) == (part_of(name) == "tower") for name in trained)
    assert without_gradient(student.eval(), inputs) == []
    with torch.no_grad():
        expected = student(**inputs).logits
        plain = merged(student)
        torch.testing.assert_close(plain(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert not any("lora" in name for name, _ in plain.named_parameters())


@pytest.mark.parametrize("native", [True, False])
def test_weights_that_nothing_depends_on_stay_frozen(native):
    model, _, vision = made("clip", **({} if native else NOT_NATIVE))
    student = apply_parts(model, PartsConfig(tower="full"), vision_inputs=vision)
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    unused = {f"model.vision_tower.post_layernorm.{kind}" for kind in ("weight", "bias")}
    assert frozen == (unused if native else set())


def test_blocks_behind_the_chosen_layer_get_no_lora():
    model, inputs, vision = made({"model": CLIP_TOWER["model"], "layer": -1})
    model.config.vision_feature_layer = -2  # as in LLaVA-1.5, whose tower keeps its last block
    student = apply_parts(
        model, PartsConfig(tower="lora", projector="frozen", language_model="frozen"), vision_inputs=vision
    )
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert trained and not any("layers.2." in name for name in trained)
    assert without_gradient(student, inputs) == []


def test_dora_and_chosen_modules():
    model, inputs, vision = made("clip", **NOT_NATIVE)
    student = apply_parts(
        model,
        PartsConfig(tower="lora", projector="frozen", language_model="lora"),
        vision_inputs=vision,
        lora=LoraConfig(r=2, target_modules=("out_proj", "q_proj")),
        dora=True,
    )
    names = [name for name, p in student.named_parameters() if p.requires_grad]
    assert any("magnitude" in name for name in names)
    assert {part_of(name) for name in names} == {"tower", "language_model"}
    assert without_gradient(student, inputs) == []


def test_lora_is_a_function_of_its_seed():
    def state(seed):
        model, _, vision = made()
        student = apply_parts(model, PartsConfig(language_model="lora"), vision_inputs=vision, seed=seed)
        return [p for name, p in student.named_parameters() if "lora_A" in name]

    assert all(map(torch.equal, state(1), state(1)))
    assert not any(map(torch.equal, state(1), state(2)))


def test_finding_unused_weights_leaves_the_model_as_it_was():
    model, _, vision = made("resnet")
    model.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    apply_parts(model, PartsConfig(projector="frozen", language_model="full"), vision_inputs=vision)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_parts_by_the_names_of_other_families():
    assert part_of("model.visual.blocks.0.attn.qkv.weight") == "tower"
    assert part_of("model.visual.merger.mlp.0.weight") == "projector"
    assert part_of("model.visual.deepstack_merger_list.0.norm.weight") == "projector"
    assert part_of("model.vision_model.encoder.layers.0.mlp.fc1.weight") == "tower"
    assert part_of("model.connector.modality_projection.proj.weight") == "projector"
    assert part_of("model.image_newline") == "projector"
    assert part_of("model.text_model.layers.0.mlp.up_proj.weight") == "language_model"
    assert part_of("lm_head.weight") == "language_model"


def test_user_mistakes():
    model, _, vision = made("resnet")
    adapted = PartsConfig(tower="lora")
    with pytest.raises(
        UserError, match=r"nothing to adapt in tower .* train that part in full, or freeze it"
    ):
        apply_parts(model, adapted, vision_inputs=vision)
    with pytest.raises(
        UserError, match=r"nothing to adapt in language_model .*down_proj.*or give all-linear"
    ):
        wrong = LoraConfig(target_modules=("query",))
        apply_parts(model, PartsConfig(language_model="lora"), vision_inputs=vision, lora=wrong)
    text, *_ = build_registered(assembly("clip"), seed=0)
    with pytest.raises(UserError, match="has no projector and no tower by a name"):
        apply_parts(text.model.language_model, PartsConfig(), vision_inputs={})
    with pytest.raises(ValidationError, match="every part is frozen"):
        PartsConfig(projector="frozen", language_model="frozen")
