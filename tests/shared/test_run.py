from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from runs import TRAIN, tiny_config, tiny_run
from shared.errors import DataError, NonFiniteLossError, StoreError
from shared.generation import transformers_engine
from shared.run import Run
from shared.training import loop

SUPPORT = Path(__file__).resolve().parents[1] / "support"


class Killed(BaseException):
    """Stands for a process that is gone: nothing catches it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    """The folder of an uninterrupted run."""
    run = tiny_run(folder)
    run.execute()
    return run.config.folder


def student(run_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "student" / "model.safetensors")


def metrics(run_folder: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def comparable(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "train/tokens_per_second"} for row in rows]


def assert_same_student(left: Path, right: Path) -> None:
    a, b = student(left), student(right)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_what_its_folder_promises(finished):
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "report.html", "report.json"):
        assert (finished / name).stat().st_size > 0
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        assert (finished / "student" / name).exists()
    assert (finished / "round-01" / "responses" / "teacher" / "store.json").exists()


def test_alpha_moves_in_the_second_round_and_beta_rises(finished):
    rows = [row for row in metrics(finished) if "train/loss" in row]
    first = [row["train/alpha_student"] for row in rows if row["round"] == 1]
    second = [row["train/alpha_student"] for row in rows if row["round"] == 2]
    assert first == pytest.approx([0.1] * 3)
    assert any(abs(alpha - 0.1) > 1e-3 for alpha in second)
    betas = [row["train/beta"] for row in rows]
    assert betas == pytest.approx([0.5, 0.5, 0.5, 0.5, 4 / 6, 5 / 6])


def test_every_step_is_logged_once(finished):
    assert [row["step"] for row in metrics(finished) if "train/loss" in row] == [1, 2, 3, 4, 5, 6]


def test_students_responses_change_between_rounds(finished):
    def texts(number: int) -> list:
        import pyarrow.parquet as pq

        parts = sorted((finished / f"round-{number:02d}" / "responses" / "student").glob("*.parquet"))
        return [row["token_ids"] for part in parts for row in pq.read_table(part).to_pylist()]

    assert len(texts(1)) == len(texts(2)) == TRAIN
    assert texts(1) != texts(2)


@pytest.mark.parametrize(
    ("where", "at"), [("generate", 2), ("generate", 8), ("step", 1), ("step", 3), ("step", 5), ("save", 4)]
)
def test_a_run_killed_anywhere_and_started_again_ends_with_the_same_student(
    folder, finished, monkeypatch, where, at
):
    output = f"output={folder}/killed-{where}-{at}"
    calls = 0

    def dies(function):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at:
                raise Killed
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        if where == "generate":
            engine = transformers_engine.TransformersEngine
            patch.setattr(engine, "_generate_ids", dies(engine._generate_ids))
        elif where == "step":
            patch.setattr(loop, "_optimiser_step", dies(loop._optimiser_step))
        else:
            patch.setattr(Run, "_save", dies(Run._save))
        with pytest.raises(Killed):
            tiny_run(folder, output).execute()
    run = tiny_run(folder, output)
    run.execute()
    assert_same_student(run.config.folder, finished)
    assert comparable(metrics(run.config.folder)) == comparable(metrics(finished))


def test_a_teacher_may_be_a_base_model_and_a_lora(folder, tmp_path):
    config = tiny_config(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(config.teacher.model.name)
    torch.manual_seed(5)
    tuned = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "lora")
    shutil.copytree(tmp_path / "teacher", tmp_path / "merged")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    found = {}
    for name, teacher in (
        ("merged", f"{tmp_path}/merged"),
        ("lora", f"{{name: {tmp_path}/teacher, lora: {tmp_path}/lora}}"),
        ("plain", f"{tmp_path}/teacher"),
    ):
        run = tiny_run(tmp_path, f"teacher.model={teacher}", f"output={tmp_path}/{name}", "training.rounds=1")
        run.execute()
        found[name] = load_file(tmp_path / name / "student" / "model.safetensors")
    for key, weight in found["merged"].items():
        torch.testing.assert_close(found["lora"][key], weight, rtol=1e-4, atol=1e-5)
    assert any((found["plain"][key] - weight).abs().max() > 1e-2 for key, weight in found["merged"].items())


def test_a_run_killed_by_the_system_ends_with_the_same_student_too(folder, finished):
    output = f"output={folder}/sigkill"
    program = (
        "import sys, pathlib; from runs import tiny_run\n"
        "tiny_run(pathlib.Path(sys.argv[1]), sys.argv[2]).execute()\n"
    )
    path = os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-c", program, str(folder), output], env=environment)
    target = folder / "sigkill" / "round-01" / "checkpoints" / "step-000002"
    while process.poll() is None and not target.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    run = tiny_run(folder, output)
    run.execute()
    assert_same_student(run.config.folder, finished)


@pytest.mark.parametrize(("step", "number"), [(3, 1), (6, 2)])
def test_a_damaged_response_is_made_again_by_the_student_that_made_it(
    folder, monkeypatch, caplog, step, number
):
    # a rate at which two steps change what a student says
    settings = (
        "training.learning_rate=0.1",
        "training.checkpoint_steps=1",
        f"output={folder}/damage-{number}",
    )
    original = loop._optimiser_step

    def dies(trainee, *args):
        if trainee.step + 1 == step:
            raise Killed
        return original(trainee, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_optimiser_step", dies)
        with pytest.raises(Killed):
            tiny_run(folder, *settings).execute()
    responses = folder / f"damage-{number}" / f"round-{number:02d}" / "responses" / "student"
    part = responses / "part-00000.parquet"
    before = part.read_bytes()
    part.write_bytes(before[:-20])
    tiny_run(folder, *settings).execute("train")
    assert "is damaged" in caplog.text
    assert part.read_bytes() == before


def test_a_finished_run_is_not_trained_again(folder, finished, monkeypatch):
    monkeypatch.setattr(loop, "_optimiser_step", lambda *_: pytest.fail("trained again"))
    before = (finished / "student" / "model.safetensors").stat().st_mtime_ns
    tiny_run(folder).execute()
    assert (finished / "student" / "model.safetensors").stat().st_mtime_ns == before


def test_the_folder_of_another_configuration_is_refused(folder, finished):
    before = (finished / "config.yaml").read_text()
    with pytest.raises(StoreError, match=r"training.learning_rate: 0.005 there, 0.001 now"):
        tiny_run(folder, "training.learning_rate=1e-3").execute()
    assert (finished / "config.yaml").read_text() == before


def test_a_second_process_on_the_same_folder_is_refused(folder, finished):
    run = tiny_run(folder)
    run.workspace.open(run.config)
    try:
        with pytest.raises(StoreError, match=f"in use by process {os.getpid()}"):
            tiny_run(folder).execute()
    finally:
        run.workspace.close()


def test_a_changed_teacher_is_refused(folder, finished, tmp_path):
    from builders import save_tiny_model

    config = tiny_config(tmp_path, f"output={tmp_path}/run")
    run = tiny_run(tmp_path)
    run.execute("generate")
    save_tiny_model(tmp_path / "teacher", layers=4, seed=9)
    with pytest.raises(StoreError, match="engine"):
        tiny_run(tmp_path).execute("generate")
    assert config.folder.exists()


def test_stages_alone_do_one_round_at_a_time(tmp_path):
    tiny_run(tmp_path).execute("generate")
    assert not (tmp_path / "run" / "metrics.jsonl").read_text().count("train/loss")
    tiny_run(tmp_path).execute("train")
    assert {row["round"] for row in metrics(tmp_path / "run") if "train/loss" in row} == {1}
    tiny_run(tmp_path).execute("export")
    assert (tmp_path / "run" / "student").exists() and not (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("objective", ["sft", "seqkd", "kd", "imitkd", "gkd", "distillm", "dpkd"])
def test_every_objective_samples_only_what_it_needs_and_trains(tmp_path, objective):
    run = tiny_run(tmp_path, f"objective.name={objective}", "training.rounds=1")
    run.execute("train")
    rows = [row for row in metrics(run.config.folder) if "train/loss" in row]
    losses = [row["train/loss"] for row in rows]
    has_gap = objective not in ("sft", "seqkd")  # which have no teacher to compare with
    assert all(any("gap" in key for key in row) == has_gap for row in rows)
    assert not any("alpha" in key or "beta" in key for row in rows for key in row)  # distillm2's alone
    assert len(losses) == 3 and all(loss > 0 for loss in losses)
    sampled = {path.name for path in (run.config.folder / "round-01").glob("responses/*")}
    expected = {"sft": set(), "seqkd": {"teacher"}, "kd": {"teacher"}, "imitkd": {"student"}}
    assert sampled == expected.get(objective, {"teacher", "student"})


@pytest.mark.parametrize(("objective", "teacher_runs"), [("sft", False), ("seqkd", False), ("kd", True)])
def test_the_teacher_runs_in_training_only_where_the_objective_needs_it(
    tmp_path, monkeypatch, objective, teacher_runs
):
    run = tiny_run(tmp_path, f"objective.name={objective}", "training.rounds=1")
    run.execute("generate")
    calls = []
    signal = run.session.trainee.teacher.signal

    def counted(*args):
        calls.append(args)
        return signal(*args)

    monkeypatch.setattr(run.session.trainee.teacher, "signal", counted)
    monkeypatch.setattr(Run, "_measure", lambda *args, **kwargs: None)
    run._train(1, run._sample(1))
    assert bool(calls) == teacher_runs


def test_the_best_checkpoint_is_kept_and_can_be_exported(tmp_path):
    run = tiny_run(tmp_path, "training.learning_rate=0.3", "export.checkpoint=best", "training.rounds=1")
    run.execute("export")  # a learning rate that ruins the student: the best is the start
    (best,) = run.config.folder.glob("round-*/checkpoints/best-*")
    assert best.name == "best-000000"
    start = load_file(best / "weights.safetensors")
    exported = student(run.config.folder)
    assert all(torch.equal(exported[name], start[name]) for name in exported)


def test_a_loss_that_is_not_finite_stops_with_the_samples_and_keeps_the_weights(tmp_path, monkeypatch):
    run = tiny_run(tmp_path)
    run.execute("generate")
    original = loop._forward

    def broken(*args, **kwargs):
        output = original(*args, **kwargs)
        return output._replace(loss=output.loss * float("nan"))

    monkeypatch.setattr(loop, "_forward", broken)
    monkeypatch.setattr(Run, "_measure", lambda *args, **kwargs: None)
    again = tiny_run(tmp_path)
    with pytest.raises(NonFiniteLossError, match=r"step 1: the loss is not finite in .*train.jsonl:\d+"):
        again.execute("train")
    assert all(torch.isfinite(p).all() for p in again.session.trainee.student.parameters())


def test_a_prompt_both_trained_on_and_held_out_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"in prompts\.train and prompts\.heldout"):
        tiny_run(tmp_path, f"prompts.heldout.0.path={tmp_path}/train.jsonl").execute()


def test_a_prompt_over_the_context_is_refused_or_dropped_and_listed(tmp_path, capsys):
    tiny_config(tmp_path)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"id": "novel", "prompt": "long " * 100}) + "\n")
    with pytest.raises(DataError, match="novel"):
        tiny_run(tmp_path).execute("generate")
    run = tiny_run(tmp_path, "prompts.over_length=drop", f"output={tmp_path}/dropping")
    run.execute("generate")
    assert len(run.session.train_samples) == TRAIN


def test_only_the_student_trains_and_the_teacher_stays_frozen_in_eval_mode(tmp_path):
    run = tiny_run(tmp_path)
    run.execute("generate")
    before = {k: v.clone() for k, v in run.session.models.teacher.state_dict().items()}
    start = {k: v.clone() for k, v in run.session.trainee.student.state_dict().items()}
    groups = run._sample(1)
    run._train(1, groups)
    teacher = run.session.models.teacher
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert any(not torch.equal(start[k], v) for k, v in run.session.trainee.student.state_dict().items())


def test_lora_trains_low_rank_updates_alone_and_exports_both(tmp_path):
    run = tiny_run(tmp_path, "student.method=lora", "student.lora={r: 4}", "training.rounds=1")
    run.execute("export")
    trained = [n for n, p in run.session.trainee.student.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert (run.config.folder / "lora" / "adapter_model.safetensors").exists()
    assert (run.config.folder / "lora" / "base" / "config.json").exists()  # pruned: not on disk elsewhere
