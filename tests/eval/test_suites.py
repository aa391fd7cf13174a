from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from eval.cli import app
from eval.suites import SUITES, Registry
from eval.tasks import TASKS
from shared.errors import ConfigError, UserError


def names(*words: str) -> list[str]:
    return [job.task.name for job in Registry().jobs(words)]


def test_every_task_is_named_as_the_table_names_it():
    registry = Registry()
    assert [registry.task(name).name for name in TASKS] == list(TASKS)
    for name in TASKS:
        task = registry.task(name)
        assert task.metrics and task.columns and re.fullmatch(r"[a-z0-9].*[^.]", task.summary, re.IGNORECASE)
    assert {name for members in SUITES.values() for name in members} <= set(TASKS)


def test_tasks_suites_and_a_name_that_is_both():
    assert names("code", "gsm8k") == ["humaneval", "mbpp", "gsm8k"]
    assert names("math") == ["math"]
    assert names("suite:math", "math") == ["gsm8k", "math"]
    with pytest.raises(UserError, match="Did you mean 'gsm8k'"):
        names("gsm8")
    with pytest.raises(UserError, match="unknown suite 'cod'"):
        names("suite:cod")


def test_settings_for_all_and_for_one():
    jobs = Registry().jobs(["suite:math"], ["limit=9", "math.limit=2", "math.data.path=/a.jsonl"])
    assert {job.task.name: job.settings.limit for job in jobs} == {"gsm8k": 9, "math": 2}
    assert jobs[1].settings.data.path == "/a.jsonl" and jobs[0].settings.data.path is None
    assert jobs[0].settings.sampling(jobs[0].task) == jobs[0].task.sampling


def test_a_suite_in_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("tasks:\n- gsm8k\n- {name: pope, limit: 5, data: {path: p.jsonl}}\n")
    jobs = Registry().jobs([str(path)], ["pope.limit=7"])
    assert [(job.task.name, job.settings.limit) for job in jobs] == [("gsm8k", None), ("pope", 7)]
    assert jobs[1].settings.data.path == "p.jsonl"
    for text, message in (
        ("- gsm8k", "a suite is"),
        ("tasks: [gsm8k, gsm8k]", "stands twice"),
        ("tasks: [{limit: 3}]", "no task"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            Registry().jobs([str(path)])


@pytest.mark.parametrize(
    ("task", "word", "message"),
    [
        ("gsm8k", "limits=3", "did you mean 'limit'"),
        ("gsm8k", "data.pth=x", "did you mean 'path'"),
        ("gsm8k", "limit=0", "greater than or equal to 1; got 0"),
        ("gsm8k", "images=removed", "no effect of images=removed"),
        ("gsm8k", "judge.model=m", "no effect of judge"),
        ("pope", "clip_model=m", "no effect of clip_model"),
        ("gsm8k", "samples=3", "no effect of samples at temperature 0"),
        ("gsm8k", "data.annotations=a", "data.annotations without data.path"),
        ("easy_vqa", "data.split=test", "the data is a file"),
        ("gsm8k", "limit=three", "got 'three'"),
    ],
)
def test_settings_that_cannot_be_are_refused(task, word, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Registry().jobs([task], [word])


def test_a_path_for_several_tasks_is_refused():
    with pytest.raises(ConfigError, match=r"such as humaneval\.data\.path=FILE"):
        Registry().jobs(["code"], ["data.path=x"])


def test_a_setting_of_a_task_that_is_not_named_is_refused():
    with pytest.raises(ConfigError, match=r"'pope\.limit=3': pope is not among the tasks named: gsm8k"):
        Registry().jobs(["gsm8k"], ["pope.limit=3"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_like_this", "line 1: ModuleNotFoundError: No module named 'nothing_like_this'"),
        ("x = 1\ndef f(:\n", "line 2: SyntaxError: invalid syntax"),
        ("\nraise SystemExit(1)", "line 2: SystemExit: 1"),
        ("from eval.task import Task\nTASK = Task(name='x')", "line 2: TypeError"),
    ],
)
def test_a_mistake_in_an_included_file_is_named_with_its_line(text, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(f"--include {path}: {message}")):
        Registry([path])


def test_list_says_what_there_is_without_anything_heavy():
    program = (
        "import sys\nfrom eval.cli import app\nsys.argv = ['distill-eval', 'list', '--json']\n"
        "app(standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'open_clip'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    listed = json.loads(found.stdout)
    assert list(listed["tasks"]) == list(TASKS) and listed["suites"].keys() == {
        "instruction",
        "code",
        "math",
        "vqa",
    }
    assert listed["tasks"]["pope"]["metrics"] == [
        "accuracy",
        "unparseable",
        "precision",
        "recall",
        "f1",
        "yes_ratio",
    ]
    unhosted = {name for name, task in listed["tasks"].items() if task["data"] is None and task["source"]}
    assert unhosted == {"evol_instruct", "daquar"}
    assert listed["tasks"]["gsm8k"]["data"] == "openai/gsm8k (main:test)"
    assert listed["harnesses"].keys() == {"lm_eval", "lmms_eval"} and listed["isolation"]
    assert listed["tasks"]["agreement"]["metrics"][0] == "rouge_l"


def test_a_mistake_is_one_message_and_exit_code_two():
    command = [
        sys.executable,
        "-c",
        "from eval.cli import main; main()",
        "run",
        "nowhere/model",
        "gsm8",
        "limit=1",
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr.startswith("Error: unknown task or suite 'gsm8'") and "Traceback" not in found.stderr


@pytest.mark.parametrize(("command", "work"), [("run", "evaluate"), ("score", "score_again")])
def test_ctrl_c_says_that_nothing_is_lost(command, work, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"eval.evaluation.{work}", interrupted)
    result = CliRunner().invoke(app, [command, "there", *(["gsm8k"] if command == "run" else [])])
    assert result.exit_code == 130
    assert "what was committed is kept. Run the same command again" in result.stderr
