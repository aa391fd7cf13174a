from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.compare import compare
from eval.report import report_data
from eval.report_table import show
from eval.suites import Registry
from evaluations import ToldEngine, png, run_tasks, sums, told_model, write_rows
from shared.errors import StoreError
from shared.progress import Speaker
from shared.types import Request


def knows(*numbers: int):
    def say(request: Request) -> str:
        number = int(request.sample.messages[0].text.split()[2])
        return f"#### {number + 1 if number in numbers else 1000}"

    return say


def run(folder: Path, name: str, say, *words: str, monkeypatch, output: Path | None = None) -> Path:
    told_model(monkeypatch, ToldEngine(say, name=name))
    output = output or folder / name
    run_tasks(name, *words, output=output)
    return output


@pytest.fixture
def three(tmp_path, monkeypatch) -> list[Path]:
    """Of ten sums the teacher knows eight, the start two, the student six."""
    words = ("gsm8k", f"data.path={sums(tmp_path, 10)}")
    known = {"teacher": range(8), "start": range(2), "student": range(6)}
    return [run(tmp_path, n, knows(*k), *words, monkeypatch=monkeypatch) for n, k in known.items()]


def test_retention_gap_closed_and_difference(three):
    data = report_data(compare(three, Registry()))
    assert data["scores"]["student"]["gsm8k/accuracy"]["value"] == 0.6
    retention = data["retention"]["gsm8k/accuracy"]
    assert retention["value"] == pytest.approx(0.75)
    assert 0.3 < retention["low"] < 0.75 < retention["high"] <= 1.0
    assert data["gap_closed"]["gsm8k/accuracy"]["value"] == pytest.approx(4 / 6)
    assert data["difference"]["gsm8k/accuracy"]["value"] == pytest.approx(-0.2)
    assert data["models"]["start"]["folder"].endswith("start") and data["students"] == {}
    json.dumps(data, allow_nan=False)


def test_several_students(three, tmp_path, monkeypatch):
    words = ("gsm8k", f"data.path={tmp_path}/sums.jsonl")
    better = run(tmp_path, "better", knows(*range(8)), *words, monkeypatch=monkeypatch)
    compared = compare([*three, better], Registry())
    data = report_data(compared)
    assert data["retention"]["gsm8k/accuracy"]["value"] == pytest.approx(0.75)
    assert data["students"]["student-2"]["retention"]["gsm8k/accuracy"]["value"] == pytest.approx(1.0)
    speaker = Speaker()
    with speaker.console.capture() as capture:
        show(compared, speaker)
    assert "75.0 %" in capture.get() and "100.0 %" in capture.get()


def test_agreement_with_the_teachers_words(tmp_path, monkeypatch):
    rows = [{"instruction": f"Do {i}.", "output": "x y"} for i in range(2)]
    words = ("alpaca_eval", f"data.path={write_rows(tmp_path / 'rows.jsonl', rows)}")
    said = {"teacher": "a b c d", "start": "e", "student": "a b"}
    folders = [run(tmp_path, n, lambda _, t=t: t, *words, monkeypatch=monkeypatch) for n, t in said.items()]
    data = report_data(compare(folders, Registry()))
    agreement = {role: found["alpaca_eval/agreement"]["value"] for role, found in data["scores"].items()}
    assert agreement == pytest.approx({"teacher": 1.0, "start": 0.0, "student": 2 * 2 / 6})
    assert data["scores"]["student"]["alpaca_eval/words"]["value"] == 2.0
    assert "alpaca_eval/words" not in data["retention"]


def test_whole_images_are_resampled(tmp_path, monkeypatch):
    rows = []
    for image in range(4):
        (tmp_path / f"{image}.png").write_bytes(png(image))
        rows += [
            {"id": f"{image}-{i}", "image": f"{image}.png", "question": "?", "answer": "yes"}
            for i in range(25)
        ]
    words = ("pope", f"data.path={write_rows(tmp_path / 'pope.jsonl', rows)}")
    says = {"teacher": lambda _: "yes", "start": lambda _: "no"}
    # right on two images of four: a hundred answers, but four independent ones
    says["student"] = lambda r: "yes" if r.sample.id[0] in "01" else "no"
    folders = [run(tmp_path, n, say, *words, monkeypatch=monkeypatch) for n, say in says.items()]
    data = report_data(compare(folders, Registry()))
    bounds = data["retention"]["pope/accuracy"]
    assert bounds["value"] == 0.5 and bounds["low"] == 0.0 and bounds["high"] == 1.0
    assert data["scores"]["student"]["pope/f1"]["value"] == pytest.approx(2 / 3)


def test_runs_that_differ_are_refused_with_all_differences(three, tmp_path, monkeypatch):
    data = f"data.path={tmp_path}/sums.jsonl"
    other = run(
        tmp_path, "other", knows(1), "gsm8k", data, "max_new_tokens=9", "limit=4", monkeypatch=monkeypatch
    )
    with pytest.raises(StoreError) as refusal:
        compare([*three[:2], other], Registry())
    message = str(refusal.value)
    assert "sampling.max_new_tokens is 512 in" in message and "and 9 in" in message
    assert "questions is 10 in" in message and "sample_set" in message
    assert "6 samples are in one run only, such as '4'" in message


def test_other_versions_are_refused(three):
    pinned = three[1] / "gsm8k" / "task.json"
    pinned.write_text(json.dumps(json.loads(pinned.read_text()) | {"version": 0}))
    with pytest.raises(StoreError, match=r"gsm8k: version is 1 in .* and 0 in"):
        compare(three, Registry())


def test_other_references_are_refused(tmp_path, monkeypatch, three):
    rows = [json.loads(line) for line in (tmp_path / "sums.jsonl").read_text().splitlines()]
    rows[3]["answer"] = "#### 7"
    path = write_rows(tmp_path / "changed.jsonl", rows)
    other = run(tmp_path, "other", knows(1), "gsm8k", f"data.path={path}", monkeypatch=monkeypatch)
    with pytest.raises(StoreError, match="1 samples have other references or images, such as '3'"):
        compare([*three[:2], other], Registry())


def test_different_judges_are_refused(tmp_path, monkeypatch):
    rows = [{"instruction": f"Do {i}.", "output": "x y"} for i in range(2)]
    words = ("alpaca_eval", f"data.path={write_rows(tmp_path / 'rows.jsonl', rows)}", "judge.mode=single")
    folders = [
        run(tmp_path, name, lambda r: "Rating: 5", *words, f"judge.model={judge}", monkeypatch=monkeypatch)
        for name, judge in (("teacher", "one"), ("start", "one"), ("student", "two"))
    ]
    with pytest.raises(StoreError, match=r"scored\.judge\.model is one in .* and two in"):
        compare(folders, Registry())


def test_tasks_that_not_all_did_are_left_out_and_named(three, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "math.jsonl", [{"problem": "What is 1", "answer": "2"}])
    run(tmp_path, "teacher", lambda _: "2", "math", f"data.path={rows}", monkeypatch=monkeypatch)
    assert report_data(compare(three, Registry()))["left_out"] == ["math"]
    only_math = run(tmp_path, "only", lambda _: "2", "math", f"data.path={rows}", monkeypatch=monkeypatch)
    with pytest.raises(StoreError, match="no task in common"):
        compare([only_math, *three[1:]], Registry())


def test_what_is_not_finished_is_refused(three):
    (three[2] / "gsm8k" / "scores.json").unlink()
    with pytest.raises(StoreError, match="finish the run first"):
        compare(three, Registry())
    with pytest.raises(StoreError, match="holds no evaluation"):
        compare([three[0], three[0].parent / "nothing", three[1]], Registry())
