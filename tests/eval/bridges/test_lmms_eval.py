"""A task of the real lmms_eval, from a YAML file of our own; skipped where that harness is not installed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from eval.records import read_records
from evaluations import ToldEngine, run_tasks, told_model
from shared.errors import UserError

pytest.importorskip("lmms_eval.evaluator", reason="lmms_eval is not installed: pip install lmms-eval")

COLOURS = ("red", "green", "red")
TASK = """
task: colours
dataset_path: parquet
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: generate_until
doc_to_visual: !function colours.visual
doc_to_text: !function colours.text
doc_to_target: answer
process_results: !function colours.results
generation_kwargs: {max_new_tokens: 8, until: ["."], do_sample: false}
metric_list:
- {metric: right, aggregation: mean, higher_is_better: true}
- {metric: reds, aggregation: !function colours.count, higher_is_better: false}
metadata: {version: 3.0}
"""
FUNCTIONS = """
def visual(doc):
    return [doc["image"].convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return "Which colour?"

def results(doc, results):
    said = results[0].strip().lower()
    return {"right": float(said == doc["answer"]), "reds": {"said": said}}

def count(values):
    return sum(value["said"] == "red" for value in values)
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> str:
    """A folder with a task of drawn squares."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = []
    for colour in COLOURS:
        png = io.BytesIO()
        Image.new("RGB", (8, 8), colour).save(png, "PNG")
        rows.append({"image": {"bytes": png.getvalue(), "path": None}, "answer": colour})
    features = datasets.Features({"image": datasets.Image(), "answer": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "rows.parquet")
    (folder / "colours.yaml").write_text(TASK.replace("ROWS", str(folder / "rows.parquet")))
    (folder / "colours.py").write_text(FUNCTIONS)
    return f"data.path={folder}"


def test_images_reach_the_engine_and_share_their_cluster(tasks, tmp_path, monkeypatch):
    def see(request):
        with Image.open(request.sample.images[0]) as image:
            return "Red. It is" if image.getpixel((0, 0)) == (255, 0, 0) else "blue"

    engine = ToldEngine(see)
    told_model(monkeypatch, engine)
    results = run_tasks("told", "lmms_eval:colours", tasks, output=tmp_path / "out")
    scores = results["lmms_eval:colours"]["scores"]
    assert scores["right"]["value"] == pytest.approx(2 / 3)
    assert scores["reds"]["value"] == 2.0 and scores["reds"]["higher_is_better"] is False  # no mean: theirs
    records = read_records(tmp_path / "out" / "lmms_eval:colours")
    assert [record.replies for record in records] == [("Red",), ("blue",), ("Red",)]
    assert records[0].cluster == records[2].cluster != records[1].cluster
    assert all(Path(image).is_file() for record in records for image in record.images)
    pinned = json.loads((tmp_path / "out" / "lmms_eval:colours" / "task.json").read_text())
    assert pinned["harness_versions"]["colours"] == 3.0
    told_model(monkeypatch, again := ToldEngine(lambda _: "nothing"))
    assert (
        run_tasks("told", "lmms_eval:colours", tasks, output=tmp_path / "out") == results and not again.asked
    )


def test_a_text_model_and_an_unknown_name_are_refused(tasks, tmp_path, monkeypatch):
    engine = ToldEngine(lambda _: "")
    engine.accepts_images = False
    told_model(monkeypatch, engine)
    with pytest.raises(UserError, match=r"takes none\. Name a vision-language model"):
        run_tasks("told", "lmms_eval:colours", tasks, output=tmp_path / "out")
    with pytest.raises(UserError, match="Did you mean lmms_eval:colours"):
        run_tasks("told", "lmms_eval:colors", tasks, output=tmp_path / "other")
