from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

import eval.run_stage as run_stage
from eval.run_stage import evaluate_run
from eval.tasks.agreement import METRICS
from runs import HELDOUT, tiny_config
from shared.generation.transformers_engine import TransformersEngine
from shared.progress import Speaker
from shared.report.formats import plus_minus
from shared.report.sections import Browser
from shared.run import Run
from text_distill.adapter import TextAdapterKind

KLS = ("kl_teacher_model", "kl_model_teacher", "kl_teacher_model_own", "kl_model_teacher_own")
SHORT = ("training.rounds=1", "training.learning_rate=0.02", "generation.batch_tokens=60")


class Killed(BaseException):
    """Stands for a process that is gone: nothing catches it."""


def evaluated_run(folder: Path, *overrides: str) -> Run:
    config = tiny_config(folder, *SHORT, *overrides)
    return Run(config, TextAdapterKind(), evaluate=evaluate_run, speaker=Speaker(quiet=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A finished run with its evaluation."""
    run = evaluated_run(tmp_path_factory.mktemp("evaluated"))
    run.execute()
    return run


@pytest.fixture(scope="module")
def report(run) -> dict:
    return json.loads((run.config.folder / "report.json").read_text())


def records(run: Run, name: str) -> list[dict]:
    lines = (run.config.folder / "evaluation" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def numbers(value: object) -> list[float]:
    if isinstance(value, Mapping):
        return [number for inner in value.values() for number in numbers(inner)]
    return [value] if isinstance(value, int | float) else []


def test_the_report_has_the_promised_layout(run, report):
    assert report["run"] == {"name": "tiny", "objective": "distillm2", "seed": 0}
    assert report["scores"].keys() == {"teacher", "start", "student"}
    for scores in report["scores"].values():
        assert scores.keys() == METRICS.keys()
        for name, score in scores.items():
            assert score.keys() == {"value", "stderr", "n", "higher_is_better"}
            assert score["n"] == HELDOUT and score["higher_is_better"] is METRICS[name].higher_is_better
    higher = {name for name, metric in METRICS.items() if metric.higher_is_better}
    assert report["retention"].keys() == higher and report["gap_closed"].keys() == METRICS.keys()
    for bounds in (*report["retention"].values(), *report["gap_closed"].values()):
        assert bounds.keys() == {"value", "low", "high"}
    assert report["timing_s"].keys() >= {"load", "generate", "train", "export", "evaluate"}
    assert report["peak_memory_bytes"] > 0
    assert all(math.isfinite(number) for number in numbers(report))


def test_the_teacher_agrees_with_itself(report):
    teacher = report["scores"]["teacher"]
    assert [teacher[name]["value"] for name in KLS] == [0.0] * 4
    assert teacher["top1_agreement"]["value"] == teacher["expected_acceptance"]["value"] == 1.0
    assert all(report["scores"]["start"][name]["value"] > 0.01 for name in KLS)  # blocks are missing


def test_the_held_out_kl_of_training_is_the_one_in_the_report(run):
    scores = json.loads((run.config.folder / "report.json").read_text())["scores"]
    logged = [row["heldout/kl"] for row in run.workspace.metrics() if "heldout/kl" in row]
    assert scores["start"]["kl_teacher_model"]["value"] == pytest.approx(logged[0], rel=1e-5)
    assert scores["student"]["kl_teacher_model"]["value"] == pytest.approx(logged[-1], rel=1e-5)
    assert logged[-1] != pytest.approx(logged[0], rel=1e-2)


def test_every_response_has_a_record(run):
    ids = sorted(sample.id for sample in run.session.heldout_samples)
    for name in ("start", "student"):
        rows = records(run, name)
        for source in ("teacher", "own", "greedy"):
            assert [row["sample_id"] for row in rows if row["source"] == source] == ids
        kl = [row["kl_teacher_model"] for row in rows if row["source"] == "own"]
        assert len(set(kl)) == HELDOUT  # figures of their own, not a mean
    scores = json.loads((run.config.folder / "evaluation" / "scores.json").read_text())
    value = scores["scores"]["student"]["kl_teacher_model_own"]["value"]
    assert value == pytest.approx(sum(kl) / HELDOUT)


def test_the_model_card_and_the_page_carry_the_figures(run, report):
    card = (run.config.folder / "student" / "README.md").read_text()
    kl = report["scores"]["student"]["kl_teacher_model"]
    figure = plus_minus(kl["value"], kl["stderr"])
    assert f"| KL(teacher ‖ model) on teacher responses, nats per token | {figure} (start " in card
    page = (run.config.folder / "report.html").read_text()
    assert all(metric.title in page for metric in METRICS.values())


def test_a_student_that_did_not_learn_scores_as_its_start(tmp_path):
    run = evaluated_run(tmp_path, "training.learning_rate=1e-30")
    run.execute()
    assert records(run, "student") == records(run, "start")
    report = json.loads((run.config.folder / "report.json").read_text())
    assert report["scores"]["student"] == report["scores"]["start"]
    assert report["gap_closed"]["kl_teacher_model"]["value"] == 0.0


def test_an_interrupted_evaluation_goes_on_where_it_was(run, report, monkeypatch):
    again = evaluated_run(run.config.folder.parent)
    shutil.rmtree(again.config.folder / "evaluation")
    original, calls, dies_at = TransformersEngine._generate_ids, 0, math.inf

    def counted(*args: object) -> list[list[int]]:
        nonlocal calls
        calls += 1
        if calls == dies_at:
            raise Killed
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(TransformersEngine, "_generate_ids", counted)
    again.execute()
    whole = calls
    assert whole >= 10  # five stores of several batches: or dying at the seventh would prove little

    shutil.rmtree(again.config.folder / "evaluation")
    calls, dies_at = 0, 7
    with pytest.raises(Killed):
        evaluated_run(run.config.folder.parent).execute()
    calls, dies_at = 0, math.inf
    monkeypatch.setattr(run_stage, "agreement", lambda *_, **__: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):  # while scoring the start
        evaluated_run(run.config.folder.parent).execute()
    monkeypatch.undo()
    monkeypatch.setattr(TransformersEngine, "_generate_ids", counted)
    evaluated_run(run.config.folder.parent).execute()
    assert calls == whole - 6  # nothing that was committed is made again
    after = json.loads((run.config.folder / "report.json").read_text())
    assert after["scores"] == report["scores"]


def test_figures_are_taken_over_for_the_same_responses_alone(run, monkeypatch):
    measured: list[str] = []
    agreement = run_stage._agreement
    monkeypatch.setattr(
        run_stage, "_agreement", lambda *given: [measured.append(given[-1]), agreement(*given)][1]
    )
    folder = run.config.folder / "evaluation"
    before = (folder / "scores.json").read_text()
    evaluate_run(run)
    assert measured == [] and (folder / "scores.json").read_text() == before

    shutil.rmtree(folder / "responses" / "student-sampled")
    store = folder / "responses" / "start-greedy" / "store.json"
    store.write_text(store.read_text() + " ")  # any other byte: it is measured again
    evaluate_run(run)
    (folder / "start.jsonl").unlink()
    evaluate_run(run)
    assert measured == ["start"] * 2 and (folder / "scores.json").read_text() == before


def test_the_limit_bounds_what_is_measured_and_shown(tmp_path):
    run = evaluated_run(tmp_path, "evaluation.limit=2")
    run.execute("export")
    outcome = evaluate_run(run)
    assert {score["n"] for scores in outcome.data["scores"].values() for score in scores.values()} == {2}
    (browser,) = [section for section in outcome.sections if isinstance(section, Browser)]
    assert len(browser.items) == 2


def test_the_page_shows_every_held_out_answer_of_all_three(run, chromium):
    chromium.open(run.config.folder / "report.html")
    count = chromium.run("document.querySelector('.browser .count').textContent")
    assert count == str(HELDOUT)
    shown = chromium.run(
        "['.prompt-text', '.facts', '.answers'].map((part) => document.querySelector(part).innerText)"
    )
    sample = run.session.heldout_samples[0]
    assert shown[0] == sample.messages[0].text
    assert sample.id in shown[1] and sample.reference in shown[1]
    assert [label in shown[2] for label in ("Teacher", "Start", "Student")] == [True] * 3
    assert shown[2].count("Score\n") == shown[2].count("length limit") == 3
    assert chromium.errors == []
