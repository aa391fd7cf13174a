"""`agreement` as a task: two local models on a file of prompts, through the same command as any other."""

from __future__ import annotations

import pytest

from builders import save_tiny_model
from eval.compare import compare
from eval.records import read_records
from eval.suites import Registry
from eval.tasks.agreement import METRICS
from evaluations import run_tasks, write_rows
from shared.errors import ConfigError, StoreError, UserError
from shared.generation.transformers_engine import TransformersEngine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three tiny models and a file of prompts."""
    folder = tmp_path_factory.mktemp("agreement")
    for seed, name in enumerate(("teacher", "start", "student")):
        save_tiny_model(folder / name, seed=seed, layers=1 + seed)
    write_rows(folder / "prompts.jsonl", [{"prompt": "word " * n} for n in (1, 4, 2)])
    return folder


def measure(folder, name, *words):
    data = (f"data.path={folder / 'prompts.jsonl'}", f"teacher={folder / 'teacher'}", "max_new_tokens=5")
    return run_tasks(str(folder / name), "agreement", *data, *words, output=folder / f"{name}-out")


@pytest.fixture(scope="module")
def found(folder):
    """The scores of the student, which are those of a run."""
    return measure(folder, "student")["agreement"]["scores"]


def test_all_metrics_have_scores_and_records(folder, found):
    assert found.keys() == METRICS.keys()
    assert all(score["n"] == 3 for score in found.values())
    assert found["kl_teacher_model"]["value"] > 0.01 and 0 < found["expected_acceptance"]["value"] < 1
    assert found["perplexity"]["value"] > 1
    records = read_records(folder / "student-out" / "agreement")
    assert [record.sample_id for record in records] == ["0", "1", "2"]
    mean = sum(record.values["kl_teacher_model_own"] for record in records) / 3
    assert found["kl_teacher_model_own"]["value"] == pytest.approx(mean)
    assert records[0].prompt == "word " and records[0].replies != records[0].references


def test_a_teacher_agrees_with_itself(folder):
    scores = measure(folder, "teacher")["agreement"]["scores"]
    assert scores["kl_teacher_model"]["value"] == pytest.approx(0, abs=1e-6)
    assert scores["kl_model_teacher_own"]["value"] == pytest.approx(0, abs=1e-6)
    assert scores["top1_agreement"]["value"] == scores["top1_agreement_own"]["value"] == 1.0


def test_again_nothing_is_sampled_and_another_teacher_is_refused(folder, found, monkeypatch):
    monkeypatch.setattr(TransformersEngine, "_generate_ids", None)
    assert measure(folder, "student")["agreement"]["scores"] == found
    with pytest.raises(StoreError, match="teacher: "):
        measure(folder, "student", f"agreement.teacher={folder / 'start'}")


def test_students_are_compared(folder, found):
    for name in ("teacher", "start"):
        measure(folder, name)
    folders = [folder / f"{name}-out" for name in ("teacher", "start", "student")]
    evaluation = compare(folders, Registry()).evaluations["student"]
    assert evaluation.scores["student"]["agreement/kl_teacher_model"]["value"] == pytest.approx(
        found["kl_teacher_model"]["value"]
    )
    assert "agreement/expected_acceptance" in evaluation.retention
    assert "agreement/kl_teacher_model" in evaluation.gap_closed


@pytest.mark.parametrize(
    ("words", "message", "kind"),
    [
        ((), r"set agreement\.teacher=MODEL", ConfigError),
        (("teacher=server:http://localhost:1/v1#m",), "behind a server", UserError),
        (("teacher=/nowhere/model",), "nowhere", UserError),
        (("teacher=org/model", "samples=3"), "no effect of samples on agreement", ConfigError),
    ],
)
def test_what_cannot_be_compared_is_refused(words, message, kind, tmp_path):
    with pytest.raises(kind, match=message):
        run_tasks("nowhere", "agreement", *words, output=tmp_path / "out")


def test_a_teacher_is_for_this_task_alone(tmp_path):
    with pytest.raises(ConfigError, match=r"no effect of teacher \(it compares with no model\) on gsm8k"):
        run_tasks("nowhere", "gsm8k", "teacher=m", output=tmp_path / "out")
    with pytest.raises(UserError, match="tells its words alone"):
        run_tasks(
            "server:http://localhost:1/v1#m", "agreement", "teacher=org/model",
            f"data.path={write_rows(tmp_path / 'p.jsonl', [{'prompt': 'a'}])}", output=tmp_path / "out",
        )  # fmt: skip
