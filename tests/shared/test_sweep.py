"""Sweeps: every run once, responses shared, the rate chosen by its rule, mistakes named at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from builders import save_tiny_model
from eval import run_stage
from runs import HELDOUT, write_prompts
from shared.errors import ConfigError, NonFiniteLossError, StoreError, UserError
from shared.generation.transformers_engine import TransformersEngine
from shared.progress import Speaker
from shared.sweep import Combination, Result, Sweep, chosen_rate, execute_sweep, include_run, open_sweep
from shared.sweep_report import START, say_sweep, sweep_data, write_sweep
from shared.training import loop
from shared.yaml_text import read_yaml
from text_distill.cli import app
from text_distill.config import TextRunConfig

SWEEP = """
name: tiny
output: {folder}/sweep
run:
  teacher: {{model: {folder}/teacher, dtype: float32}}
  student: {{model: teacher, prune: {{drop_layers: [1]}}}}
  prompts:
    train: [{{path: {folder}/train.jsonl}}]
    heldout: [{{path: {folder}/heldout.jsonl}}]
  generation: {{max_new_tokens: 4}}
  training: {{rounds: 1, pairs_per_step: 5}}
settings:
  kd: {{objective.name: kd}}
  fixed: {{objective.alpha.schedule: fixed, objective.beta: {{maximum: 0.75}}}}
learning_rates: [1.0e-3, 5.0e-3]
seeds: [0, 1]
metrics: [expected_acceptance, rouge_l]
shown: [kl_teacher_model]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_prompts(tmp_path)
    save_tiny_model(tmp_path / "teacher", layers=3)
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(folder=tmp_path))
    return tmp_path


def values(**changes: object) -> dict:
    return {**read_yaml(SWEEP.format(folder="x"), "test"), **changes}


def opened(**changes: object) -> Sweep:
    return open_sweep(values(**changes), TextRunConfig, "s.yaml")


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)


def test_a_whole_sweep_then_nothing_twice_and_no_other_setting_in_its_folder(folder, monkeypatch) -> None:
    asked: list[tuple[str, int, int, bool]] = []
    generate = TransformersEngine.generate

    def counted(self, requests, sampling):
        asked.extend((r.role, r.round, sampling.seed, sampling.temperature == 0) for r in requests)
        return generate(self, requests, sampling)

    monkeypatch.setattr(TransformersEngine, "generate", counted)
    compared: list[str] = []
    agreement = run_stage._agreement
    monkeypatch.setattr(
        run_stage, "_agreement", lambda *given: [compared.append(given[-1]), agreement(*given)][1]
    )
    root = folder / "sweep"
    part = invoke("sweep", folder / "sweep.yaml", "--only", "kd")
    assert part.exit_code == 0 and "sweep.html" not in part.output
    assert [path.name[:2] for path in root.iterdir()] == ["kd"] * 3
    result = invoke("sweep", folder / "sweep.yaml")
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.output.count("is there already") == 3
    data = json.loads((root / "sweep.json").read_text())
    assert len(data["runs"]) == 6 and all(run["finite"] for run in data["runs"])
    for name in ("kd", "fixed"):
        found = data["settings"][name]
        assert found["seeds"] == [0, 1] and len(found["scores"]["rouge_l"]["values"]) == 2
        at_first = {
            run["learning_rate"]: run["scores"]["expected_acceptance"]
            for run in data["runs"]
            if (run["setting"], run["seed"]) == (name, 0)
        }
        assert found["learning_rate"] == max(sorted(at_first), key=at_first.get)
    assert data["settings"]["kd"]["same"] is None and 0 <= data["settings"]["fixed"]["same"] <= 1
    assert data["settings"]["fixed"]["scores"]["expected_acceptance"]["sd"] >= 0
    assert data[START]["rouge_l"]["mean"] >= 0
    page = (root / "sweep.html").read_text()
    assert "All figures" in page and "expected_acceptance with the first seed chose" in page
    assert "y_t = y_s" in result.output and "before distillation" in result.output

    # once a seed, whatever the objective and the learning rate; greedy are the answers shown on the way
    sampled = [(role, number, seed) for role, number, seed, greedy in asked if not greedy]
    for seed in (0, 1):
        assert sampled.count(("teacher", 1, seed)) == 10
        assert sampled.count(("teacher", 0, seed)) == HELDOUT
        assert sampled.count(("student", 1, seed)) == 10
    assert sorted(compared) == ["start"] * 2 + ["student"] * 6
    assert not list(root.glob("*/student")) and not list(root.glob("*/round-*/checkpoints"))

    times = {path: path.stat().st_mtime_ns for path in root.glob("*/**/*") if path.is_file()}
    again = invoke("sweep", folder / "sweep.yaml")
    assert again.output.count("is there already") == 6
    assert {path: path.stat().st_mtime_ns for path in root.glob("*/**/*") if path.is_file()} == times
    assert json.loads((root / "sweep.json").read_text()) == data

    other = invoke("sweep", folder / "sweep.yaml", "run.training.pairs_per_step=4")
    assert isinstance(other.exception, StoreError)
    assert "training.pairs_per_step: 5 there, 4 now" in str(other.exception)


class Killed(BaseException):
    """Takes the process's place."""


def test_a_sweep_killed_within_a_run_ends_as_if_it_was_not(folder, monkeypatch) -> None:
    only_first = ("learning_rates=[1e-3]", "seeds=[0]")
    invoke("sweep", folder / "sweep.yaml", *only_first)
    whole = json.loads((folder / "sweep" / "sweep.json").read_text())
    (folder / "sweep").rename(folder / "uninterrupted")

    step, steps = loop._optimiser_step, []

    def dies(*arguments):
        steps.append(1)
        if len(steps) == 3:  # the second step of the second run
            raise Killed
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_optimiser_step", dies)
        with pytest.raises(Killed):
            invoke("sweep", folder / "sweep.yaml", *only_first)
    begun = json.loads((folder / "sweep" / "sweep.json").read_text())
    assert len(begun["runs"]) == 1
    assert "is there already" in invoke("sweep", folder / "sweep.yaml", *only_first).output
    resumed = json.loads((folder / "sweep" / "sweep.json").read_text())
    for data in (whole, resumed):
        for name in data["settings"]:
            del data["settings"][name]["seconds"]
    assert resumed["settings"] == whole["settings"]


def test_check_looks_at_every_setting_and_run_points_to_sweep(folder) -> None:
    result = invoke("check", folder / "sweep.yaml")
    assert result.exit_code == 0 and "distill-text sweep" in result.output, (result.output, result.exception)
    facts = json.loads(invoke("check", folder / "sweep.yaml", "--json").stdout)
    assert facts["runs"] == 6 and facts["settings"] == "kd, fixed"
    assert "is a sweep of 6 runs. Use: distill-text sweep" in str(
        invoke("run", folder / "sweep.yaml").exception
    )
    (folder / "one.yaml").write_text("name: x\n" + "student: {model: a}\n")
    (folder / "absent.yaml").write_text("name: x")
    assert invoke("sweep", folder / "one.yaml").exit_code != 0


def test_a_run_s_own_file_is_read_beside_the_sweep_s(tmp_path) -> None:
    inner = values()["run"] | {"name": "base", "seed": 5}
    inner["training"]["learning_rate"] = 7.0
    (tmp_path / "base.yaml").write_text(json.dumps(inner))
    outer = values(run="base.yaml")
    include_run(outer, tmp_path / "sweep.yaml")
    sweep = open_sweep(outer, TextRunConfig, "s.yaml")
    config = sweep.configs[Combination("kd", 1e-3, 1)]
    assert (config.name, config.seed) == ("tiny-kd-lr0.001-seed1", 1)
    assert config.training.learning_rate == 1e-3 and config.output == "x/sweep/kd-lr0.001-seed1"
    assert sweep.configs[Combination("fixed", 1e-3, 1)].objective.beta.maximum == 0.75
    assert config.objective.beta.maximum == 1.0  # settings do not reach into each other


def test_a_recipe_is_no_run(tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: r\nstages: []\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml holds no single run\. Name a run"):
        include_run(values(run="recipe.yaml"), tmp_path / "sweep.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"kd": {"objective.nam": "kd"}}}, r"setting 'kd': 1 problem\n.*did you mean 'name'"),
        (
            {"settings": {"kd": {"objective.name": "kd", "objective.beta.maximum": 0.75}}},
            r"setting 'kd'(.|\n)*no effect of beta with objective 'kd'",
        ),
        ({"settings": {"kd": {"seed": 3}}}, r"settings\.kd: seed cannot be a setting's own.*are axes"),
        ({"settings": {"a b": {}}}, r"settings\.a b"),
        ({"seeds": [1, 1]}, "seeds: each only once; got 1, 1"),
        ({"learning_rates": []}, "learning_rates: needs at least 1"),
        ({"metric": ["rouge_l"]}, "metric: unknown key; did you mean 'metrics'"),
    ],
)
def test_mistakes_are_named_before_anything_runs(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(**changes)


def test_a_setting_that_it_does_not_have_is_named() -> None:
    with pytest.raises(UserError, match=r"(?s)unknown setting 'kdd'.*fixed, kd.*Did you mean 'kd'"):
        opened().only(["kdd"])


def test_what_the_sweep_gives_has_no_effect_in_an_inline_run() -> None:
    run = values()["run"] | {"seed": 4}
    with pytest.raises(ConfigError, match=r"no effect of run\.seed: the sweep gives each run its own"):
        opened(run=run)


def finished(config: TextRunConfig, acceptance: float) -> None:
    score = {"value": acceptance, "stderr": 0.1, "n": 3, "higher_is_better": True}
    scores = dict.fromkeys(("expected_acceptance", "rouge_l", "kl_teacher_model"), score)
    config.folder.mkdir(parents=True)
    report = {"scores": {"student": scores, "start": scores}, "pairs": [], "timing_s": {"train": 1.0}}
    (config.folder / "report.json").write_text(json.dumps(report))


def fake_sweep(tmp_path: Path, run, **changes: object) -> tuple[Sweep, list[Result]]:
    sweep = opened(output=str(tmp_path / "sweep"), **changes)
    results = execute_sweep(sweep, run, Speaker(quiet=True), told=lambda results: None)
    return sweep, results


def test_a_loss_that_is_not_finite_loses_and_the_sweep_goes_on(tmp_path, capsys) -> None:
    def run(config: TextRunConfig) -> None:
        if config.objective.name == "kd" or config.training.learning_rate > 2e-3:
            raise NonFiniteLossError("step 3: not finite")
        finished(config, 0.5)

    sweep, results = fake_sweep(tmp_path, run)
    assert len(results) == 5  # kd is finite nowhere, and not run with the second seed
    data = write_sweep(sweep, results)
    assert data["settings"]["kd"]["learning_rate"] is None
    assert data["settings"]["fixed"]["learning_rate"] == 1e-3
    say_sweep(data, Speaker(), sweep.folder)
    assert "kd" in capsys.readouterr().out


def test_of_equal_rates_the_lowest_is_chosen_and_a_divergence_is_to_be_low() -> None:
    sweep = opened()

    def result(rate: float, value: float, higher: bool) -> Result:
        score = {"value": value, "higher_is_better": higher}
        return Result(Combination("kd", rate, 0), {"scores": {"student": {"expected_acceptance": score}}})

    assert chosen_rate([result(3.0, 1.0, True), result(1.0, 1.0, True)], "kd", sweep.config) == 1.0
    assert chosen_rate([result(1.0, 1.0, False), result(3.0, 0.5, False)], "kd", sweep.config) == 3.0
    assert chosen_rate([result(1.0, 1.0, True)], "fixed", sweep.config) is None


def test_a_metric_that_no_run_measures_is_named_after_the_first(tmp_path) -> None:
    with pytest.raises(UserError, match=r"metric 'expected_aceptance'.*Did you mean 'expected_acceptance'"):
        fake_sweep(tmp_path, lambda c: finished(c, 1.0), metrics=["expected_aceptance"])


def test_figures_are_over_seeds_at_the_chosen_rate(tmp_path) -> None:
    sweep, results = fake_sweep(
        tmp_path,
        lambda c: finished(c, c.training.learning_rate * 100 + c.seed * 0.2),
        keep_models=True,
    )
    scores = sweep_data(sweep, results)["settings"]["kd"]["scores"]["expected_acceptance"]
    assert scores["mean"] == pytest.approx(0.6) and scores["sd"] == pytest.approx(0.1 * 2**0.5)
