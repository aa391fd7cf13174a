from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from builders import tiny_llama
from shared.config_models import LoraConfig, StudentConfig
from shared.errors import StoreError, UserError
from shared.models.heads import check_head
from shared.models.students import (
    load_trainable_state,
    make_student,
    merged,
    trainable_parameters,
    trainable_state,
)

INPUTS = {"input_ids": torch.tensor([[1, 40, 41, 42, 43, 44]])}


def config(method: str = "full", **options) -> StudentConfig:
    return StudentConfig(model="teacher", method=method, **options)


def train_a_step(student: torch.nn.Module) -> None:
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    student(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kept", [None, (0, 2, 3)])
@pytest.mark.parametrize("method", ["full", "lora", "dora"])
def test_only_the_trainable_weights_move(method, kept, tied):
    base = tiny_llama(layers=4, tied=tied)
    base_before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    student = make_student(config(method), base, kept_layers=kept, seed=0)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    for _ in range(2):  # a LoRA's A moves from the second step on, since B starts at 0
        train_a_step(student)
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trainable_state(student))
    if method == "full":
        assert moved == set(before)
    else:
        assert moved and all("lora_" in name for name in moved)
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, base_before[name])
    check_head(student, INPUTS)
    assert student.config.num_hidden_layers == (4 if kept is None else 3)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_fresh_low_rank_student_computes_what_its_base_does(method):
    base = tiny_llama()
    student = make_student(config(method), base, seed=0).eval()
    torch.testing.assert_close(student(**INPUTS).logits, base(**INPUTS).logits, atol=1e-5, rtol=1e-5)


def test_all_linear_leaves_embeddings_and_head_alone():
    student = make_student(config("lora"), tiny_llama(tied=False), seed=0)
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in trainable_state(student)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    chosen = config("lora", lora=LoraConfig(r=2, alpha=3.0, dropout=0.0, target_modules=("q_proj",)))
    student = make_student(chosen, tiny_llama(), seed=0)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trainable_state(student)} == {"q_proj"}
    layer = student.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 1.5 and layer.r["default"] == 2


def test_the_lora_initialisation_is_seeded_and_leaves_the_global_seed_alone():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = trainable_state(make_student(config("lora"), tiny_llama(), seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    again = trainable_state(make_student(config("lora"), tiny_llama(), seed=1))
    other = trainable_state(make_student(config("lora"), tiny_llama(), seed=2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_dtype_is_the_configured_one():
    full = make_student(config(dtype="bfloat16"), tiny_llama(), seed=0)
    assert {p.dtype for p in full.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in make_student(config(), full, seed=0).parameters()} == {torch.float32}
    lora = make_student(config("lora", dtype="bfloat16"), tiny_llama(), seed=0)
    dtypes = {(p.requires_grad, p.dtype) for p in lora.parameters()}
    assert dtypes == {(False, torch.bfloat16), (True, torch.float32)}


def test_a_student_can_be_made_of_a_frozen_teacher():
    teacher = tiny_llama().requires_grad_(False)
    student = make_student(config(), teacher, seed=0)
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_lora_modules_that_the_model_does_not_have_are_refused():
    wrong = config("lora", lora=LoraConfig(target_modules=("c_attn",)))
    with pytest.raises(UserError, match=r"\('c_attn',\).*Its linear layers: down_proj.*or give all-linear"):
        make_student(wrong, tiny_llama(), seed=0)


def test_parameters_are_counted_with_tied_ones_once():
    base = tiny_llama(tied=True)
    total = sum(p.numel() for p in base.parameters())
    assert trainable_parameters(make_student(config(), base, seed=0)) == (total, total)
    lora = make_student(config("lora"), base, seed=0)
    count = trainable_parameters(lora)
    assert count.trainable == sum(t.numel() for t in trainable_state(lora).values())
    assert count.total == total + count.trainable


# saving


@pytest.mark.parametrize("method", ["full", "lora", "dora"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_trainable_state_goes_through_safetensors_and_back(method, tied, tmp_path):
    base = tiny_llama(layers=3, tied=tied)
    student = make_student(config(method), base, kept_layers=(0, 2), seed=0)
    train_a_step(student)
    student.eval()
    save_file(trainable_state(student), tmp_path / "state.safetensors")
    expected = student(**INPUTS).logits
    fresh = make_student(config(method), base, kept_layers=(0, 2), seed=9).eval()
    assert not torch.equal(fresh(**INPUTS).logits, expected)
    load_trainable_state(fresh, load_file(tmp_path / "state.safetensors"))
    assert torch.equal(fresh(**INPUTS).logits, expected)
    if tied:
        assert fresh.get_output_embeddings().weight is fresh.get_input_embeddings().weight


def test_a_checkpoint_of_another_student_is_refused_and_nothing_changes():
    student = make_student(config("lora"), tiny_llama(), seed=0)
    state = {name: torch.zeros_like(tensor) for name, tensor in trainable_state(student).items()}
    before = {name: tensor.clone() for name, tensor in trainable_state(student).items()}
    name = next(iter(state))

    def refused(changed: dict[str, torch.Tensor], message: str) -> None:
        with pytest.raises(StoreError, match=message):
            load_trainable_state(student, changed)
        assert all(torch.equal(before[key], value) for key, value in trainable_state(student).items())

    refused({k: v for k, v in state.items() if k != name}, rf"1 differences: {name} is missing")
    refused({**state, "more": torch.zeros(1)}, "more is not trained here")
    refused({**state, name: torch.zeros(3, 4)}, rf"{name} is float32 \(3, 4\), here float32 \(16, 32\)")
    refused({**state, name: state[name].double()}, rf"{name} is float64")
    refused(trainable_state(tiny_llama()), "another student configuration")


# merging


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kept", [None, (0, 2)])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_merged_student_is_a_plain_model_that_computes_the_same(method, kept, tied, tmp_path):
    student = make_student(config(method), tiny_llama(layers=3, tied=tied), kept_layers=kept, seed=0)
    train_a_step(student)
    student.eval()
    expected = student(**INPUTS).logits
    state = copy.deepcopy(trainable_state(student))

    plain = merged(student)
    assert type(plain) is transformers.LlamaForCausalLM
    torch.testing.assert_close(plain(**INPUTS).logits, expected, atol=1e-4, rtol=1e-4)
    plain.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**INPUTS).logits, plain(**INPUTS).logits, atol=0, rtol=0)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied

    assert isinstance(student, PeftModel)  # the trained one is whole, and not aliased
    torch.testing.assert_close(student(**INPUTS).logits, expected, atol=0, rtol=0)
    assert all(torch.equal(state[name], tensor) for name, tensor in trainable_state(student).items())
    assert not {p.data_ptr() for p in plain.parameters()} & {p.data_ptr() for p in student.parameters()}
    train_a_step(student)


def test_merging_a_student_without_lora_gives_itself():
    student = make_student(config(), tiny_llama(), seed=0)
    assert merged(student) is student
