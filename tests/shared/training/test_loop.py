from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from processes import in_two_processes
from runs import first_gradients, tiny_run


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys() and left
    for name in left:
        difference = (left[name] - right[name]).norm() / left[name].norm().clamp_min(1e-12)
        assert difference < 1e-5, (name, float(difference))


def relative_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    whole, other = (torch.cat([t.flatten() for t in side.values()]) for side in (left, right))
    return float((whole - other).norm() / whole.norm())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gradients")


# one step over all ten pairs, so that splits are uneven
ONE_STEP = "training.pairs_per_step=10"
CACHED = ("objective.name=kd", "generation.reuse_teacher=true", "teacher.cache={top_k: 8}")


@pytest.mark.parametrize("normalization", ["response", "token"])
def test_gradients_do_not_depend_on_micro_batches(folder, normalization):
    settings = (ONE_STEP, f"objective.normalization={normalization}")

    def gradients(tokens: int) -> dict[str, torch.Tensor]:
        output = f"output={folder}/{normalization}-{tokens}"
        return first_gradients(folder, *settings, f"training.micro_batch_tokens={tokens}", output)

    whole = gradients(100_000)
    assert_same(whole, gradients(1))
    assert_same(whole, gradients(300))


def test_gradients_of_two_processes_are_those_of_one(folder):
    budget = "training.micro_batch_tokens=200"
    settings = {
        "ten pairs": (ONE_STEP, budget),
        # with 3 pairs and a large budget one process has a single pair
        "three": ("training.pairs_per_step=3", budget),
        "teacher": (ONE_STEP, budget, "objective.name=kd"),
        "cached": (ONE_STEP, budget, *CACHED),
    }
    alone, calls = {}, []
    for name, words in settings.items():
        alone[name] = first_gradients(folder, *words, f"output={folder}/alone {name}")
        if name != "teacher":
            calls.append((str(folder), f"{folder}/{name}.safetensors", *words, f"output={folder}/two {name}"))
    each = "[runs.save_first_gradients(*call) for call in json.loads(sys.argv[1])]"
    in_two_processes(f"import json, runs; {each}", json.dumps(calls))
    for _, target, *_ in calls:
        assert_same(alone[Path(target).stem], load_file(target))
    # of 8 ids a token, which no teacher in memory would give
    assert relative_difference(alone["teacher"], alone["cached"]) > 0.01


def test_a_run_in_two_processes_gives_the_same_student(folder):
    run = tiny_run(folder, f"output={folder}/run-alone")
    run.execute("export")
    in_two_processes(
        "import runs; from eval.run_stage import evaluate_run; folder = pathlib.Path(sys.argv[1]);"
        "runs.tiny_run(folder, *sys.argv[2:], evaluate=evaluate_run).execute()",
        str(folder),
        f"output={folder}/run-two",
    )
    alone, two = (
        load_file(folder / name / "student" / "model.safetensors") for name in ("run-alone", "run-two")
    )
    for name in alone:
        torch.testing.assert_close(alone[name], two[name], rtol=1e-3, atol=1e-4)
    rows = (folder / "run-two" / "metrics.jsonl").read_text().splitlines()
    assert sum("train/loss" in row for row in rows) == 6  # written once, not by each process
    assert (folder / "run-two" / "report.html").exists()


def test_gradient_checkpointing_changes_memory_not_gradients(folder):
    plain = first_gradients(folder, ONE_STEP, f"output={folder}/plain")
    checkpointed = first_gradients(
        folder, ONE_STEP, "training.gradient_checkpointing=true", f"output={folder}/checkpointed"
    )
    assert_same(plain, checkpointed)


def test_the_loss_falls(folder):
    settings = ("objective.name=kd", "training.rounds=1", "training.schedule=constant", ONE_STEP)
    run = tiny_run(folder, *settings, f"output={folder}/falls")
    run.execute("generate")
    groups = run._sample(1)
    for _ in range(8):  # the same pairs again and again
        run._first_step = run.session.trainee.step
        run._train(1, groups)
    losses = [row["train/loss"] for row in run.workspace.metrics() if "train/loss" in row]
    assert len(losses) == 8 and losses[-1] < 0.7 * losses[0]
