"""A run's row weights and coupling: the same gradient however a step is split, and resumed exactly."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from processes import in_two_processes
from runs import first_gradients, tiny_run, write_prompts
from shared.config_objective import ObjectiveConfig
from shared.objectives.core import ResponseRows
from shared.training.weighting import Weighting
from shared.types import Group, Message, Response, Sample, TextPart

TASKS = ["instruction", "math"]
ALL = (
    "objective.row_weights={level: response, tau: 0.05, tasks: {gamma: 1, momentum: 0.5}}",
    "objective.coupling={math: {teacher: {divergence: kl, weight: 3, segmenter: lines},"
    " student: {alpha: 0.05}}}",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weighting")
    write_prompts(folder)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    mixed = [{**row, "task": TASKS[i % 3 == 0]} for i, row in enumerate(rows)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    return folder


def assert_same(left, right):
    assert left.keys() == right.keys() and left
    for name in left:
        assert (left[name] - right[name]).norm() <= 1e-5 * left[name].norm().clamp_min(1e-12), name


ONE_STEP = "training.pairs_per_step=10"


@pytest.fixture(scope="module")
def whole(folder):
    return first_gradients(
        folder, *ALL, ONE_STEP, "training.micro_batch_tokens=100000", f"output={folder}/whole"
    )


def test_gradients_do_not_depend_on_micro_batches_or_layouts(folder, whole):
    split = ("training.micro_batch_tokens=1", "training.pair_layout=separate", f"output={folder}/split")
    assert_same(whole, first_gradients(folder, *ALL, ONE_STEP, *split))
    plain = first_gradients(folder, ONE_STEP, f"output={folder}/plain")
    assert any(not torch.allclose(whole[name], plain[name], rtol=1e-2) for name in whole)


def test_gradients_of_two_processes_are_those_of_one(folder, whole):
    target = folder / "two.safetensors"
    in_two_processes(
        "import runs; runs.save_first_gradients(*sys.argv[1:])",
        str(folder), str(target), *ALL, ONE_STEP, f"output={folder}/two",
    )  # fmt: skip
    assert_same(whole, load_file(target))


def test_a_run_that_was_stopped_ends_with_the_same_weights(folder):
    whole = tiny_run(folder, *ALL, f"output={folder}/run")
    whole.execute("export")
    weights = [row["train/weight_math"] for row in whole.workspace.metrics() if "train/weight_math" in row]
    assert weights[0] == 1 and len(set(weights)) == 6  # nothing is known before the first step

    stopped = tiny_run(folder, *ALL, f"output={folder}/stopped")
    log = stopped.workspace.log_metrics

    def stop_at_4(row):
        log(row)
        if row["step"] == 5 and "train/loss" in row:  # after the checkpoint at 4
            raise KeyboardInterrupt

    stopped.workspace.log_metrics = stop_at_4
    with pytest.raises(KeyboardInterrupt):
        stopped.execute("export")
    tiny_run(folder, *ALL, f"output={folder}/stopped").execute("export")
    left, right = (load_file(folder / name / "student" / "model.safetensors") for name in ("run", "stopped"))
    assert all(torch.equal(left[name], right[name]) for name in left)


def group(task, *lengths):
    responses = tuple(
        Response("s", role, 1, 0, tuple(range(length)), "", "stop", "")
        for role, length in zip(("teacher", "student"), lengths, strict=True)
    )
    return Group(Sample("s", (Message("user", (TextPart("x"),)),), task), responses)


@pytest.mark.parametrize("normalization", ["response", "token"])
def test_the_mean_over_the_round_is_1_for_each_side(normalization):
    config = ObjectiveConfig(
        normalization=normalization,
        row_weights={"tasks": {"gamma": 2}},
        coupling={"math": {"student": {"weight": 5}}},
    )
    weighting = Weighting(config, TASKS)
    groups = [group("math", 3, 1), group("instruction", 2, 6), group("instruction", 4, 1)]
    weighting.begin_round(groups)
    sums, counts = torch.tensor([0.2, 0.4, 0.1, 0.3, 0, 0]), torch.tensor([2.0, 1, 2, 1, 0, 0])
    weighting.observe(sums, counts)
    easy, hard = weighting.weight_K
    assert easy < 1 < hard
    lengths = torch.tensor([len(r.token_ids) for g in groups for r in g.responses])
    rows = ResponseRows(
        torch.zeros(int(lengths.sum())),
        torch.repeat_interleave(torch.arange(6), lengths),
        torch.tensor([0, 1] * 3),
        torch.arange(6),
        torch.tensor([1, 3, 0, 2, 0, 2]),
    )
    weights_N = weighting.of_responses(rows)
    firsts = torch.tensor([int((rows.response_N == r).nonzero()[0]) for r in range(6)])
    for side in (0, 1):
        if normalization == "response":
            assert weights_N[firsts][side::2].mean() == pytest.approx(1)
        else:
            assert weights_N[rows.side_R[rows.response_N] == side].mean() == pytest.approx(1)
    assert float(weights_N[firsts][0] / weights_N[firsts][2]) == pytest.approx(hard / easy)
    assert float(weights_N[firsts][1] / weights_N[firsts][3]) == pytest.approx(5 * hard / easy)
