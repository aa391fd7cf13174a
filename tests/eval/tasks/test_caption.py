"""Captions are scored by ROUGE-L, and by a CLIP model where one is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from eval.metrics.clip_score import compute
from eval.records import read_records
from evaluations import ToldEngine, run_tasks, told_model, write_rows
from shared.errors import ConfigError, UserError


@pytest.fixture
def photos(tmp_path) -> str:
    """Two captioned images."""
    for colour in ("red", "blue"):
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"{colour}.png")
    rows = [{"image": f"{colour}.png", "captions": [f"all {colour}"]} for colour in ("red", "blue")]
    return f"data.path={write_rows(tmp_path / 'rows.jsonl', rows)}"


def test_clip_score_of_each_caption_with_its_own_image(photos, tiny_clip, tmp_path, monkeypatch):
    told_model(monkeypatch, ToldEngine(lambda r: f"all {Path(r.sample.images[0]).stem}"))
    words = (photos, f"clip_model={tiny_clip}")
    scores = run_tasks("told", "caption", *words, output=tmp_path / "out")["caption"]["scores"]
    alone = [
        compute([f"all {colour}"], [str(tmp_path / f"{colour}.png")], model=tiny_clip)["clip_score"]
        for colour in ("red", "blue")
    ]
    assert alone[0] != pytest.approx(alone[1], abs=1e-4)
    assert scores["clip_score"]["value"] == pytest.approx(sum(alone) / 2, abs=1e-6)
    records = read_records(tmp_path / "out" / "caption")
    assert [record.values["clip_score"] for record in records] == pytest.approx(alone, abs=1e-6)
    assert scores["rouge_l"]["value"] == 1.0
    told_model(monkeypatch, ToldEngine(lambda _: "all red"))
    plain = run_tasks("told", "caption", photos, output=tmp_path / "plain")["caption"]["scores"]
    assert plain.keys() == {"rouge_l"}


def test_a_clip_model_that_is_not_there_is_refused_before_anybody_is_asked(photos, tmp_path, monkeypatch):
    told_model(monkeypatch, engine := ToldEngine(lambda _: "a photo"))
    for name, message in (
        ("nobody/nothing", "neither a folder nor a model that the hub gave"),
        (str(tmp_path), r"has no \.safetensors weights"),
    ):
        with pytest.raises(UserError, match=message):
            run_tasks("told", "caption", photos, f"clip_model={name}", output=tmp_path / "out")
    assert not engine.asked
    with pytest.raises(ConfigError, match="no effect of clip_model"):
        run_tasks("told", "pope", "clip_model=x", output=tmp_path / "out")
