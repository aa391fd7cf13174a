"""Are memory and arithmetic what the models really are? Against loaded models, and torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from builders import save_tiny_model, tiny_llama
from shared.config_models import LoraConfig, StudentConfig
from shared.models.references import ModelRef
from shared.models.students import make_student
from shared.preflight.hardware import DEVICES, Work, seconds_of_round
from shared.preflight.sizing import activation_bytes, memory, outline, peak, shape_of


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), layers=3, tied=False)
    (folder / "model.safetensors").unlink()  # a configuration is all that is read
    return outline(ModelRef(name=str(folder)), dtype=torch.float32)


def test_an_outline_has_the_shape_of_the_model_and_no_weights(empty):
    model = tiny_llama(layers=3, tied=False)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert shape_of(empty) == shape_of(model)
    shape = shape_of(model)
    assert shape.weight_bytes == 4 * sum(p.numel() for p in model.parameters())
    assert shape.kv_bytes == 2 * 3 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes
    assert shape.head == 259 * 32 and shape.width == 259 and shape.context == 256


def test_arithmetic_is_what_torch_counts(empty):
    model, tokens = tiny_llama(layers=3, tied=False), 64
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(ids)
    linear = sum(
        count
        for operation, count in counter.get_flop_counts()["Global"].items()
        if "attention" not in str(operation)
    )
    # norms are parameters that multiply too, and are not counted there
    assert shape_of(model).forward * tokens == pytest.approx(linear, rel=0.02)
    with FlopCounterMode(display=False) as counter:
        model.model(ids).last_hidden_state.sum().backward()
    trained = sum(
        count
        for operation, count in counter.get_flop_counts()["Global"].items()
        if "attention" not in str(operation)
    )
    assert shape_of(model).training * tokens == pytest.approx(trained, rel=0.05)


def test_low_rank_updates_need_no_gradients_and_moments_of_the_rest(empty):
    full = shape_of(make_student(StudentConfig(model="x"), empty, seed=0))
    config = StudentConfig(model="x", method="lora", lora=LoraConfig(r=2), dtype="bfloat16")
    lora = shape_of(make_student(config, empty, seed=0))
    assert full.trained == full.parameters and full.head_trained
    assert 0 < lora.trained < full.trained / 4 and not lora.head_trained
    assert lora.trained_bytes == 4 * lora.trained  # float32 beside bfloat16
    assert lora.training < full.training
    sizes = {
        name: memory(None, shape, activations=0, kv_tokens=10, copy_bytes=0, on_cpu=True)
        for name, shape in (("full", full), ("lora", lora))
    }
    assert "head gradient" in sizes["full"]["training"] and "head gradient" not in sizes["lora"]["training"]
    assert sizes["full"]["always"]["student, Adam's moments"] == 2 * full.weight_bytes
    assert peak(sizes["full"]) == sum(sizes["full"]["always"].values()) + sum(
        sizes["full"]["training"].values()
    )


def test_activations_grow_with_tokens_not_with_attention_and_shrink_by_checkpointing(empty):
    student = make_student(StudentConfig(model="x"), empty, seed=0)

    def kept(tokens: int, length: int, *, checkpointing: bool = False) -> int:
        return activation_bytes(student, tokens, length, autocast=False, checkpointing=checkpointing)

    assert kept(400, 100) == pytest.approx(2 * kept(200, 100), rel=0.02)
    assert kept(400, 200) == pytest.approx(kept(400, 100), rel=0.02)
    assert kept(400, 100, checkpointing=True) < kept(400, 100) / 2
    # a block keeps at least its input and both products of its MLP, each as many as there are tokens
    assert kept(400, 100) > 400 * 4 * 3 * (32 + 2 * 64)


def test_a_slower_device_takes_longer_and_longer_answers_too(empty):
    shape = shape_of(empty)
    work = Work(100, 1, 50.0, 20.0, 8.0, (shape, shape), True, 2)
    by_name = {device.name: seconds_of_round(device, work, shape, shape) for device in DEVICES}
    assert by_name["A100, 80 GB"]["training"] > by_name["H100, 80 GB"]["training"]
    twice = seconds_of_round(DEVICES[0], work._replace(response_tokens=40.0), shape, shape)
    assert twice["sampling"] > by_name[DEVICES[0].name]["sampling"]
    assert all(device.source for device in DEVICES)
