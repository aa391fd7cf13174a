"""What a run's section `vision` does, through whole tiny runs, and what is refused of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.config_files import parse_config
from shared.errors import ConfigError, StoreError, UserError
from vlm_builders import FAMILIES, save_tiny_vlm
from vlm_distill import tower_cache
from vlm_distill.additions import tower_of
from vlm_distill.config import VlmRunConfig
from vlm_runs import rows_of, vlm_config, vlm_run

FROZEN = "student.parts={tower: frozen}"
BOTH = "vision.tower_cache=[teacher, student]"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return (
        save_tiny_vlm(folder / "teacher", FAMILIES["llava"](), seed=1),
        save_tiny_vlm(folder / "student", FAMILIES["llava"](), seed=2),
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "student" / "model.safetensors")


def test_a_run_whose_towers_remember_ends_in_the_same_student(tmp_path, models, monkeypatch):
    monkeypatch.setattr(tower_cache, "PART_IMAGES", 2)
    plain, cached = tmp_path / "plain", tmp_path / "cached"
    vlm_run(vlm_config(plain, *models, FROZEN)).execute()
    run = vlm_run(vlm_config(cached, *models, FROZEN, BOTH))
    run.execute()
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(cached)[name], tensor, atol=2e-5, rtol=1e-4)
    for before, after in zip(rows_of(plain / "run"), rows_of(cached / "run"), strict=True):
        for key in ("train/loss", "heldout/kl"):
            assert before.get(key) == pytest.approx(after.get(key), abs=1e-5)
    # two rounds, sampling and training, teacher and student: each of the four pictures was looked at once
    for model in (run.session.models.teacher, run.session.trainee.student):
        assert tower_of(model).forward._cache.looks == 4


def test_what_towers_saw_outlives_a_kill_and_is_only_theirs(tmp_path, models):
    config = vlm_config(tmp_path, *models, FROZEN, BOTH, "generation.temperature=0")
    vlm_run(config).execute("generate")
    again = vlm_run(config)
    again.execute()
    assert tower_of(again.session.trainee.student).forward._cache.looks <= 1  # to know its outputs' shape
    other = save_tiny_vlm(tmp_path / "other", FAMILIES["llava"](), seed=3)
    folder = tmp_path / "run" / "tower-cache" / "process-0" / "teacher"
    with pytest.raises(StoreError, match="tower: stored"):
        tower_cache.cache_tower(tower_of(FAMILIES["llava"]().model(3).requires_grad_(False)), folder)
    assert other.exists()


def test_low_rank_students_share_what_their_copies_saw(tmp_path, models):
    parts = "student.parts={tower: frozen, projector: full, language_model: lora}"
    run = vlm_run(vlm_config(tmp_path, *models, parts, "vision.tower_cache=[student]"))
    run.execute("train")
    assert tower_of(run.session.trainee.student).forward._cache.looks == 4


def test_packed_towers_and_their_trained_projector(tmp_path):
    model = save_tiny_vlm(tmp_path / "model", FAMILIES["qwen3_vl"](), seed=1)
    run = vlm_run(vlm_config(tmp_path, model, model, "vision.tower_cache=[teacher]", "training.rounds=1"))
    run.execute("train")
    assert tower_of(run.session.models.teacher).forward._cache.looks == 4
    steps = [row for row in rows_of(tmp_path / "run") if "train/loss" in row]
    assert steps[0]["train/loss"] == pytest.approx(0.0, abs=1e-6)  # the same model, looked at alone
    both = vlm_config(tmp_path / "both", model, model, FROZEN, BOTH)
    with pytest.raises(UserError, match=r"outputs cannot be kept.*merger.*Freeze the tower"):
        vlm_run(both).execute("train")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([BOTH], r"the student's tower is trained.*student.parts: \{tower: frozen\}"),
        (["teacher=null", "objective.name=sft", "vision.tower_cache=[teacher]"], "names the teacher, and th"),
        (
            ["objective.name=sft", "vision.clip_filter={model: x, minimum: 0.5}"],
            "no effect of vision.clip_filter with objective 'sft'",
        ),
    ],
)
def test_what_cannot_be(tmp_path, overrides, says):
    with pytest.raises(ConfigError, match=says):
        vlm_config(tmp_path, Path("a"), Path("b"), *overrides)


def test_a_run_on_text_knows_no_vision(tmp_path):
    from text_distill.config import TextRunConfig

    config = vlm_config(tmp_path, Path("a"), Path("b"))
    text = config.model_dump_json(exclude={"vision", "student", "evaluation"})
    with pytest.raises(ConfigError, match="vision"):
        parse_config(text, TextRunConfig, ["student={model: b}", "vision.clip_filter={model: x, minimum: 1}"])
    assert isinstance(config, VlmRunConfig)
