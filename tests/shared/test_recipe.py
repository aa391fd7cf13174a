"""Recipes: what one stage makes the next one takes, nothing is made twice, and nothing stale is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from builders import save_tiny_model
from runs import write_prompts
from shared.errors import ConfigError
from shared.recipe import RUN_PRODUCT, expand
from text_distill.cli import app


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """sft of a model, then its distillation into fewer blocks."""
    write_prompts(tmp_path)
    save_tiny_model(tmp_path / "base", layers=3)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
name: chain
output: {tmp_path}/chain
seed: 3
stages:
  - name: teacher
    run:
      student: {{model: {tmp_path}/base}}
      objective: {{name: sft}}
      prompts: &prompts
        train: [{{path: {tmp_path}/train.jsonl}}]
        heldout: [{{path: {tmp_path}/heldout.jsonl}}]
      generation: &generation {{max_new_tokens: 4}}
      training: {{rounds: 1, pairs_per_step: 5, learning_rate: 5e-3}}
  - name: student
    run:
      teacher: {{model: stage:teacher, dtype: float32}}
      student: {{model: teacher, prune: {{drop_layers: [1]}}}}
      prompts: *prompts
      generation: *generation
      training: {{rounds: 1, pairs_per_step: 5, learning_rate: 5e-3}}
""")
    return path


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)


def message(result) -> str:
    return str(result.exception)


def test_sft_without_a_teacher_then_distillation_and_nothing_twice(recipe: Path) -> None:
    first = invoke("run", recipe)
    assert first.exit_code == 0, (first.output, first.exception)
    folder = recipe.parent / "chain"
    rows = [json.loads(line) for line in (folder / "teacher" / "metrics.jsonl").read_text().splitlines()]
    nll = [row["heldout/nll"] for row in rows if "heldout/nll" in row]
    assert nll[-1] < nll[0] and not any("heldout/kl" in row for row in rows)
    assert json.loads((folder / "teacher" / "report.json").read_text())["run"]["objective"] == "sft"
    assert "Trained on the reference answers" in (folder / "teacher" / "student" / "README.md").read_text()
    report = json.loads((folder / "student" / "report.json").read_text())
    assert report["run"] == {"name": "chain-student", "objective": "distillm2", "seed": 3}
    assert report["scores"]["student"]["kl_teacher_model"]["value"] >= 0

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = invoke("run", recipe)
    assert again.exit_code == 0 and again.output.count("is there already") == 2
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_a_finished_stage_with_other_settings_stops_the_recipe(recipe: Path) -> None:
    assert invoke("run", recipe).exit_code == 0
    result = invoke("run", recipe, "stages.teacher.run.training.learning_rate=1e-3")
    assert "stage 'teacher'" in message(result) and "training.learning_rate" in message(result)
    assert "give the stage another `output`" in message(result)


def test_a_stage_made_from_another_stage_than_now_stops_the_recipe(recipe: Path) -> None:
    import shutil

    assert invoke("run", recipe).exit_code == 0
    folder = recipe.parent / "chain"
    shutil.rmtree(folder / "teacher")
    (folder / "teacher.stage.json").unlink()
    result = invoke("run", recipe, "stages.teacher.run.training.learning_rate=1e-3")
    assert "stage 'student'" in message(result) and "from." in message(result)


def test_check_looks_at_every_stage_and_says_what_it_waits_for(recipe: Path) -> None:
    result = invoke("check", recipe, "--json")
    assert result.exit_code == 0, result.exception
    facts = json.loads(result.stdout)
    assert facts["stage teacher"].startswith("run: sft")
    assert facts["stage student"].startswith("run, after teacher: distillm2")


def test_smoke_goes_through_every_stage_in_folders_of_its_own(recipe: Path) -> None:
    result = invoke("run", recipe, "--smoke")
    assert result.exit_code == 0, (result.output, result.exception)
    assert (recipe.parent / "chain-smoke" / "student" / "report.html").exists()
    assert not (recipe.parent / "chain").exists()


def test_a_part_of_a_run_is_no_part_of_a_recipe(recipe: Path) -> None:
    assert "a recipe of 2 stages, and train is a part of one" in message(invoke("train", recipe))


def stages(*entries: dict) -> dict:
    return {"name": "r", "stages": list(entries)}


def test_a_reference_to_no_earlier_stage_suggests_the_nearest() -> None:
    values = stages(
        {"name": "teacher", "run": {}}, {"name": "b", "run": {"teacher": {"model": "stage:teachr"}}}
    )
    with pytest.raises(ConfigError, match=r"'stage:teachr', and no earlier stage .* did you mean 'teacher'"):
        expand(values, {"run": RUN_PRODUCT}, "r.yaml")


def test_two_stages_of_one_name() -> None:
    with pytest.raises(ConfigError, match="two stages are called 'a'"):
        expand(stages({"name": "a", "run": {}}, {"name": "a", "run": {}}), {"run": RUN_PRODUCT}, "r.yaml")


def test_stages_that_are_no_list() -> None:
    with pytest.raises(ConfigError, match="stages must be a list of stages"):
        expand({"name": "r", "stages": {"a": 1}}, {"run": RUN_PRODUCT}, "r.yaml")


def test_a_stage_with_nothing_to_do(recipe: Path) -> None:
    recipe.write_text("name: r\nstages: [{name: a}]\n")
    assert "give exactly one of run; got none" in message(invoke("check", recipe))


def test_runs_take_name_folder_and_seed_from_the_recipe_unless_they_say_otherwise() -> None:
    values = {**stages({"name": "a", "run": {}}, {"name": "b", "run": {"seed": 7}}), "output": "x", "seed": 2}
    expand(values, {"run": RUN_PRODUCT}, "r.yaml")
    first, second = (stage["run"] for stage in values["stages"])
    assert first == {"name": "r-a", "output": "x/a", "seed": 2} and second["seed"] == 7
