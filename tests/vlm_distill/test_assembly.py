import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from assembly_specs import CLIP_TOWER, LLAMA, TOKENIZER, TOWERS, assembly, chats, model_inputs, pictures
from builders import save_tiny_model
from shared.errors import UserError
from shared.models.heads import check_head
from vlm_builders import qwen2_5_vl, save_tiny_vlm
from vlm_distill.assembly import assemble, build, build_registered
from vlm_distill.clip_conversion import as_llava

LOAD = """
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
import torch
from PIL import Image
folder = sys.argv.pop(1)
AutoConfig.from_pretrained(folder)
model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
assert not any(report.values()), report
processor = AutoProcessor.from_pretrained(folder)
inputs = processor(text=["<image> red?"], images=[Image.new("RGB", (40, 50), "red")], return_tensors="pt")
with torch.no_grad():
    print(type(model).__name__, model(**inputs).logits.double().sum().item())
"""


def run_python(code: str, *arguments: str, cwd: Path) -> str:
    """What a fresh interpreter prints that has this project on its path, away from its folder."""
    command = [sys.executable, "-c", f"import sys\nsys.path.append({str(Path.cwd())!r})\n{code}", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def load(folder: Path):
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name in TOWERS:
        assemble(assembly(name), root / name, seed=3)
    return {name: root / name for name in TOWERS}


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_plain_llava_computes_what_the_assembled_model_does(quick_gelu, layer):
    tower = {"model": CLIP_TOWER["model"] | {"quick_gelu": quick_gelu}, "layer": layer}
    spec = assembly(tower)
    registered, *_ = build_registered(spec, seed=1)
    inputs = model_inputs(build(spec, seed=1).processor)
    with torch.no_grad():
        expected = registered(**inputs).logits
        logits = as_llava(registered)(**inputs).logits
        blind = registered(**inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert (blind - expected).abs().max() > 0.01  # the pictures matter


def test_plain_transformers_loads_a_clip_shaped_model_and_auto_classes_know_the_registered_one(
    folders, tmp_path
):
    """After one import of this project, whether transformers was there before or not."""
    registered = f"import vlm_distill\n{LOAD}"
    without = "sys.modules['vlm_distill'] = sys.modules['shared'] = None\n" + LOAD
    without += "del sys.modules['vlm_distill'], sys.modules['shared']\n"
    paths = [str(folders["clip"]), str(folders["resnet"])]
    plain, after = run_python(without + registered, *paths, cwd=tmp_path).splitlines()
    assert plain.startswith("LlavaForConditionalGeneration ")
    before = run_python(registered, paths[1], cwd=tmp_path).strip()
    assert before == after
    name, total = after.split()
    model, processor = load(folders["resnet"])
    red = [pictures(1)[0].copy()]
    red[0].paste("red", (0, 0, *red[0].size))
    inputs = processor(text=["<image> red?"], images=red, return_tensors="pt")
    with torch.no_grad():
        assert float(total) == pytest.approx(model(**inputs).logits.double().sum().item(), rel=1e-5)
    assert name == "OpenClipLlavaForConditionalGeneration"


def test_importing_the_package_loads_neither_torch_nor_transformers(tmp_path):
    code = "import vlm_distill.assembly\nprint({'torch', 'transformers', 'open_clip'} & {*sys.modules})"
    assert run_python(code, cwd=tmp_path).strip() == "set()"


@pytest.mark.parametrize("name", TOWERS)
def test_saved_and_loaded_it_is_the_same_model(folders, name):
    made = build(assembly(name), seed=3)
    model, processor = load(folders[name])
    inputs = model_inputs(processor)
    expected_inputs = model_inputs(made.processor)
    if name != "clip":  # transformers then prefers its torchvision resizing, which rounds otherwise
        assert all(torch.equal(inputs[key], value) for key, value in expected_inputs.items())
    with torch.no_grad():
        assert torch.equal(model(**expected_inputs).logits, made.model(**expected_inputs).logits)
    assert (
        made.native == isinstance(model, LlavaForConditionalGeneration) == (name == "clip") or not made.native
    )
    assert ("import vlm_distill" in (folders[name] / "README.md").read_text()) == (not made.native)


@pytest.mark.parametrize("name", TOWERS)
def test_rows_with_any_number_of_pictures_generate_as_they_do_alone(folders, name):
    model, processor = load(folders[name])
    texts, images = chats(processor)
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    new, wanted = 8, {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    wanted["suppress_tokens"] = [model.config.image_token_id]  # a random model says anything
    with torch.no_grad():
        cached = model.generate(**inputs, **wanted)[:, -new:]
        uncached = model.generate(**inputs, **wanted, use_cache=False)[:, -new:]
        assert torch.equal(cached, uncached)
        together = model(**model_inputs(processor)).logits[:, -1]
        for row, (text, shown) in enumerate(zip(texts, images, strict=True)):
            alone = processor(text=[text], images=shown or None, return_tensors="pt")
            assert torch.equal(model.generate(**alone, **wanted)[0, -new:], cached[row])
            torch.testing.assert_close(model(**alone).logits[0, -1], together[row], atol=1e-4, rtol=1e-4)
    assert len({tuple(row.tolist()) for row in cached}) > 1


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tmp_path, tied):
    language = {"config": LLAMA | {"tie_word_embeddings": tied}, "tokenizer": TOKENIZER}
    assemble(assembly("resnet", language=language), tmp_path / "model", seed=0)
    model, processor = load(tmp_path / "model")
    embeddings = model.model.language_model.embed_tokens.weight
    assert (model.lm_head.weight.data_ptr() == embeddings.data_ptr()) == tied
    assert model.get_output_embeddings() is model.lm_head
    check_head(model, model_inputs(processor))


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS = {
    "capped logits": {"model_type": "gemma2", "final_logit_softcapping": 0.5, "head_dim": 8, **SMALL},
    "scaled logits": {"model_type": "granite", "logits_scaling": 4.0, **SMALL},
    "biased head": {"model_type": "phi", **SMALL},
    "other names": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4},
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_any_causal_model_keeps_its_own_logits(tmp_path, config):
    from transformers import AutoModelForCausalLM

    from vlm_distill.language import LanguageSpec, open_language

    language = {"config": config, "tokenizer": TOKENIZER}
    source = open_language(
        LanguageSpec.model_validate(language),
        dtype="float32", chat_template=None, image_token="<image>", seed=0,
    )  # fmt: skip
    with torch.no_grad():  # heads start at zero or near it
        for parameter in source.model.get_output_embeddings().parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    source.model.save_pretrained(tmp_path / "source")
    source.tokenizer.save_pretrained(tmp_path / "source")
    spec = assembly("clip", language=str(tmp_path / "source"))
    assemble(spec, tmp_path / "model", seed=0)
    model, processor = load(tmp_path / "model")
    causal = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    inputs = processor.tokenizer("Is there a red triangle?", return_tensors="pt")
    arguments = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(model(**arguments).logits, causal(**arguments).logits)
    check_head(model, model_inputs(processor))
    if config["model_type"] != "gpt2":
        assert type(model).__name__ == "OpenClipLlavaForConditionalGeneration"


def test_language_model_by_reference_keeps_its_tokens_and_may_lose_blocks(tmp_path):
    source = save_tiny_model(tmp_path / "source", layers=3)
    spec = assembly("clip", language={"model": str(source), "drop_layers": [1]})
    assemble(spec, tmp_path / "model", seed=0)
    model, processor = load(tmp_path / "model")
    assert model.config.text_config.num_hidden_layers == 2
    assert model.config.image_token_id == processor.image_token_id == 259  # the first new one
    assert model.lm_head.weight.shape[0] == 260
    stored = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert stored["eos_token_id"] == 2
    with pytest.raises(UserError, match=r"drop_layers \[3\]: the model has blocks 0 to 2"):
        build(assembly("clip", language={"model": str(source), "drop_layers": [3]}), seed=0)


@pytest.mark.parametrize("vision", ["clip", "resnet"])
def test_language_model_comes_out_of_a_vision_language_model(tmp_path, vision):
    language = {"config": LLAMA | {"num_hidden_layers": 3}, "tokenizer": TOKENIZER}
    assemble(assembly(vision, language=language), tmp_path / "whole", seed=0)
    whole, processor = load(tmp_path / "whole")
    spec = assembly("resnet", language=str(tmp_path / "whole"), reduction={"average_pool": 2})
    made = build(spec, seed=1)
    inputs = processor.tokenizer("Is there a red triangle?", return_tensors="pt")
    arguments = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(made.model(**arguments).logits, whole(**arguments).logits)
    assert made.processor.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    shallow = build(assembly("clip", language={"model": str(tmp_path / "whole"), "drop_layers": [1]}), seed=1)
    assert shallow.model.config.text_config.num_hidden_layers == 2


def test_language_model_of_another_make_than_any_causal_one_is_refused(tmp_path):
    folder = save_tiny_vlm(tmp_path / "whole", qwen2_5_vl())
    with pytest.raises(UserError, match="no causal language model can be taken out of Qwen2_5_VL"):
        build(assembly("resnet", language=str(folder)), seed=0)


def test_assembly_is_a_function_of_its_seed(tmp_path):
    first, second, other = (build(assembly("resnet"), seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(
    ("reduction", "tokens"), [({}, 16), ({"average_pool": 2}, 4), ({"pixel_shuffle": 4}, 1)]
)
@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_reductions_set_the_number_of_image_tokens(reduction, tokens, projector):
    made = build(assembly("clip", reduction=reduction, projector=projector), seed=0)
    inputs = model_inputs(made.processor)
    assert int((inputs["input_ids"] == made.model.config.image_token_id).sum()) == 3 * tokens
    made.model(**inputs)
    assert made.native == (projector == "mlp" and not reduction)


def test_bfloat16_is_stored_and_loaded(tmp_path):
    assemble(assembly("timm-convolutional", dtype="bfloat16"), tmp_path / "model", seed=0)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model(**model_inputs(AutoProcessor.from_pretrained(tmp_path / "model")))


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        assemble(assembly(), tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduction": {"pixel_shuffle": 3}}, "3 does not divide the tower's grid of 4 x 4 patch tokens"),
        ({"language": {"config": {"model_type": "lama"}, "tokenizer": TOKENIZER}}, "Did you mean 'llama'"),
        (
            {"language": {"config": LLAMA | {"hidden_sizes": 8}, "tokenizer": TOKENIZER}},
            "unknown language.config key of llama 'hidden_sizes'.*Did you mean 'hidden_size'",
        ),
        ({"language": {"config": LLAMA | {"hidden_size": 33}, "tokenizer": TOKENIZER}}, "for llama: .*33"),
        ({"chat_template": "none.jinja"}, "chat_template 'none.jinja': no such file"),
        (
            {"language": {"config": LLAMA, "tokenizer": {"kind": "bpe", "files": ["none.txt"]}}},
            "tokenizer.files: 'none.txt' is no file",
        ),
    ],
)
def test_user_mistakes(changes, message):
    with pytest.raises(UserError, match=message):
        build(assembly("clip", **changes), seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduction": {"pixel_shuffle": 2, "average_pool": 2}}, "not both"),
        ({"language": {"tokenizer": TOKENIZER}}, "give either model or config"),
        ({"language": {"config": LLAMA}}, "tokenizer belongs to config"),
        ({"language": {"config": LLAMA, "tokenizer": {"kind": "bpe"}}}, "needs texts or files"),
        (
            {"language": {"config": LLAMA, "tokenizer": TOKENIZER, "drop_layers": [0]}},
            "no effect of drop_layers",
        ),
        ({"vision": {"model": "local-dir:x", "weights": "openai"}}, "no effect of weights"),
    ],
)
def test_settings_without_effect_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        assembly("clip", **changes)
