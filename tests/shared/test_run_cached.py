"""A run whose teacher is cached: what is in memory when, what it costs, what it refuses."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from builders import save_tiny_model
from runs import tiny_config, tiny_run, write_prompts
from shared.check import check_config, smoke_config
from shared.errors import ConfigError, StoreError
from shared.models.teachers import LocalTeacher
from shared.run import Outcome
from shared.store import Store
from shared.teacher_memory import cache_facts
from shared.training import loop

CACHED = ("objective.name=kd", "generation.reuse_teacher=true", "teacher.cache={top_k: 64}")


class Killed(BaseException):
    """Stands for a process that is gone: nothing catches it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cached")


class Watched(NamedTuple):
    """An uninterrupted run: its folder, and the teachers in memory at each step and in its evaluation."""

    folder: Path
    at_steps: list[list[object]]
    at_evaluation: list[object]


@pytest.fixture(scope="module")
def finished(folder) -> Watched:
    models: list[weakref.ref] = []
    watched = Watched(folder / "run", [], [])
    original_init, original_step = LocalTeacher.__init__, loop._optimiser_step

    def remembered(self, model, *arguments):
        models.append(weakref.ref(model))
        original_init(self, model, *arguments)

    def step(*arguments):
        gc.collect()
        watched.at_steps.append([model() for model in models])
        return original_step(*arguments)

    def evaluated(run) -> Outcome:
        watched.at_evaluation.append(run.session.models.teacher)
        return Outcome({}, (), ())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalTeacher, "__init__", remembered)
        patch.setattr(loop, "_optimiser_step", step)
        tiny_run(folder, *CACHED, evaluate=evaluated).execute()
    return watched


def student(run_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "student" / "model.safetensors")


def metrics(run_folder: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Of two students, relative."""
    squares = sum(float((left[name] - right[name]).square().sum()) for name in left)
    return (squares / sum(float(tensor.square().sum()) for tensor in left.values())) ** 0.5


def test_a_whole_cache_trains_the_student_that_the_teacher_trains(folder):
    dense = tiny_run(folder, *CACHED[:2], f"output={folder}/dense")
    dense.execute()
    whole = tiny_run(folder, *CACHED[:2], "teacher.cache={top_k: 259}", f"output={folder}/whole")
    whole.execute()
    trained, start = student(folder / "dense"), dense.session.start_model().state_dict()
    moved = distance(trained, start)
    assert distance(trained, student(folder / "whole")) < 0.02 * moved
    kept = json.loads((folder / "whole" / "teacher-cache.json").read_text())["kept_share"]
    assert kept["teacher"] == pytest.approx(1, abs=1e-3)


def test_the_teacher_is_out_of_memory_in_training_and_back_for_the_evaluation(finished):
    assert finished.at_steps == [[None]] * 6
    assert finished.at_evaluation != [None]


def test_the_run_says_what_its_cache_costs_and_shows(finished):
    facts = json.loads((finished.folder / "teacher-cache.json").read_text())
    assert facts["bytes_per_token"] > 64 * (9 + 16) / 8
    assert 0 < facts["covered_mass"]["teacher"] < 1 and 0 < facts["kept_share"]["teacher"] < 1
    assert "bytes a token" in (finished.folder / "report.html").read_text()
    rows = metrics(finished.folder)
    values = [row["heldout/kl_cached"] for row in rows if "heldout/kl_cached" in row]
    assert len(values) == 3 and min(values) > 0 and not any("heldout/kl" in row for row in rows)
    assert any(row.get("example", {}).get("teacher") for row in rows)


@pytest.mark.parametrize(("where", "at"), [("cache", 2), ("step", 5)])
def test_killed_and_started_again_it_ends_with_the_same_student(folder, finished, monkeypatch, where, at):
    output = f"output={folder}/killed-{where}-{at}"
    calls = 0

    def dies(function):
        def wrapped(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == at:
                raise Killed
            return function(*arguments, **options)

        return wrapped

    with monkeypatch.context() as patch:
        if where == "cache":
            patch.setattr(LocalTeacher, "signal", dies(LocalTeacher.signal))
        else:
            patch.setattr(loop, "_optimiser_step", dies(loop._optimiser_step))
        with pytest.raises(Killed):
            tiny_run(folder, *CACHED, output).execute()
    if where == "cache":
        assert len(list((folder / f"killed-{where}-{at}" / "teacher-cache").glob("part*"))) == at - 1
    run = tiny_run(folder, *CACHED, output)
    run.execute()
    ours, uninterrupted = student(run.config.folder), student(finished.folder)
    assert all(torch.equal(ours[name], uninterrupted[name]) for name in uninterrupted)


def folders_written(monkeypatch) -> list[Path]:
    """The folder of each part that any store writes from now on."""
    written: list[Path] = []
    original = Store.write

    def counted(self, part, rows):
        written.append(self.folder)
        return original(self, part, rows)

    monkeypatch.setattr(Store, "write", counted)
    return written


def test_runs_on_the_same_responses_share_a_cache_and_others_are_refused(folder, monkeypatch):
    shared = f"teacher.cache={{top_k: 8, folder: {folder}/shared}}"
    tiny_run(folder, *CACHED[:2], shared, f"output={folder}/first").execute("train")
    written = folders_written(monkeypatch)
    sibling = (f"output={folder}/second", "training.learning_rate=1e-3")
    tiny_run(folder, *CACHED[:2], shared, *sibling).execute("train")
    assert written and folder / "shared" not in written
    with pytest.raises(StoreError, match=r"responses\.digest"):
        tiny_run(folder, *CACHED[:2], shared, f"output={folder}/third", "seed=5").execute("train")


def test_runs_of_a_sweep_make_the_signals_of_a_seed_once(tmp_path, monkeypatch):
    written = folders_written(monkeypatch)
    names = ("a", "b", "c")
    changes = ((), ("training.learning_rate=1e-3",), ("seed=5",))
    for name, change in zip(names, changes, strict=True):
        tiny_run(tmp_path, *CACHED, *change, f"output={tmp_path}/sweep/{name}", shares=True).execute(
            "generate"
        )
    caches = [tmp_path / "sweep" / name / "teacher-cache" for name in names]
    assert [folder in written for folder in caches] == [True, False, True]
    taken, own = (b"".join(p.read_bytes() for p in sorted(c.glob("part*"))) for c in caches[:2])
    assert taken == own


def test_a_teacher_that_changed_before_the_evaluation_is_refused(tmp_path):
    run = tiny_run(tmp_path, *CACHED)
    run.execute("export")
    save_tiny_model(tmp_path / "teacher", layers=4, seed=9)
    with pytest.raises(StoreError, match="has changed since the run started"):
        run._report()


def test_offline_pairs_are_cached_where_asked(tmp_path):
    write_prompts(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    rows = [{**row, "rejected": f"worse {index}"} for index, row in enumerate(lines)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tiny_run(
        tmp_path,
        "generation.offline={teacher: columns, student: columns}",
        "generation.max_new_tokens=40",
        "teacher.cache={student_responses: true}",
        "training.pair_layout=joint",
    )
    run.execute("train")
    assert run.session.trainee.layouts[:2] == ("joint", "separate")
    (text,) = cache_facts(run.workspace).values()
    assert "on teacher" in text and "on student" in text
    assert any("train/alpha_student" in row for row in metrics(run.config.folder))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.name=seqkd"], "no effect of teacher.cache with objective 'seqkd'"),
        (["objective.name=kd"], "answers anew in each of 2 rounds.*generation.reuse_teacher: true"),
        (["generation.reuse_teacher=true"], "student responses, and here they are sampled anew"),
        (["generation.offline={teacher: columns, student: columns}"], "here they are offline.*only if asked"),
        (["objective.name=kd", "training.rounds=1", "teacher.cache.student_responses=true"], "no effect of"),
    ],
)
def test_what_a_cache_cannot_serve_is_refused(folder, overrides, said):
    with pytest.raises(ConfigError, match=said):
        tiny_config(folder, "teacher.cache={top_k: 64}", *overrides)


def test_check_names_the_cache_and_a_smoke_run_leaves_a_shared_one_alone(folder):
    config = tiny_config(folder, *CACHED[:2], f"teacher.cache.folder={folder}/shared", f"output={folder}/new")
    assert check_config(config)["teacher cached"] == f"top 64, in {folder}/shared"
    assert smoke_config(config).teacher.cache.folder is None
