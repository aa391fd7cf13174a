from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from builders import save_tiny_model, tiny_llama
from runs import tiny_config, tiny_run
from shared.check import check_config
from shared.config_models import LoraConfig, StudentConfig
from shared.errors import UserError
from shared.models.loading import load_causal_lm
from shared.models.quantization import is_quantized, plain, settled
from shared.models.references import ModelRef
from shared.models.students import make_student, merged, trainable_parameters
from shared.models.teachers import fingerprint_of_model
from shared.preflight.sizing import shape_of

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
QUANTISED = "{{name: {}, quantization: nf4}}"
INPUT_IDS = torch.tensor([[1, 40, 41, 42, 43], [1, 90, 91, 92, 2]])
# QLoRA, appendix E: the quantiles of a normal distribution, scaled to [-1, 1]
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("quantised") / "model", hidden=64)


def quantised(folder: Path, dtype: torch.dtype = torch.float32):
    return load_causal_lm(ModelRef(name=str(folder), quantization="nf4"), dtype=dtype)


def with_lora(base: torch.nn.Module, method: str):
    """A student whose updates are large enough to see."""
    config = StudentConfig(model=ModelRef(name="x"), method=method, lora=LoraConfig(dropout=0.0))
    student = make_student(config, base, seed=0)
    torch.manual_seed(1)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return student.eval()


def nats(model, other) -> float:
    """KL(model ‖ other) of the next token, the mean over positions."""
    with torch.no_grad():
        log_p, log_q = (m(INPUT_IDS).logits.double().log_softmax(-1) for m in (model, other))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@needs_bitsandbytes
def test_it_is_the_plain_model_with_weights_rounded_as_the_paper_says(folder):
    rounded = tiny_llama(hidden=64)
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            blocks = module.weight.data.view(-1, 64)
            scale = blocks.abs().amax(1, keepdim=True)
            nearest = (blocks / scale).unsqueeze(-1).sub(NF4).abs().argmin(-1)
            module.weight.data = (NF4[nearest] * scale).view_as(module.weight)
    model, unrounded = quantised(folder), tiny_llama(hidden=64)
    assert is_quantized(model) and not model.training
    torch.testing.assert_close(model(INPUT_IDS).logits, rounded(INPUT_IDS).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain(model)(INPUT_IDS).logits, model(INPUT_IDS).logits, atol=1e-4, rtol=1e-4)
    # rounding costs something, and much less than another model would
    assert 1e-5 < nats(unrounded, model) < nats(unrounded, tiny_llama(hidden=64, seed=1)) / 10
    assert trainable_parameters(model).total == trainable_parameters(unrounded).total


@needs_bitsandbytes
@pytest.mark.parametrize("bfloat16_instructions", [False, True])
def test_what_is_read_twice_is_the_same_also_after_a_pass(folder, monkeypatch, bfloat16_instructions):
    # with them, bitsandbytes would put the weights into another order at the first pass
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: bfloat16_instructions)
    model, again = quantised(folder), quantised(folder)
    before = fingerprint_of_model(model)
    with torch.no_grad():
        model(INPUT_IDS)
    assert before == fingerprint_of_model(model) == fingerprint_of_model(again)
    assert before != fingerprint_of_model(tiny_llama(hidden=64))
    torch.testing.assert_close(copy.deepcopy(model)(INPUT_IDS).logits, again(INPUT_IDS).logits)
    torch.testing.assert_close(plain(model)(INPUT_IDS).logits, again(INPUT_IDS).logits, atol=1e-4, rtol=1e-4)


@needs_bitsandbytes
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merging_does_not_round_again_and_leaves_the_student_as_it_is(folder, method):
    base = quantised(folder)
    student = with_lora(base, method)
    expected = student(INPUT_IDS).logits
    assert (expected - base(INPUT_IDS).logits).abs().max() > 0.1
    whole = merged(student)
    assert not is_quantized(whole)
    torch.testing.assert_close(whole(INPUT_IDS).logits, expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(student(INPUT_IDS).logits, expected)


@needs_bitsandbytes
def test_sizes_without_weights_are_those_of_the_loaded_model(folder):
    ref = ModelRef(name=str(folder), quantization="nf4")
    worked_out = shape_of(tiny_llama(hidden=64).requires_grad_(False), ref).weight_bytes
    scales = sum(
        value.numel() * value.element_size()
        for name, value in quantised(folder).state_dict().items()
        if name.endswith("absmax")
    )
    loaded = sum(p.numel() * p.element_size() for p in quantised(folder).parameters()) + scales
    assert worked_out == loaded < shape_of(tiny_llama(hidden=64)).weight_bytes / 2


@needs_bitsandbytes
def test_a_quantised_teacher_and_a_quantised_student_in_a_whole_run(tmp_path, folder):
    other = save_tiny_model(tmp_path / "other", hidden=64, seed=1)
    run = tiny_run(
        tmp_path,
        f"teacher.model={QUANTISED.format(other)}",
        f"student={{model: {QUANTISED.format(folder)}, method: lora}}",
        "generation.max_new_tokens=3",
        "training.rounds=1",
    )
    run.execute()
    run.close()
    steps = [json.loads(line) for line in (run.workspace.folder / "metrics.jsonl").read_text().splitlines()]
    distances = [row["heldout/kl"] for row in steps if "heldout/kl" in row]
    assert distances[-1] < distances[0]
    assert is_quantized(run.session.models.teacher) and is_quantized(run.session.trainee.student)
    trained = run.session.trainee.student.eval()(INPUT_IDS).logits

    # the student is plain: it loads where there is no bitsandbytes
    student = run.workspace.folder / "student"
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "import torch\n"
        "from safetensors.torch import save_file\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(student)!r}, dtype='float32').eval()\n"
        f"save_file({{'logits': model(torch.tensor({INPUT_IDS.tolist()})).logits}}, "
        f"{str(tmp_path / 'logits.safetensors')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    logits = load_file(tmp_path / "logits.safetensors")["logits"]
    torch.testing.assert_close(logits, trained, atol=1e-3, rtol=1e-3)

    # the LoRA comes with the base that it was trained on, quantised, for peft and for the next run
    lora = run.workspace.folder / "lora"
    loaded = AutoPeftModelForCausalLM.from_pretrained(lora, dtype=torch.float32).eval()
    assert is_quantized(loaded)
    settled(loaded)  # else bitsandbytes multiplies in bfloat16 where the processor does
    torch.testing.assert_close(loaded(INPUT_IDS).logits, trained, atol=1e-3, rtol=1e-3)
    ours = load_causal_lm(ModelRef(name=str(lora)), dtype=torch.float32)
    assert not is_quantized(ours)
    torch.testing.assert_close(ours(INPUT_IDS).logits, trained, atol=1e-3, rtol=1e-3)


@needs_bitsandbytes
def test_a_student_that_starts_as_its_quantised_teacher(tmp_path, folder):
    quantised_teacher = f"teacher={{model: {{name: {folder}, quantization: nf4}}, dtype: bfloat16}}"
    run = tiny_run(tmp_path, quantised_teacher, "student={model: teacher, method: lora}", "training.rounds=1")
    run.execute("generate")
    run.close()
    models = run.session.models
    for model, dtype in ((models.teacher, torch.bfloat16), (run.session.trainee.student, torch.float32)):
        expected = quantised(folder, dtype)(INPUT_IDS).logits
        torch.testing.assert_close(model.eval()(INPUT_IDS).logits, expected)


@needs_bitsandbytes
def test_a_checkpoint_that_is_stored_quantised_is_a_teacher_or_a_lora_s_base(tmp_path, folder):
    quantised(folder).save_pretrained(tmp_path / "stored")
    for file in folder.glob("tokenizer*"):
        (tmp_path / "stored" / file.name).write_bytes(file.read_bytes())
    stored = load_causal_lm(ModelRef(name=str(tmp_path / "stored")), dtype=torch.float32)
    torch.testing.assert_close(stored(INPUT_IDS).logits, quantised(folder)(INPUT_IDS).logits)
    with pytest.raises(UserError, match=r"method: full, and the model .* is quantised"):
        check_config(tiny_config(tmp_path, f"student={{model: {tmp_path}/stored}}"))
    check_config(tiny_config(tmp_path, f"student={{model: {tmp_path}/stored, method: lora}}"))
    with pytest.raises(UserError, match="no effect: its weights are stored quantised"):
        check_config(tiny_config(tmp_path, f"teacher.model={{name: {tmp_path}/stored, quantization: nf4}}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student={{model: {q}}}"], "Set student.method: lora, or start from a plain model"),
        (["student={{model: {q}, method: lora, prune: {{keep_every: 2}}}}"], "Prune a plain model first"),
        (["teacher.model={q}", "student={{model: teacher}}"], r"starts from \('teacher'\) is quantised"),
        (["student={{model: {{name: a, quantization: q4}}}}"], "student.model.quantization: .*'nf4'.*'q4'"),
        (["teacher.model={{name: a, quantization: nf4, lora: b}}"], "merge the LoRA first"),
        (["student={{model: teacher, quantization: nf4}}"], "student.quantization: unknown key"),
        (["student={{model: {{name: teacher, quantization: nf4}}}}"], "no effect of model.quantization"),
    ],
)
def test_what_cannot_be_quantised(tmp_path, folder, monkeypatch, overrides, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # as if it was installed
    filled = [override.format(q=QUANTISED.format(folder)) for override in overrides]
    with pytest.raises(UserError, match=message):
        check_config(tiny_config(tmp_path, *filled))


def test_what_is_missing_is_known_before_the_run(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package bitsandbytes.*pip install bitsandbytes"):
        check_config(tiny_config(tmp_path, f"teacher.model={QUANTISED.format(folder)}"))
    with pytest.raises(UserError, match="needs the package bitsandbytes"):
        quantised(folder)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match="no effect on a GGUF file"):
        check_config(tiny_config(tmp_path, f"teacher.model={QUANTISED.format(tmp_path / 'model.gguf')}"))
