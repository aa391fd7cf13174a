"""What every task asks of the hub, and that it reads a row as it comes from there; nothing is downloaded."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eval.datasets import load_questions
from eval.settings import DataSettings
from eval.suites import Registry
from eval.task import Hub
from eval.tasks import TASKS
from eval.tasks.math import SUBJECTS
from shared.errors import UserError

MBPP = {"code": "def f(): pass", "test_list": ["assert f() is None"], "test_imports": []}
# of each task: the data set, its configurations, its split; a row with the columns that it has there
TABLES: dict[str, tuple[str, tuple[str | None, ...], str, dict[str, Any]]] = {
    "ultrafeedback": (
        "HuggingFaceH4/ultrafeedback_binarized",
        (None,),
        "test_prefs",
        {
            "prompt": "Why?",
            "chosen": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}],
        },
    ),
    "mt_bench": (
        "HuggingFaceH4/mt_bench_prompts",
        (None,),
        "train",
        {"category": "math", "prompt": ["One?", "Two?"], "reference": ["1", "2"], "prompt_id": 7},
    ),
    "vicuna": (
        "zhengxuanzenwu/vicuna-eval-with-gpt4",
        (None,),
        "test",
        {"instruction": "Why?"},
    ),
    "humaneval": (
        "openai/openai_humaneval",
        (None,),
        "test",
        {
            "task_id": "HumanEval/0",
            "prompt": "def f():\n",
            "canonical_solution": "    pass\n",
            "test": "def check(f):\n    f()\n",
            "entry_point": "f",
        },
    ),
    "mbpp": (
        "google-research-datasets/mbpp",
        ("sanitized",),
        "train+test+validation+prompt",
        {**MBPP, "task_id": 1, "prompt": "Do nothing."},
    ),
    "mbpp_full": (
        "google-research-datasets/mbpp",
        ("full",),
        "train+test+validation+prompt",
        {
            "task_id": 1,
            "text": "Do nothing.",
            "code": MBPP["code"],
            "test_list": MBPP["test_list"],
            "test_setup_code": "",
            "challenge_test_list": [],
        },
    ),
    "gsm8k": ("openai/gsm8k", ("main",), "test", {"question": "1 + 1?", "answer": "Two.\n#### 2"}),
    "math": (
        "EleutherAI/hendrycks_math",
        SUBJECTS,
        "test",
        {"problem": "1 + 1?", "level": "Level 1", "type": "Algebra", "solution": r"\boxed{2}"},
    ),
    "vqav2": (
        "lmms-lab/VQAv2",
        (None,),
        "validation",
        {
            "question_id": 5,
            "question": "What?",
            "answers": [{"answer": "cat", "answer_confidence": "yes", "answer_id": 1}] * 10,
        },
    ),
    "okvqa": (
        "lmms-lab/OK-VQA",
        (None,),
        "val2014",
        {"question_id": "5", "question": "What?", "answers": ["cat"] * 10},
    ),
    "textvqa": (
        "lmms-lab/textvqa",
        (None,),
        "validation",
        {"question_id": 5, "image_id": "x", "question": "What?", "answers": ["cat"] * 10},
    ),
    "chartqa": (
        "lmms-lab/ChartQA",
        (None,),
        "test",
        {"type": "human_test", "question": "How many?", "answer": "5"},
    ),
    "docvqa": (
        "lmms-lab/DocVQA",
        ("DocVQA",),
        "validation",
        {"questionId": "9", "question": "Who?", "answers": ["Ann", "ann"]},
    ),
    "pope": (
        "lmms-lab/POPE",
        (None,),
        "test",
        {
            "id": "0",
            "question_id": "1",
            "question": "Is there a cat?",
            "answer": "yes",
            "image_source": "COCO_1",
            "category": "popular",
        },
    ),
    "caption": (
        "lmms-lab/COCO-Caption",
        (None,),
        "val",
        {"question_id": "a.jpg", "question": "Describe.", "answer": ["A cat.", "One cat."]},
    ),
}
# those that are one file of their repository
FILES: dict[str, tuple[str, str, str | None, dict[str, Any]]] = {
    "alpaca_eval": (
        "tatsu-lab/alpaca_eval",
        "alpaca_eval.json",
        None,
        {"instruction": "Why?", "output": "So.", "generator": "x", "dataset": "y"},
    ),
    "self_instruct": (
        "yizhongw/self_instruct",
        "human_eval/train/0000.parquet",
        "refs/convert/parquet",
        {
            "id": "u_0",
            "motivation_app": "x",
            "instruction": "Add.",
            "instances": {"input": ["1 1"], "output": ["2"]},
        },
    ),
}
REFERENCES = {
    "ultrafeedback": ("So.",),
    "mt_bench": ("2",),
    "gsm8k": ("Two.\n#### 2",),
    "vqav2": ("cat",) * 10,
    "docvqa": ("Ann", "ann"),
    "pope": ("yes",),
    "caption": ("A cat.", "One cat."),
    "alpaca_eval": ("So.",),
    "self_instruct": ("2",),
}


def test_every_task_of_the_hub_is_checked_here():
    of_hub = {name for name in TASKS if isinstance(Registry().task(name).data, Hub)}
    assert of_hub == TABLES.keys() | FILES.keys()


@pytest.mark.parametrize("name", TABLES)
def test_a_table(name, tmp_path, monkeypatch):
    repository, configurations, split, row = TABLES[name]
    task = Registry().task(name)
    asked = []

    def load_dataset(path, configuration, **options):
        asked.append((path, configuration, options["split"], options["revision"]))
        table = datasets.Dataset.from_list([row])
        if task.images:
            png = io.BytesIO()
            Image.new("RGB", (2, 2), "red").save(png, "PNG")
            table = table.add_column("image", [{"bytes": png.getvalue(), "path": None}])
            table = table.cast_column("image", datasets.Image())
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = load_questions(task, DataSettings(), image_folder=tmp_path)
    assert asked == [(repository, configuration, split, None) for configuration in configurations]
    assert len(found) == len(configurations) and found[0].prompt.strip()
    assert found[0].references == REFERENCES.get(name, found[0].references)
    assert found[0].references or name == "vicuna"  # whose rows are questions alone
    assert [Path(part.image).read_bytes()[:4] for part in found[0].images] == [b"\x89PNG"] * task.images


@pytest.mark.parametrize("name", FILES)
def test_a_file(name, tmp_path, monkeypatch):
    repository, file, revision, row = FILES[name]
    asked = []

    def download(path, filename, **options):
        asked.append((path, filename, options))
        target = tmp_path / Path(filename).name
        if target.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist([row]), target)
        else:
            target.write_text(json.dumps([row]))
        return str(target)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    (question,) = load_questions(Registry().task(name), DataSettings())
    assert asked == [(repository, file, {"repo_type": "dataset", "revision": revision})]
    assert question.references == REFERENCES[name]


@pytest.mark.parametrize("name", [*TABLES, *FILES])
def test_offline_the_message_names_the_setting_that_helps(name, monkeypatch):
    def offline(*_: object, **__: object):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    task = Registry().task(name)
    with pytest.raises(UserError) as refusal:
        load_questions(task, DataSettings())
    message = str(refusal.value)
    assert task.data.name in message and "no route to host" in message
    assert f"Give data.path=FILE with rows of {task.columns}" in message
