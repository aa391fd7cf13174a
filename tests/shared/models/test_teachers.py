from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from builders import save_tiny_model, tiny_llama
from shared.config_models import LoraConfig, StudentConfig
from shared.models.loading import load_causal_lm
from shared.models.pruning import prune_blocks
from shared.models.references import ModelRef
from shared.models.students import make_student
from shared.models.teachers import LocalTeacher, fingerprint_of_model
from shared.models.vocabulary import SharedVocabulary
from shared.types import Encoded

VOCABULARY = SharedVocabulary(250, (0,))


class Encoder:
    """An adapter's encoding, made up: two sequences, of which the second is padded."""

    fingerprint = "encoder"
    encoded = Encoded(
        inputs={
            "input_ids": torch.tensor([[1, 40, 41, 42, 43], [1, 50, 51, 0, 0]]),
            "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        },
        rows_N=torch.tensor([2, 3, 5, 6]),
        target_ids_N=torch.tensor([42, 43, 50, 51]),
        response_N=torch.tensor([0, 0, 1, 1]),
    )

    def __init__(self) -> None:
        self.asked: list[tuple[object, str]] = []

    def encode(self, groups, *, layout):
        self.asked.append((groups, layout))
        return self.encoded


def teacher_of(model: nn.Module) -> LocalTeacher:
    return LocalTeacher(model, Encoder(), VOCABULARY)


def dropping_llama():
    """A model whose training mode shows in its output."""
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    return model


def test_the_signal_is_the_models_own_distribution_at_the_response_rows():
    model = tiny_llama()
    expected = model(**Encoder.encoded.inputs).logits.flatten(0, 1)[[2, 3, 5, 6]][:, 1:250].softmax(-1)
    signal = teacher_of(model).signal([], Encoder.encoded)
    assert signal.hidden_NE.shape == (4, 32)
    assert not signal.hidden_NE.requires_grad and not signal.head.weight_VD.requires_grad
    ours = signal.head.logits(signal.hidden_NE).softmax(-1)
    assert ours.shape == (4, 250) and (ours[:, 0] == 0).all()
    torch.testing.assert_close(ours[:, 1:], expected, atol=1e-6, rtol=1e-4)


def test_only_response_rows_reach_the_head_and_the_backbone_runs_once():
    model = tiny_llama()
    calls: list[nn.Module] = []
    model.model.register_forward_hook(lambda module, *_: calls.append(module))
    model.lm_head.register_forward_hook(lambda module, *_: calls.append(module))
    teacher_of(model).signal([], Encoder.encoded)
    assert calls == [model.model]


def test_groups_are_encoded_where_the_caller_has_not():
    teacher = teacher_of(tiny_llama())
    groups = [object()]
    encoded_here = teacher.signal(groups, None)
    assert teacher._adapter.asked == [(groups, "separate")]
    assert torch.equal(encoded_here.hidden_NE, teacher.signal(groups, Encoder.encoded).hidden_NE)
    assert len(teacher._adapter.asked) == 1


def test_a_teacher_stays_frozen_and_in_eval_mode():
    model = dropping_llama().train()
    teacher = teacher_of(model)
    assert not model.training
    assert not any(p.requires_grad for p in teacher.parameters())
    expected = teacher.signal([], Encoder.encoded).hidden_NE
    holder = nn.ModuleDict({"teacher": teacher, "other": nn.Linear(1, 1)})
    holder.train()
    teacher.train()
    assert holder["other"].training and not teacher.training
    assert not any(module.training for module in teacher.modules())
    model.train()  # behind its back
    assert torch.equal(teacher.signal([], Encoder.encoded).hidden_NE, expected)
    assert not any(module.training for module in model.modules())


def test_a_training_step_of_the_student_leaves_the_teacher_as_it_was():
    model = tiny_llama(layers=3)
    student = make_student(StudentConfig(model="teacher"), model, kept_layers=(0, 2), seed=0)
    teacher = teacher_of(model)
    before = fingerprint_of_model(model)
    signal = teacher.signal([], Encoder.encoded)
    optimizer = torch.optim.SGD([*student.parameters()], lr=1.0)
    logits_NV = student(**Encoder.encoded.inputs).logits.flatten(0, 1)[Encoder.encoded.rows_N][:, :250]
    target = signal.head.logits(signal.hidden_NE).softmax(-1)
    (-(target * logits_NV.log_softmax(-1)).sum()).backward()
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    assert fingerprint_of_model(model) == before


# fingerprints


def test_the_fingerprint_does_not_depend_on_where_the_model_lies(tmp_path):
    folders = [save_tiny_model(tmp_path / name) for name in ("one", "two")]
    models = [load_causal_lm(ModelRef(name=str(folder)), dtype=torch.float32) for folder in folders]
    prints = {fingerprint_of_model(model) for model in models}
    assert len(prints) == 1
    assert fingerprint_of_model(copy.deepcopy(models[0]).train().requires_grad_(False)) in prints


@pytest.mark.parametrize("tied", [True, False])
def test_any_change_of_weights_changes_the_fingerprint(tied):
    model = tiny_llama(tied=tied)
    prints = [fingerprint_of_model(model)]
    for parameter in model.parameters():
        parameter.data.view(-1)[-1] += 1e-3
        prints.append(fingerprint_of_model(model))
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight[[0, 1]] = weight[[1, 0]]  # the same numbers elsewhere
    prints.append(fingerprint_of_model(model))
    assert len(set(prints)) == len(prints)


def test_dtype_configuration_and_lora_settings_are_part_of_the_fingerprint():
    model = tiny_llama(layers=3)
    prints = [fingerprint_of_model(model), fingerprint_of_model(prune_blocks(model, (0, 1)))]
    prints.append(fingerprint_of_model(copy.deepcopy(model).to(torch.bfloat16)))
    other = copy.deepcopy(model)
    other.config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    prints.append(fingerprint_of_model(other))
    for alpha in (16.0, 32.0):
        config = StudentConfig(model="teacher", method="lora", lora=LoraConfig(alpha=alpha))
        prints.append(fingerprint_of_model(make_student(config, model, seed=0)))
    assert len(set(prints)) == len(prints)


def test_the_teachers_fingerprint_covers_model_and_adapter():
    model = tiny_llama()
    first = teacher_of(model)
    other = teacher_of(model)
    other._adapter.fingerprint = "another template"
    assert first.fingerprint == teacher_of(tiny_llama()).fingerprint
    assert len({first.fingerprint, other.fingerprint, teacher_of(tiny_llama(seed=1)).fingerprint}) == 3
