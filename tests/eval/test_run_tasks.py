"""Tasks of the harness at the end of a run: into its report, resumable, no model asked twice."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eval.compare import compare
from eval.run_stage import evaluate_run
from eval.run_tasks import check_tasks
from eval.suites import Registry
from evaluations import sums, write_rows
from faulty_server import FaultyServer, completion, serving
from runs import tiny_config
from shared.check import smoke_config
from shared.config import EvaluationConfig
from shared.config_files import dump_config
from shared.errors import ConfigError, DataError, UserError
from shared.generation.transformers_engine import TransformersEngine
from shared.progress import Speaker
from shared.report.sections import Browser
from shared.run import Run
from text_distill.adapter import TextAdapterKind


class Killed(BaseException):
    """Stands for a process that is gone: nothing catches it."""


def instructions(folder: Path) -> str:
    rows = [{"instruction": f"Say {word}.", "output": word} for word in ("a b c", "d e")]
    return str(write_rows(folder / "instructions.jsonl", rows))


def with_tasks(folder: Path, name: str = "run", *overrides: str) -> Run:
    if not (folder / "teacher").exists():
        from builders import save_tiny_model

        save_tiny_model(folder / "teacher", layers=4, positions=512)
    tasks = (
        f"[{{name: gsm8k, data: {{path: {sums(folder)}}}}}, "
        f"{{name: alpaca_eval, limit: 2, data: {{path: {instructions(folder)}}}}}]"
    )
    config = tiny_config(
        folder,
        "training.rounds=1",
        "training.learning_rate=0.02",
        "generation.batch_tokens=300",
        f"output={folder}/{name}",
        "evaluation.limit=3",
        "evaluation.max_new_tokens=4",
        f"evaluation.tasks={tasks}",
        *overrides,
    )
    return Run(config, TextAdapterKind(), evaluate=evaluate_run, speaker=Speaker(quiet=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A finished run with tasks."""
    run = with_tasks(tmp_path_factory.mktemp("tasks"))
    run.execute()
    return run


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The sample ids that the transformers engine is asked, of every model."""
    ids: list[str] = []
    original = TransformersEngine.generate

    def generate(self, requests, sampling):
        ids.extend(request.sample.source for request in requests)
        return original(self, requests, sampling)

    monkeypatch.setattr(TransformersEngine, "generate", generate)
    return ids


def trained(run: Run, name: str, *overrides: str) -> Run:
    """A run of another evaluation, whose training is taken from the finished one."""
    other = with_tasks(run.config.folder.parent, name, *overrides)
    leave = shutil.ignore_patterns("evaluation", "report.*")
    shutil.copytree(run.config.folder, other.config.folder, ignore=leave)
    (other.config.folder / "config.yaml").write_text(dump_config(other.config))
    other.execute("export")
    return other


def questions(asked: list[str]) -> list[str]:
    return [name for name in asked if name.isdigit()]


def report(run: Run) -> dict:
    return json.loads((run.config.folder / "report.json").read_text())


def test_tasks_stand_in_the_report_beside_agreement(run):
    found = report(run)
    for scores in found["scores"].values():
        assert scores["gsm8k/accuracy"]["n"] == 3 and scores["alpaca_eval/rouge_l"]["n"] == 2
        assert "kl_teacher_model" in scores
    assert found["scores"]["teacher"]["alpaca_eval/agreement"]["n"] == 2
    assert found["retention"].keys() >= {"gsm8k/accuracy", "alpaca_eval/rouge_l", "rouge_l"}
    assert "alpaca_eval/rouge_l" in found["gap_closed"] and "alpaca_eval/rouge_l" in found["difference"]
    assert found["tasks"]["gsm8k"]["questions"] == 3
    page = (run.config.folder / "report.html").read_text()
    card = (run.config.folder / "student" / "README.md").read_text()
    for title in ("gsm8k: Exact match", "alpaca_eval: ROUGE-L against the reference"):
        assert title in page and title in card
    assert "Retention at a glance" in page


def test_a_run_without_a_teacher_shows_start_and_student(run):
    folder = run.config.folder.parent
    alone = with_tasks(
        folder, "alone", "teacher=null", "objective.name=sft", f"student={{model: {folder / 'teacher'}}}"
    )
    alone.execute("export")
    outcome = evaluate_run(alone)
    (browser,) = [section for section in outcome.sections if isinstance(section, Browser)]
    assert [label for label, _ in browser.columns] == ["Start", "Student"]
    assert [item.facts[0] for item in browser.items] == ["gsm8k"] * 3 + ["alpaca_eval"] * 2
    assert {facet.title: facet.options for facet in browser.facets}["Outcome"] == ("Start and student wrong",)


def test_compare_reads_the_runs_folders(run):
    folders = [run.config.folder / "evaluation" / role for role in ("teacher", "start", "student")]
    evaluation = compare(folders, Registry()).evaluations["student"]
    assert evaluation.scores["teacher"]["gsm8k/accuracy"]["n"] == 3


def test_the_teacher_is_not_asked_again_by_a_run_beside(run, asked):
    beside = with_tasks(run.config.folder.parent, "beside", "seed=1")
    beside.execute("export")
    asked.clear()
    outcome = evaluate_run(beside)
    assert len(questions(asked)) == 3 + 2  # the start is the same as well: the student alone
    assert (
        outcome.data["scores"]["teacher"]["gsm8k/accuracy"]
        == report(run)["scores"]["teacher"]["gsm8k/accuracy"]
    )


def test_other_settings_are_asked_anew(run, asked):
    other = trained(run, "other", "evaluation.max_new_tokens=5")
    asked.clear()
    evaluate_run(other)
    assert len(questions(asked)) == 3 * (3 + 2)


def test_a_judge_behind_a_server_grades_all_three(run):
    server = FaultyServer()
    server.answer = lambda body: completion("Fair.\nRating: 7")
    with serving(server):
        judge = f"evaluation.judge={{model: 'server:{server.url}#judge', mode: single}}"
        judged = trained(run, "judged", judge)
        scores = evaluate_run(judged).data["scores"]
    assert {of_role["alpaca_eval/rating"]["value"] for of_role in scores.values()} == {7.0}
    assert len(server.requests) == 3 * (2 + 2 * 2)  # two answers each, and as many for each control


def test_a_task_that_runs_in_its_own_way(run, asked):
    folder = run.config.folder.parent
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": "a b"}, {"prompt": "c"}])
    task = f"{{name: agreement, teacher: {folder / 'teacher'}, data: {{path: {prompts}}}}}"
    for name in ("one", "two"):  # a file may have changed: what the one has found is not taken by the other
        following = trained(run, name, f"evaluation.tasks=[{task}]")
        asked.clear()
        scores = evaluate_run(following).data["scores"]
        assert len(questions(asked)) == 3 * 2 * 4  # three models beside the teacher, both sampled and greedy
        asked.clear()
        evaluate_run(following)
        assert not asked
    assert scores["teacher"]["agreement/kl_teacher_model"]["value"] == pytest.approx(0, abs=1e-6)
    assert scores["student"]["agreement/kl_teacher_model"]["value"] > 0.01


def test_killed_while_asking_it_goes_on_where_it_was(run, tmp_path, monkeypatch):
    again = with_tasks(tmp_path)
    original, calls, dies_at = TransformersEngine._generate_ids, 0, math.inf

    def counted(*args):
        nonlocal calls
        calls += 1
        if calls == dies_at:
            raise Killed
        return original(*args)

    again.execute("export")
    monkeypatch.setattr(TransformersEngine, "_generate_ids", counted)
    calls, dies_at = 0, 5  # the held-out answers are two batches: this is in a task of the teacher
    with pytest.raises(Killed):
        evaluate_run(again)
    dies_at = math.inf
    evaluate_run(again)
    interrupted = calls - 1
    calls = 0
    evaluate_run(again)
    assert calls == 0
    assert interrupted > 10
    assert report(run)["scores"]["teacher"] == evaluate_run(again).data["scores"]["teacher"]


def check(**values):
    check_tasks(EvaluationConfig(**values), accepts_images=False)


def test_what_would_fail_after_training_is_refused_before(tmp_path):
    with pytest.raises(UserError, match=r"unknown task or suite 'gsm8'.*Did you mean 'gsm8k'"):
        check(tasks=["gsm8"])
    with pytest.raises(UserError, match=r"unknown suite 'instuction'.*Did you mean 'instruction'"):
        check(suites=["instuction"])
    with pytest.raises(ConfigError, match=r"evaluation\.tasks, gsm8k: unknown setting 'limits'"):
        check(tasks=[{"name": "gsm8k", "limits": 3}])
    with pytest.raises(ConfigError, match=r"evaluation\.tasks: \{'limit': 3\} is no task"):
        check(tasks=[{"limit": 3}])
    with pytest.raises(ConfigError, match=r"pope shows images.*images: removed"):
        check(tasks=["pope"])
    with pytest.raises(UserError, match="does not exist"):
        check(tasks=[{"name": "gsm8k", "data": {"path": str(tmp_path / "none.jsonl")}}])
    with pytest.raises(DataError, match=r"evol_instruct has no data set on the hub .* data\.path=FILE"):
        check(tasks=["evol_instruct"])
    with pytest.raises(ConfigError, match="none of the tasks takes one"):
        check(tasks=["gsm8k"], judge={"model": "m"})
    with pytest.raises(UserError, match="a server is written"):
        check(tasks=["alpaca_eval"], judge={"model": "server:nothing"})
    with pytest.raises(UserError, match="nowhere"):
        check(tasks=["alpaca_eval"], judge={"model": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match=r"no effect of judge without evaluation\.tasks"):
        EvaluationConfig(judge={"model": "m"})
    check(tasks=["gsm8k", "alpaca_eval"], judge={"model": "server:http://localhost:1/v1#m"})


def test_the_data_of_the_hub_is_fetched_before_the_run_starts():
    evaluation = EvaluationConfig(tasks=["gsm8k"])
    check_tasks(evaluation, accepts_images=False)
    with pytest.raises(UserError, match=r"openai/gsm8k .*data\.path=FILE"):
        check_tasks(evaluation, accepts_images=False, starting=True)


def test_settings_of_all_tasks_and_of_one():
    evaluation = EvaluationConfig(
        limit=64,
        suites=["math"],
        tasks=[{"name": "math", "limit": 5}, "alpaca_eval"],
        judge={"model": "m", "mode": "single"},
        max_new_tokens=7,
    )
    jobs = {job.task.name: job.settings for job in Registry().of_run(evaluation)}
    assert {name: settings.limit for name, settings in jobs.items()} == {
        "gsm8k": 64,
        "math": 5,
        "alpaca_eval": 64,
    }
    assert {settings.max_new_tokens for settings in jobs.values()} == {7}
    assert jobs["alpaca_eval"].judge.mode == "single" and jobs["gsm8k"].judge is None


def test_a_smoke_run_asks_a_handful(tmp_path):
    config = tiny_config(tmp_path, "evaluation.tasks=[gsm8k, {name: math, limit: 900}]")
    evaluation = smoke_config(config).evaluation
    settings = [job.settings for job in Registry().of_run(evaluation)]
    assert [(one.limit, one.max_new_tokens) for one in settings] == [(4, 16)] * 2
    assert smoke_config(tiny_config(tmp_path)).evaluation == tiny_config(tmp_path).evaluation


def test_check_loads_nothing_heavy(tmp_path):
    path = tmp_path / "tiny.yaml"
    config = tiny_config(tmp_path, f"evaluation.tasks=[{{name: gsm8k, data: {{path: {sums(tmp_path)}}}}}]")
    path.write_text(dump_config(config))
    program = (
        "import sys\nfrom text_distill.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'open_clip'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", program, "check", str(path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "No problems found" in found.stdout
    misspelt = [sys.executable, "-c", "from text_distill.cli import main; main()", "check", str(path)]
    found = subprocess.run(
        [*misspelt, "evaluation.tasks=[gsm9k]"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 2 and "Did you mean 'gsm8k'" in found.stderr
