from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import PreTrainedModel

from builders import CHAT_TEMPLATE, save_tiny_model
from runs import tiny_run
from shared.errors import UserError
from shared.export import export_student
from shared.models.teachers import fingerprint_of_model
from shared.run import Outcome, Run
from text_distill.adapter import TextAdapter

SHORT = ("training.rounds=1", "training.learning_rate=0.02")
LORA = ("student.method=lora", "student.lora={r: 4, alpha: 64}")
VARIANTS = {
    "pruned": (),
    "pruned-lora": LORA,
    "lora": (*LORA, "student.prune=null"),
    "dora": ("student.method=dora", "student.prune=null"),
}
PARTS = [(name, "student") for name in VARIANTS] + [(name, "lora") for name in VARIANTS if name != "pruned"]
UNTIED = "lora"
INPUT_IDS = [[1, 40, 50, 60, 2, 70, 80, 90]]

# Runs without this project on its path, and without site-packages' own hooks that would put it there.
STRANGER = f"""
import json, sys
sys.path.append(sys.argv[1])
try:
    import shared
except ImportError:
    pass
else:
    raise SystemExit("the project can be imported")
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

for folder in json.loads(sys.argv[2]):
    Auto = AutoPeftModelForCausalLM if folder.endswith("lora") else AutoModelForCausalLM
    model = Auto.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.tensor({INPUT_IDS})).logits
    save_file({{"logits": logits.contiguous()}}, folder + ".logits")
    base = model.get_base_model() if folder.endswith("lora") else model
    tied = base.get_input_embeddings().weight.data_ptr() == base.get_output_embeddings().weight.data_ptr()
    facts = {{
        "template": tokenizer.chat_template,
        "special": tokenizer.special_tokens_map,
        "generation": base.generation_config.to_diff_dict(),
        "tied": tied,
        "layers": base.config.num_hidden_layers,
    }}
    open(folder + ".facts", "w").write(json.dumps(facts))
"""


class Exported(NamedTuple):
    run: Run
    folder: Path


class Killed(BaseException):
    """Stands for a process that is gone: nothing catches it."""


def teacher(folder: Path, **options: object) -> None:
    save_tiny_model(folder, layers=4, **options)  # type: ignore[arg-type]
    settings = {"eos_token_id": [0, 2], "do_sample": True, "temperature": 0.3}
    (folder / "generation_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Exported]:
    """One run of every kind, and what a process that does not know this project makes of their exports."""
    home = tmp_path_factory.mktemp("exports")
    runs = {}
    for name, overrides in VARIANTS.items():
        folder = home / name
        folder.mkdir()
        teacher(folder / "teacher", tied=name != UNTIED)
        run = tiny_run(folder, *SHORT, *overrides)
        run.execute("export")
        runs[name] = Exported(run, run.config.folder)
    folders = [str(runs[name].folder / part) for name, part in PARTS]
    packages = str(Path(transformers.__file__).parents[1])
    command = [sys.executable, "-I", "-S", "-c", STRANGER, packages, json.dumps(folders)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=home, timeout=180)
    assert result.returncode == 0, result.stderr[-3000:]
    return runs


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor(INPUT_IDS)).logits


@pytest.mark.parametrize(("variant", "part"), PARTS)
def test_plain_transformers_and_peft_load_the_export_and_give_the_students_logits(exported, variant, part):
    run, folder = exported[variant]
    expected = logits_of(run.session.trainee.student)
    loaded = load_file(folder / f"{part}.logits")["logits"]
    torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-4)
    start = logits_of(run.session.start_model())
    assert (expected - start).abs().max() > 1e-2  # or the test would pass with untrained weights

    facts = json.loads((folder / f"{part}.facts").read_text())
    assert facts["template"] == CHAT_TEMPLATE
    assert facts["special"]["eos_token"] == "<|im_end|>" and facts["special"]["pad_token"] == "<|endoftext|>"
    assert facts["generation"]["eos_token_id"] == [0, 2] and facts["generation"]["temperature"] == 0.3
    assert facts["tied"] is (variant != UNTIED)
    assert facts["layers"] == (3 if "pruned" in variant else 4)


def test_tied_embeddings_are_stored_once(exported):
    weights = load_file(exported["pruned"].folder / "student" / "model.safetensors")
    assert "lm_head.weight" not in weights and "model.embed_tokens.weight" in weights


def test_a_lora_refers_to_its_base_or_brings_it_along(exported):
    def base_of(name: str) -> str:
        config = json.loads((exported[name].folder / "lora" / "adapter_config.json").read_text())
        return config["base_model_name_or_path"]

    assert base_of("lora") == str(exported["lora"].folder.parent / "teacher")
    assert not (exported["lora"].folder / "lora" / "base").exists()
    assert base_of("pruned-lora") == str(exported["pruned-lora"].folder / "lora" / "base")


def test_a_lora_on_a_model_with_another_lora_brings_the_merged_base_along(exported, tmp_path):
    first = exported["lora"].folder
    model = {"name": str(first.parent / "teacher"), "lora": str(first / "lora")}
    run = tiny_run(tmp_path, *SHORT, *LORA, "student.prune=null", f"teacher.model={json.dumps(model)}")
    run.execute("export")
    base = load_file(run.config.folder / "lora" / "base" / "model.safetensors")
    merged = load_file(first / "student" / "model.safetensors")
    assert all(torch.equal(base[name], merged[name]) for name in base)


def test_the_model_card_has_the_runs_figures_and_front_matter_that_a_hub_reads(tmp_path):
    figures = (("KL(teacher ‖ model), nats per token", "0.861 ± 0.012 (start 1.73)"),)
    run = tiny_run(tmp_path, *SHORT, *LORA)
    run._evaluate = lambda _: Outcome({}, (), figures)
    run.execute()
    for part, library in (("student", "transformers"), ("lora", "peft")):
        card = ModelCard.load(run.config.folder / part / "README.md")
        assert card.data.library_name == library and "distillation" in card.data.tags
        assert "| KL(teacher ‖ model), nats per token | 0.861 ± 0.012 (start 1.73) |" in card.text
        assert "distillm2" in card.text and "time, train" in card.text
        assert card.data.base_model is None  # a local folder is no hub id


def test_a_crash_in_the_middle_leaves_no_student_and_a_resumed_run_exports(tmp_path, monkeypatch):
    def dies(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(TextAdapter, "save_pretrained", dies)  # after the weights, before the tokenizer
        with pytest.raises(Killed):
            tiny_run(tmp_path, *SHORT).execute("export")
    folder = tmp_path / "run"
    assert not (folder / "student").exists()
    assert (folder / ".partial-student").exists()  # what the crash left
    tiny_run(tmp_path, *SHORT).execute("export")
    assert (folder / "student" / "tokenizer.json").exists()
    assert not (folder / ".partial-student").exists()


def test_a_full_disk_is_one_message_and_a_later_run_exports(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(TextAdapter, "save_pretrained", full)
        with pytest.raises(UserError, match=r"the disk is full: .*student could not be written"):
            tiny_run(tmp_path, *SHORT).execute("export")
    folder = tmp_path / "run"
    assert not (folder / "student").exists() and not (folder / ".partial-student").exists()
    tiny_run(tmp_path, *SHORT).execute("export")
    assert (folder / "student").exists()


def test_exporting_leaves_the_fingerprint_as_it_was(tmp_path):
    run = tiny_run(tmp_path, *SHORT)
    run.execute("train")
    student = run.session.trainee.student
    student.config.architectures = None  # as a GGUF file leaves it
    before = fingerprint_of_model(student)
    export_student(student, run.session.models, run.config, tmp_path / "exported")
    assert fingerprint_of_model(student) == before
