"""A run's folder belongs to one process and one configuration, and survives full disks and damage."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from shared import workspace as workspace_module
from shared.config_files import parse_config
from shared.errors import StoreError, UserError
from shared.workspace import HELDOUT, Workspace, write_atomically
from text_distill.config import TextRunConfig

TEXT = """
name: small
teacher: {model: org/teacher}
student: {model: org/student}
prompts: {train: [{path: train.jsonl}], heldout: [{path: heldout.jsonl}]}
generation: {max_new_tokens: 8}
training: {pairs_per_step: 2, learning_rate: 1e-4}
"""


def config(*overrides: str) -> TextRunConfig:
    return parse_config(TEXT, TextRunConfig, overrides)


def opened(folder: Path, *overrides: str) -> Workspace:
    workspace = Workspace(folder)
    workspace.open(config(*overrides))
    return workspace


def begun(folder: Path, *overrides: str) -> None:
    """A run that has made its first responses."""
    opened(folder, *overrides).close()
    (folder / HELDOUT).mkdir()


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- whose folder it is ------------------------------------------------------------------------------------


def test_only_the_runs_of_a_sweep_look_beside_them(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "heldout").mkdir(parents=True)
    here = tmp_path / "a" / "heldout"
    assert tmp_path / "b" / "heldout" in Workspace(tmp_path / "a", shares=True).beside(here)
    assert Workspace(tmp_path / "a").beside(here) == []


def test_another_configuration_is_refused_with_every_setting_that_differs(tmp_path):
    begun(tmp_path / "run", "seed=1")
    kept = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(StoreError) as caught:
        opened(tmp_path / "run", "seed=2", "student.lora={r: 4}", "student.method=lora")
    lines = str(caught.value).splitlines()
    assert "holds a run with another configuration" in lines[0]
    assert "  seed: 1 there, 2 now" in lines
    assert "  student.method: 'full' there, 'lora' now" in lines
    assert "  student.lora.r: (not set) there, 4 now" in lines
    assert lines[-1].startswith("Set output (or name) to another folder")
    assert (tmp_path / "run" / "config.yaml").read_bytes() == kept
    opened(tmp_path / "run", "seed=1").close()  # the refusal left no lock, and the run goes on


def test_a_start_that_made_nothing_does_not_stand_in_the_way_of_a_mended_configuration(tmp_path):
    opened(tmp_path / "run", "seed=1").close()
    (tmp_path / "run" / "student.json").write_text('{"kept_layers": [0]}')  # chosen for the other one
    workspace = opened(tmp_path / "run", "seed=2")
    assert "seed: 2" in (tmp_path / "run" / "config.yaml").read_text()
    assert workspace.read_json("student.json") is None


def test_a_second_process_is_refused_by_number_and_welcome_once_the_first_has_ended(tmp_path):
    hold = (
        "import sys, time; from pathlib import Path; from shared.workspace import Workspace\n"
        "w = Workspace(Path(sys.argv[1])); w._take_lock(); print('held', flush=True); time.sleep(60)"
    )
    (tmp_path / "run").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            with pytest.raises(StoreError, match=f"in use by process {other.pid}. Wait until it ends"):
                opened(tmp_path / "run")
            assert not (tmp_path / "run" / "config.yaml").exists()
        finally:
            other.kill()
    opened(tmp_path / "run").close()  # a killed owner leaves no lock behind


def test_only_the_main_process_writes(tmp_path):
    workspace = Workspace(tmp_path / "run", main=False)
    workspace.open(config())
    workspace.log_metrics({"step": 1})
    workspace.write_json("student.json", {})
    workspace.cut_metrics(None)
    with workspace.timed("train"):
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_file_where_the_folder_should_be_is_named(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"is a file. Set output to a folder"):
        opened(tmp_path / place)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, number):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(workspace_module.fcntl, "flock", refuse)
    with pytest.raises(StoreError, match=r"cannot be written. Set output to a folder of yours"):
        opened(tmp_path / "run")


# --- full disks --------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_at_the_start_leaves_no_half_configuration_and_no_lock(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(UserError, match=r"the disk is full: .*could not be written"):
            opened(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.lock"}
    opened(tmp_path / "run").close()


def test_a_disk_that_fills_leaves_the_former_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "usage.json", "before")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match=r"the disk is full: .*usage\.json"):
        write_atomically(tmp_path / "usage.json", "after")
    assert [path.name for path in tmp_path.iterdir()] == ["usage.json"]
    assert (tmp_path / "usage.json").read_text() == "before"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device_under_the_metrics_is_told(tmp_path):
    workspace = opened(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"the disk is full: .*metrics\.jsonl"):
        workspace.log_metrics({"step": 1})


def test_an_error_of_another_kind_stays_what_it_is(tmp_path, monkeypatch):
    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_atomically(tmp_path / "usage.json", "x")


# --- metrics and usage -------------------------------------------------------------------------------------


def test_metrics_are_cut_back_to_a_step_and_a_line_cut_by_a_crash_is_forgotten(tmp_path):
    workspace = opened(tmp_path / "run")
    rows = [{"step": step, "text": "ü ‖"} for step in range(4)]
    for row in rows:
        workspace.log_metrics(row)
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 4, "text": "ü'.encode()[:-1])  # in the middle of a character
    assert workspace.metrics() == rows
    workspace.cut_metrics(2)
    workspace.log_metrics({"step": 3})
    assert workspace.metrics() == [*rows[:3], {"step": 3}]
    workspace.cut_metrics(None)
    assert workspace.metrics() == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "metrics.jsonl",
            '{"step": 1}\nnonsense\n{"step": 2}\n',
            r"metrics\.jsonl:2 is damaged: .*Set output",
        ),
        ("usage.json", '{"timing_s": ', r"usage\.json is damaged: "),
        ("config.yaml", "name: [", r"config\.yaml cannot be read: "),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, name, content, message):
    begun(tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(StoreError, match=message):
        workspace = opened(tmp_path / "run")
        workspace.metrics()
        workspace.usage()


def test_a_folder_with_responses_but_no_configuration_is_refused(tmp_path):
    begun(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(StoreError, match=r"holds responses but no config\.yaml"):
        opened(tmp_path / "run")


def test_time_adds_up_over_sessions_also_where_a_stage_fails(tmp_path, monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 13.0])
    monkeypatch.setattr(workspace_module.time, "perf_counter", lambda: next(clock))
    with opened(tmp_path / "run").timed("train"):
        pass
    (tmp_path / "run" / HELDOUT).mkdir()
    again = Workspace(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), again.timed("train"):
        _ = 1 / 0
    assert again.usage()["timing_s"] == {"train": 5.0}
    assert again.usage()["peak_memory_bytes"] > 1e7


def test_the_machine_is_written_down(tmp_path):
    opened(tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert facts["cores"] == os.cpu_count() and facts["packages"]["torch"]


def test_a_setting_that_came_later_had_its_default(tmp_path):
    begun(tmp_path / "run", "seed=1")
    path = tmp_path / "run" / "config.yaml"
    before = yaml.safe_load(path.read_text())
    del before["training"]["mixed_precision"], before["prompts"]["train"][0]["written"]
    path.write_text(yaml.safe_dump(before))
    opened(tmp_path / "run", "seed=1").close()
    with pytest.raises(StoreError, match=r"training\.mixed_precision: 'no' there, 'bf16' now"):
        opened(tmp_path / "run", "seed=1", "training.mixed_precision=bf16")
