"""The shipped recipe, and what is refused of a student's parts."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shared.config_files import parse_config
from shared.data.run_prompts import load_run_prompts
from shared.errors import ConfigError
from shared.objectives.objective import build_objective
from vlm_distill.cli import app
from vlm_distill.config import VlmRunConfig

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "vlm" / "easy-vqa.yaml"
MINIMAL = """
name: x
teacher: {model: a}
student: {model: b}
prompts: {train: [{path: train.jsonl}], heldout: [{path: heldout.jsonl}]}
generation: {max_new_tokens: 4}
training: {pairs_per_step: 2, learning_rate: 1e-3}
"""


@pytest.mark.skipif(
    find_spec("easy_vqa") is None, reason="needs the data set: pip install --no-deps easy-vqa"
)
def test_the_shipped_recipe_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # stages that a demo has made here are not looked at
    result = CliRunner().invoke(app, ["check", str(RECIPE), "--json"])
    assert result.exit_code == 0, result.exception
    facts = json.loads(result.stdout)
    assert facts["stage teacher"] == "run, after teacher-start: sft, 28000 prompts"
    assert facts["stage student"].startswith("run, after teacher,student-start: distillm2")


def test_files_of_one_name_in_two_folders_are_different_prompts(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "questions.jsonl").write_text(json.dumps({"prompt": name}) + "\n")
    text = MINIMAL.replace("train.jsonl", f"{tmp_path}/train/questions.jsonl").replace(
        "heldout.jsonl", f"{tmp_path}/test/questions.jsonl"
    )
    found = load_run_prompts(
        parse_config(text, VlmRunConfig).prompts, build_objective("distillm2", {}), seed=0
    )
    assert [sample.id for sample in found.train] == ["questions.jsonl:1"]
    assert [sample.id for sample in found.heldout] == ["test/questions.jsonl:1"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["student.parts={tower: frozen, projector: frozen, language_model: frozen}"],
            "every part is frozen",
        ),
        (["student.parts={tower: frozen}", "student.method=lora"], "no effect of method: lora where parts"),
        (["student.parts={tower: frozen}", "student.lora={r: 4}"], "no effect of lora with method: full"),
        (["student.parts={tower: froze}"], "student.parts.tower"),
    ],
)
def test_parts_that_cannot_be(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config(MINIMAL, VlmRunConfig, overrides)


def test_a_teacher_writes_no_pictures() -> None:
    with pytest.raises(ConfigError, match=r"prompts.train.0.written: a teacher writes words and no pictures"):
        parse_config(MINIMAL, VlmRunConfig, ["prompts.train=[{written: {count: 3}}]"])


def test_low_rank_updates_of_a_part_take_settings() -> None:
    config = parse_config(
        MINIMAL, VlmRunConfig, ["student.parts={language_model: lora}", "student.lora={r: 4}"]
    )
    assert config.student.uses_lora
    assert config.student.how.endswith("language model lora")


def test_the_recipe_on_real_photos_checks(real_data: Path, tmp_path: Path) -> None:
    text = (RECIPE.parent / "daquar.yaml").read_text(encoding="utf-8")
    path = tmp_path / "daquar.yaml"
    path.write_text(text.replace("../shared/data/daquar", str(real_data / "daquar")), encoding="utf-8")
    result = CliRunner().invoke(app, ["check", str(path), "--json"])
    assert result.exit_code == 0, result.exception
    facts = json.loads(result.stdout)
    assert facts["stage teacher"] == "run, after teacher-start: sft, 6795 prompts"
    assert facts["stage student"].startswith("run, after teacher,student-start: distillm2, 6795 prompts")


@pytest.mark.parametrize("term", ["vision.advantage={}", "vision.position_kl={weight: 1.0}"])
def test_what_asks_the_teacher_at_every_step_needs_it_in_memory(term: str) -> None:
    overrides = ["objective.name=kd", "training.rounds=1", "teacher.cache={}", term]
    with pytest.raises(ConfigError, match="asks the teacher at every step"):
        parse_config(MINIMAL, VlmRunConfig, overrides)
