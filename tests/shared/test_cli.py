"""A user's mistake is one message and exit code 2, with nothing lost; through the real command line."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from builders import save_tiny_model
from runs import tiny_config
from shared import check as check_module
from shared.cli import find_templates
from shared.config_files import dump_config
from shared.workspace import Workspace
from text_distill.cli import main

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-c", "from text_distill.cli import main; main()"]


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def distill(monkeypatch, capsys):
    """Runs `distill-text` with arguments in this process."""
    for name in ("TQDM_DISABLE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")  # what the program sets is taken back after the test

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["distill-text", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Result(int(ended.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture
def config(tmp_path) -> Path:
    """A configuration file with its model and prompts."""
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_config(tiny_config(tmp_path, "training.rounds=1")))
    return path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The student of the same run that nothing happened to."""
    from runs import tiny_run

    folder = tmp_path_factory.mktemp("uninterrupted")
    tiny_run(folder, "training.rounds=1").execute("export")
    return load_file(folder / "run" / "student" / "model.safetensors")


def assert_one_message(result: Result, *parts: str) -> None:
    assert result.code == 2, result
    assert result.err.startswith("Error: ") and "Traceback" not in result.err, result.err
    assert all(part in result.err for part in parts), result.err


# --- the program itself ------------------------------------------------------------------------------------


def test_help_templates_and_check_answer_without_heavy_imports(config):
    program = f"""
import sys
from text_distill.cli import main
for arguments in (["--help"], ["run", "--help"], ["init", "list"], ["check", {str(config)!r}]):
    sys.argv = ["distill-text", *arguments]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, arguments
heavy = {{"torch", "transformers", "datasets", "open_clip", "accelerate", "peft", "torchvision"}}
print("imported:", sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.rstrip().endswith("imported: []")
    assert "No problems found" in done.stdout


def test_check_prints_facts_and_the_next_step_or_json_alone(distill, config):
    plain = distill("check", config, "seed=3")
    assert plain.code == 0 and plain.err == ""
    assert f"Next: distill-text run {config} seed=3" in plain.out
    machine = distill("check", config, "--json")
    assert machine.code == 0 and json.loads(machine.out)["training prompts"] == 10


def test_init_writes_a_template_once_that_check_accepts_as_far_as_its_model_is_here(distill, tmp_path):
    listed = distill("init", "list")
    assert listed.code == 0
    assert [line.split(":")[0] for line in listed.out.splitlines()] == list(find_templates("text"))
    (template, *_) = find_templates("text")
    target = tmp_path / "mine.yaml"
    assert distill("init", template, target).code == 0
    shipped = f"configs/text/{template}.yaml"  # in its comments; the copy names itself
    assert target.read_text() == find_templates("text")[template].replace(shipped, str(target))
    assert f"run {target}" in target.read_text() and shipped not in target.read_text()
    target.write_text("edited")
    assert_one_message(distill("init", template, target), "exists, and is not overwritten")
    assert target.read_text() == "edited"


def test_init_names_what_it_cannot_do(distill, tmp_path):
    (template, *_) = find_templates("text")
    assert_one_message(distill("init", f"{template}x"), "unknown template", f"Did you mean {template!r}?")
    absent = tmp_path / "absent" / "mine.yaml"
    assert_one_message(distill("init", template, absent), "is not a folder. Make it first")
    (tmp_path / "file").write_text("")
    assert_one_message(distill("init", template, tmp_path / "file" / "mine.yaml"), "is not a folder")


@pytest.mark.parametrize("arguments", [[], ["chek"], ["check"], ["check", "x.yaml", "--sead=1"]])
def test_a_command_line_that_is_none_is_exit_code_2(distill, arguments):
    result = distill(*arguments)
    assert result.code == 2 and "Traceback" not in result.err


def test_an_error_of_our_own_keeps_its_traceback(monkeypatch, config):
    def broken(_: object, **options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(check_module, "check_config", broken)
    monkeypatch.setattr(sys, "argv", ["distill-text", "check", str(config)])
    with pytest.raises(RuntimeError, match="a bug"):
        main()


def test_only_the_first_of_several_processes_introduces_the_run(distill, config, monkeypatch):
    monkeypatch.setattr("shared.run.Run.execute", lambda self, until: None)
    assert "tiny → " in distill("generate", config).out
    monkeypatch.setenv("RANK", "1")
    assert distill("generate", config).out == ""


# --- mistakes in what is given -----------------------------------------------------------------------------


def test_mistakes_of_every_kind_end_in_one_message_each(distill, config, tmp_path):
    """Each kind in detail: tests of configuration, check, prompts and models."""
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    (tmp_path / "torn.yaml").write_text("a: [")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "good"}\n{"promt": "bad"}\n')
    for arguments, parts in {
        (tmp_path / "absent.yaml",): ["no configuration file at", "init TEMPLATE"],
        (tmp_path / "latin.yaml",): ["is not UTF-8 text"],
        (tmp_path / "torn.yaml",): ["torn.yaml, line 1: not valid YAML"],
        (config, "trainin.rounds=1"): ["1 problem", "trainin: unknown key; did you mean 'training'?"],
        (config, "prompts.train.0.pth=x", "seed=x"): ["2 problems", "prompts.train.0.pth", "seed: "],
        (config, "prompts.train.5.path=x"): ["has no entry '5'"],
        (config, "seed.x=1"): ["'seed' is 0, which has no keys"],
        (config, "objective.name=distilm2"): ["Did you mean 'distillm2'?"],
        (config, "objective={name: kd, beta: {maximum: 0.7}}"): ["no effect of beta with objective 'kd'"],
        (config, "prompts.train.0.path=x.jsonl"): ["'x.jsonl' does not exist"],
        (config, f"prompts.train.0.path={tmp_path}/empty.jsonl"): ["no prompts in"],
        (config, f"prompts.train.0.path={tmp_path}/bad.jsonl"): ["bad.jsonl:2: ", "has promt"],
        (config, "student.prune={drop_layers: [9]}"): ["[9] are not blocks of this model"],
        (config, "training.trackers=[wandbb]"): ["'wandb'", "got 'wandbb'"],
    }.items():
        for command in ("check", "run"):
            assert_one_message(distill(command, *arguments), *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mistake", "parts"),
    [
        ("over the context", ["1 of 11 prompts are longer", "train.jsonl:11", "prompts.over_length: drop"]),
        ("no weights", ["no weights in", "Copy the weights"]),
        ("no chat template", ["its tokenizer has no chat template", "chat_template: FILE.jinja"]),
        ("hub id", ["model 'org/absent'", "the hub could not be reached", "give a local folder"]),
        ("tracker", ["training.trackers: wandb not installed", "Install with pip, or remove"]),
    ],
)
def test_what_only_a_run_can_see_is_one_message_and_the_mended_run_goes_on(
    distill, config, tmp_path, mistake, parts
):
    overrides = []
    match mistake:
        case "over the context":
            with (tmp_path / "train.jsonl").open("a") as file:
                file.write(json.dumps({"prompt": "long " * 100}) + "\n")
        case "no weights":
            (tmp_path / "teacher" / "model.safetensors").rename(tmp_path / "away")
        case "no chat template":
            save_tiny_model(tmp_path / "base", layers=4, tokenizer_options={"chat_template": None})
            overrides = [f"teacher.model={tmp_path}/base"]
        case "hub id":
            overrides = ["teacher.model=org/absent"]
        case "tracker":
            overrides = ["training.trackers=[wandb]"]
    assert_one_message(distill("generate", config, *overrides), *parts)
    if mistake == "no weights":
        (tmp_path / "away").rename(tmp_path / "teacher" / "model.safetensors")
    # in the same folder: what failed before it made anything does not stand in the way
    mended = ["prompts.over_length=drop"] if mistake == "over the context" else []
    assert distill("generate", config, *mended).code == 0


def test_exit_code_and_message_of_a_process(config):
    done = subprocess.run(
        [*PROGRAM, "check", str(config), "sede=1"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"Error: {config}: 1 problem\n  sede: unknown key; did you mean 'seed'?\n"


# --- what happens to a run ---------------------------------------------------------------------------------


def test_a_folder_of_another_run_and_one_in_use_are_refused(distill, config, tmp_path):
    assert distill("generate", config).code == 0
    refused = distill("generate", config, "training.learning_rate=1e-3")
    assert_one_message(refused, "another configuration", "training.learning_rate: 0.005 there, 0.001 now")
    owner = Workspace(tmp_path / "run")
    owner._take_lock()
    assert_one_message(distill("generate", config), f"in use by process {os.getpid()}")
    owner.close()
    assert distill("generate", config).code == 0


def test_a_truncated_part_is_set_aside_and_redone_with_one_warning(
    distill, config, tmp_path, uninterrupted, caplog
):
    assert distill("generate", config).code == 0
    part = tmp_path / "run" / "round-01" / "responses" / "teacher" / "part-00001.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING):
        result = distill("export", config)
    assert result.code == 0
    (warning,) = [record.message for record in caplog.records if record.name == "shared.store"]
    assert str(part) in warning and "redone" in warning
    assert_same_student(tmp_path, uninterrupted)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "file",
    [
        "config.yaml",
        "store.json",
        "heldout/part-00000",
        "student/part-00001",
        "weights.safetensors",
        "optimizer.safetensors",
        "usage.json",
        "student.json",
    ],
)
def test_a_full_disk_is_one_message_and_with_space_the_run_goes_on(
    distill, config, tmp_path, monkeypatch, uninterrupted, file
):
    real = os.fsync
    failed = []

    def full(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if file in path and str(tmp_path) in path:
            failed.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = distill("export", config)
    assert failed
    assert_one_message(result, "the disk is full: ", "free some space, and run the same command again")
    assert result.err.count("Error: ") == 1
    assert distill("export", config).code == 0
    assert_same_student(tmp_path, uninterrupted)


def test_a_full_disk_is_one_message_wherever_it_shows(distill, config, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "anywhere"))

    monkeypatch.setattr("shared.run.Run.execute", full)
    assert_one_message(distill("run", config), "the disk is full: ", "anywhere could not be written")


def test_ctrl_c_in_training_is_exit_code_130_and_the_run_goes_on(distill, config, tmp_path):
    overrides = ["training.rounds=500", "training.pairs_per_step=2", "training.checkpoint_steps=1"]
    log = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(
        [*PROGRAM, "run", str(config), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        # a test run in a script's background ignores interrupts, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("train/loss") >= 2):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert err.strip() == (
        "Interrupted; what was committed is kept. Run the same command again to go on from there."
    )
    again = distill("generate", config, *overrides)
    assert again.code == 0 and "resuming at step" in again.out


def assert_same_student(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    student = load_file(folder / "run" / "student" / "model.safetensors")
    assert student.keys() == expected.keys()
    assert all(torch.equal(student[name], expected[name]) for name in expected)


# --- what the models tell ----------------------------------------------------------------------------------


def test_check_models_prints_a_page_and_gives_the_same_as_facts(distill, config):
    page = distill("check", config, "--models")
    assert page.code == 0, page.err
    for title in (
        "as each model reads it",
        "Vocabulary, template",
        "Prompts",
        "Memory",
        "Disk",
        "Time, from",
    ):
        assert title in page.out
    assert page.out.rstrip().endswith(f"run {config}")
    facts = json.loads(distill("check", config, "--estimate", "--json").out)
    assert facts["models"]["problems"] == [] and facts["models"]["memory bytes at most"] > 0
    assert not (config.parent / "run").exists()


def test_check_models_ends_with_what_would_go_wrong(distill, config, tmp_path):
    save_tiny_model(tmp_path / "small", positions=40)
    result = distill("check", config, f"student={{model: {tmp_path}/small}}", "--estimate")
    assert result.code == 2 and "do not fit its context of 40 tokens" in result.err
    assert "Next:" not in result.out


def test_check_models_of_a_recipe_names_the_stages_that_wait(distill, config, tmp_path):
    run = tiny_config(tmp_path, "training.rounds=1").model_dump(mode="json", exclude={"name", "output"})
    second = {**run, "teacher": {**run["teacher"], "model": "stage:first"}}
    path = tmp_path / "recipe.yaml"
    stages = [{"name": "first", "run": run}, {"name": "second", "run": second}]
    path.write_text(json.dumps({"name": "two", "output": str(tmp_path / "two"), "stages": stages}))
    result = distill("check", path, "--estimate")
    assert result.code == 0, result.err
    assert "as each model reads it" in result.out and "second: made by first, not there yet" in result.out
