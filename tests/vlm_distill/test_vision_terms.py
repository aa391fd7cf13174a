"""Visual-advantage weights and KL at image tokens: by their formulas in float64, and in whole tiny runs."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from shared.data.images import open_image
from shared.errors import AlignmentError, ConfigError, UserError
from shared.models.heads import head_of, hidden_rows
from shared.models.teachers import LocalTeacher
from shared.models.vocabulary import shared_vocabulary
from shared.objectives.head import Head
from shared.objectives.signal import Dense
from shared.training import loop
from shared.types import Group, ImagePart, Message, Response, Sample, TextPart
from vlm_builders import FAMILIES, llava, picture, save_tiny_vlm
from vlm_distill.adapter import VlmAdapter
from vlm_distill.assignment import cheapest_assignment
from vlm_distill.blank_pictures import blank_like, mean_colour
from vlm_distill.families import Cell, rectangle
from vlm_distill.position_kl import PositionKL, area_shares
from vlm_distill.visual_advantage import VisualAdvantage, advantage_weights
from vlm_runs import rows_of, vlm_config, vlm_run

ADVANTAGE = "vision.advantage={kappa: 2}"
POSITION_KL = "vision.position_kl={weight: 0.5}"


def cells(height: int, width: int) -> tuple[Cell, ...]:
    return tuple(rectangle(height, width))


# --- visual advantage ---------------------------------------------------------------------------------------


def test_weights_by_hand():
    seen = torch.tensor([-0.5, -1.0, -2.0, -0.1, -9.0], dtype=torch.float64)
    blank = torch.tensor([-1.5, -0.5, -2.0, -30.0, -9.0], dtype=torch.float64)
    response = torch.tensor([0, 0, 0, 1, 1])
    weights = advantage_weights(seen, blank, response, kappa=2.0)
    # 1 + 2 · (1, 0, 0), and 1 + 2 · (5, 0): one loses by the picture, one gains more than 5 nats
    expected = torch.tensor([3 / (5 / 3), 1 / (5 / 3), 1 / (5 / 3), 11 / 6, 1 / 6], dtype=torch.float64)
    torch.testing.assert_close(weights, expected)
    assert advantage_weights(seen[:0], blank[:0], response[:0], kappa=2.0).shape == (0,)


def test_equal_tokens_have_weights_of_one():
    same = torch.full((4,), -1.0)
    assert torch.equal(advantage_weights(same, same, torch.tensor([0, 0, 1, 1]), kappa=3.0), torch.ones(4))


def test_a_blank_is_as_large_and_becomes_nothing():
    processor = llava().processor().image_processor
    blank = open_image(blank_like((40, 24), mean_colour(processor)))
    assert blank.size == (40, 24)
    pixels = processor(blank, return_tensors="pt")["pixel_values"]
    assert pixels.abs().max() < 0.5 / 255 / min(processor.image_std) + 1e-6
    with pytest.raises(UserError, match=r"names no mean colour .* Remove it"):
        mean_colour(object())


def saved(folder, name, seed):
    return save_tiny_vlm(folder, FAMILIES[name](), seed=seed)


def test_weights_in_a_run_are_those_of_two_passes_of_the_teacher(tmp_path, monkeypatch):
    teacher, student = saved(tmp_path / "t", "qwen2_5_vl", 1), saved(tmp_path / "s", "llava", 2)
    run = vlm_run(vlm_config(tmp_path, teacher, student, ADVANTAGE))
    run.execute("generate")
    groups, trainee = run._sample(1), run.session.trainee
    batch = loop._prepare(trainee, groups)
    weights = trainee.additions.row_weights(batch, trainee.teacher.signal(groups, batch.teacher))

    def log_p(group: Group, response: Response) -> torch.Tensor:
        """With all logits at once, a response alone, images as the group has them."""
        alone = trainee.teacher_adapter.encode([Group(group.sample, (response,))], layout="separate")
        model = run.session.models.teacher
        head = head_of(model, run.session.models.vocabulary)
        logits = head.logits(hidden_rows(model, alone.inputs, alone.rows_N)).double()
        return logits.log_softmax(-1).gather(1, alone.target_ids_N[:, None]).squeeze(1)

    expected = []
    for group in groups:
        blank = Group(blanked(group.sample, trainee.teacher_adapter), group.responses)
        for response in group.responses:
            with torch.no_grad():
                gain = (log_p(group, response) - log_p(blank, response)).clamp(0, 5)
            raw = 1 + 2 * gain if group.sample.images else torch.ones_like(gain)
            expected.append(raw / raw.mean())
    torch.testing.assert_close(weights.double(), torch.cat(expected), atol=1e-4, rtol=1e-4)
    assert weights.std() > 0.01  # they differ, or nothing was tested
    run.workspace.close()


def test_a_blank_that_takes_another_number_of_tokens_stops_the_run():
    sample = Sample("seen", (Message("user", (ImagePart("0"), TextPart("what?"))),), task="vqa")
    group = Group(sample, (Response("seen", "teacher", 1, 0, (7, 8), "", "length", ""),))
    rows = SimpleNamespace(targets_N=torch.tensor([7, 8]), response_N=torch.tensor([0, 0]))
    dense = Dense(torch.zeros(2, 4), Head(torch.randn(9, 4)))
    shorter = SimpleNamespace(signal=lambda groups, encoded: Dense(dense.hidden_NE[:1], dense.head))
    advantage = VisualAdvantage(shorter, lambda reference: "blank", kappa=1.0)
    with pytest.raises(AlignmentError, match=r"samples seen: with blank .* have 1 rows, with their own 2"):
        advantage(SimpleNamespace(groups=[group], rows=rows), dense)


def blanked(sample: Sample, adapter: VlmAdapter) -> Sample:
    parts = tuple(
        ImagePart(adapter.blank(part.image)) if isinstance(part, ImagePart) else part
        for part in sample.messages[0].parts
    )
    return Sample(sample.id, (Message("user", parts),), task=sample.task)


# --- who goes with whom -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 4), (3, 5), (5, 3), (6, 6)])
def test_the_assignment_is_the_cheapest_of_all(rows, columns):
    for seed in range(5):
        cost = np.random.default_rng(seed).normal(size=(rows, columns))
        pairs = cheapest_assignment(cost)
        few = min(rows, columns)
        assert len(pairs) == few and all(len({pair[axis] for pair in pairs}) == few for axis in (0, 1))
        table = cost if rows <= columns else cost.T
        cheapest = min(
            sum(table[i, j] for i, j in enumerate(chosen))
            for chosen in itertools.permutations(range(max(rows, columns)), few)
        )
        assert sum(cost[pair] for pair in pairs) == pytest.approx(cheapest)


def test_shares_by_area():
    assert torch.equal(area_shares(cells(3, 2), cells(3, 2)), torch.eye(6, dtype=torch.float64))
    pooled = area_shares(cells(2, 2), cells(4, 4))
    assert pooled[0].view(4, 4).tolist() == [[0.25, 0.25, 0, 0]] * 2 + [[0, 0, 0, 0]] * 2
    finer = area_shares(cells(4, 4), cells(2, 2))
    assert finer[5].tolist() == [1, 0, 0, 0] and finer[6].tolist() == [0, 1, 0, 0]
    odd = area_shares(cells(1, 2), cells(1, 3))
    torch.testing.assert_close(odd, torch.tensor([[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]]).double())


# --- KL at image tokens -------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two models' rows at the image tokens of one micro-batch, and what the loss made of the groups."""

    loss: PositionKL
    activations: Any
    student: Dense
    teacher: Dense


def pair(student: str, teacher: str, matching: str, *, seeds: tuple[int, int] = (1, 2)) -> Pair:
    families = {"student": (student, seeds[0]), "teacher": (teacher, seeds[1])}
    models, adapters, encodings = [], [], []
    samples = [
        Sample("two", (Message("user", (ImagePart("0"), TextPart("and"), ImagePart("1"))),), task="vqa"),
        Sample("none", (Message("user", (TextPart("what?"),)),), task="vqa"),
        Sample("one", (Message("user", (ImagePart("2"), TextPart("what?"))),), task="vqa"),
    ]
    answers = [
        tuple(
            Response(s.id, role, 1, 0, (7, 8, 9)[: 2 + k], "", "length", "")
            for k, role in enumerate(families)
        )
        for s in samples
    ]
    groups = [Group(sample, responses) for sample, responses in zip(samples, answers, strict=True)]
    for name, seed in families.values():
        family = llava(24) if name == "llava@24" else FAMILIES[name]()
        model = family.model(seed).double()
        adapters.append(
            VlmAdapter(family.processor(), model.config, open_image=lambda reference: picture(int(reference)))
        )
        models.append(model)
        encodings.append(adapters[-1].encode(groups, layout="separate" if len(encodings) else "joint"))
    vocabulary = shared_vocabulary(
        *(adapter.vocabulary for adapter in reversed(adapters)),
        teacher_width=models[1].lm_head.weight.shape[0],
        student_width=models[0].lm_head.weight.shape[0],
    )
    loss = PositionKL(*adapters, weight=0.7, matching=matching)
    activations = loss.activations(groups, *encodings)
    sides = [
        Dense(
            hidden_rows(
                model, {k: v.double() if v.is_floating_point() else v for k, v in e.inputs.items()}, rows
            ),
            head_of(model, vocabulary),
        )
        for model, e, rows in zip(models, encodings, activations[:2], strict=True)
    ]
    return Pair(loss, activations, *sides)


def reference(found: Pair, shares: list[torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Picture by picture, every cell with every cell."""
    total = hidden.sum() * 0
    for match, share in zip(found.activations.matches, shares, strict=True):
        log_q = found.student.head.logits(hidden[match.student]).log_softmax(-1)
        log_p = found.teacher.head.logits(found.teacher.hidden_NE[match.teacher]).log_softmax(-1)
        kl = (log_p.exp()[None] * (log_p[None] - log_q[:, None])).sum(-1)
        total = total + 0.7 * match.weight * (share * kl).sum() / share.sum()
    return total


@pytest.mark.parametrize(
    ("student", "teacher", "matching"),
    [
        ("llava", "llava", "grid"),
        ("llava", "llava@24", "grid"),
        ("llava@24", "qwen2_5_vl", "grid"),
        ("llava_next", "smolvlm", "grid"),
        ("llava", "llava@24", "hungarian"),
        ("gemma3", "internvl", "hungarian"),
    ],
)
def test_value_and_gradient_are_those_of_the_definition(student, teacher, matching):
    found = pair(student, teacher, matching)
    gradients, values = [], []
    shares = [match.shares_XY for match in found.activations.matches]
    if matching == "hungarian":
        shares = [cheapest_shares(found, match) for match in found.activations.matches]
    for compute in (
        lambda hidden: found.loss(
            Dense(hidden, found.student.head), found.teacher, found.activations.matches
        ),
        lambda hidden: reference(found, shares, hidden),
    ):
        hidden = found.student.hidden_NE.detach().clone().requires_grad_(True)
        value = compute(hidden)
        values.append(value.item())
        gradients.append(torch.autograd.grad(value, [hidden, found.student.head.weight_VD]))
    assert values[0] == pytest.approx(values[1], rel=1e-9) and values[0] > 0.01
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-7)
    assert found.teacher.hidden_NE.grad is None


def cheapest_shares(found: Pair, match: Any) -> torch.Tensor:
    log_q = found.student.head.logits(found.student.hidden_NE[match.student]).log_softmax(-1)
    log_p = found.teacher.head.logits(found.teacher.hidden_NE[match.teacher]).log_softmax(-1)
    kl = (log_p.exp()[None] * (log_p[None] - log_q[:, None])).sum(-1).detach()
    shares = torch.zeros_like(kl)
    for x, y in cheapest_assignment(kl.numpy()):
        shares[x, y] = 1
    return shares


@pytest.mark.parametrize("matching", ["grid", "hungarian"])
def test_a_model_beside_itself_has_no_loss(matching):
    found = pair("llava", "llava", matching, seeds=(1, 1))
    assert found.loss(found.student, found.teacher, found.activations.matches).item() == pytest.approx(
        0, abs=1e-9
    )


def test_no_picture_no_loss():
    hidden = torch.randn(0, 4, requires_grad=True)
    head = Head(torch.randn(6, 4))
    loss = PositionKL(None, None, weight=1.0)(Dense(hidden, head), Dense(hidden, head), [])
    loss.backward()
    assert loss.item() == 0 and hidden.grad.shape == (0, 4)


# --- whole runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return save_tiny_vlm(folder / "t", llava(24), seed=1), saved(folder / "s", "llava", 2)


def gradients(folder, models, *overrides):
    """Unclipped gradients of the first step, and its metrics."""
    run = vlm_run(vlm_config(folder, *models, "training.max_grad_norm=1e9", *overrides))
    run.execute("generate")
    trainee, taken, logged = run.session.trainee, {}, []

    def take(*_, **__):
        taken.update({n: p.grad.clone() for n, p in trainee.student.named_parameters() if p.grad is not None})

    trainee.optimizer.step = take
    groups = run._sample(1)
    loop.train_round(
        trainee, groups, first_step=0, seed=0, on_step=logged.append, on_checkpoint=list, on_evaluate=list
    )
    return taken, logged


@pytest.mark.parametrize("term", [ADVANTAGE, POSITION_KL])
def test_terms_change_the_gradient_and_no_split_changes_theirs(tmp_path, models, term):
    one_step = "training.pairs_per_step=6"
    plain, _ = gradients(tmp_path / "plain", models, one_step)
    whole, logged = gradients(tmp_path / "whole", models, one_step, term)
    split, again = gradients(tmp_path / "split", models, one_step, term, "training.micro_batch_tokens=1")
    scale = max(gradient.abs().max() for gradient in whole.values())
    assert any((plain[name] - whole[name]).abs().max() > 1e-3 * scale for name in whole)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, atol=1e-5 * scale.item(), rtol=1e-4)
    assert ("train/auxiliary_loss" in logged[0]) == (term == POSITION_KL)
    assert logged[0]["train/loss"] == pytest.approx(again[0]["train/loss"], rel=1e-5)


def test_a_run_with_both_goes_on_after_a_kill_to_the_same_student(tmp_path, models):
    from safetensors.torch import load_file

    both = (ADVANTAGE, POSITION_KL, "training.checkpoint_steps=1")
    vlm_run(vlm_config(tmp_path / "a", *models, *both)).execute()
    killed = vlm_run(vlm_config(tmp_path / "b", *models, *both))

    def stop(metrics):
        raise KeyboardInterrupt

    killed.execute("generate")
    killed.workspace.log_metrics = stop
    with pytest.raises(KeyboardInterrupt):
        killed.execute()
    vlm_run(vlm_config(tmp_path / "b", *models, *both)).execute()
    ours, theirs = (load_file(tmp_path / name / "run/student/model.safetensors") for name in "ab")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    losses = [row["train/auxiliary_loss"] for row in rows_of(tmp_path / "a" / "run") if "train/loss" in row]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["teacher=null", "objective.name=sft", ADVANTAGE], "vision.advantage asks the teacher"),
        (["teacher=null", "objective.name=sft", POSITION_KL], "vision.position_kl asks the teacher"),
        (["objective.name=dpkd", ADVANTAGE], "no effect of vision.advantage with objective 'dpkd'"),
        (["vision.advantage={kappa: 0}"], "greater than 0"),
        (["vision.position_kl={weight: 1, matching: best}"], "'grid' or 'hungarian'"),
    ],
)
def test_what_cannot_be(tmp_path, overrides, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        vlm_config(tmp_path, tmp_path / "t", tmp_path / "s", *overrides)


def test_terms_need_the_teacher_in_memory(tmp_path, models):
    from vlm_distill.additions import vision_additions

    run = vlm_run(vlm_config(tmp_path, *models, ADVANTAGE))
    run.execute("generate")
    assert isinstance(run.session.trainee.teacher, LocalTeacher)
    run.session.trainee.teacher = object()
    with pytest.raises(UserError, match=r"vision.advantage needs the teacher itself in memory"):
        vision_additions(run.session)
