"""Every side of every task has its own term, proportions keep a mean of 1, and idle entries are refused."""

import pytest
import torch

from objective_references import random_batch
from shared.errors import UserError
from shared.objectives.core import objective_loss
from shared.objectives.coupling import Coupling, cell_weights, couple
from shared.objectives.objective import Term, Weight, build_objective

DISTILLM2 = build_objective("distillm2", {})
TASKS = ["code", "vqa"]


def test_an_empty_table_is_the_objective_itself():
    assert couple(DISTILLM2, TASKS, {}) is DISTILLM2


def test_entries_change_their_own_cell():
    table = {("vqa", "teacher"): Coupling("kl", weight=3.0), ("code", "student"): Coupling(alpha=0.3)}
    teacher, student = DISTILLM2.terms["teacher"], DISTILLM2.terms["student"]
    assert couple(DISTILLM2, TASKS, table).terms_C == (
        teacher, Term("kl", Weight(1.0, -1.0)), student._replace(parameter=0.3), student, None, None
    )  # fmt: skip
    swapped = couple(DISTILLM2, ["vqa"], {("vqa", "teacher"): Coupling("skew_reverse_kl")}).terms_C
    assert swapped[0].alpha_from_curriculum and swapped[0].divergence == "skew_reverse_kl"


def test_what_is_needed_follows_the_cells():
    everywhere = {(task, side): Coupling("nll") for task in TASKS for side in ("teacher", "student")}
    plain = couple(DISTILLM2, TASKS, everywhere)
    assert not plain.needs_teacher and not plain.uses_alpha_curriculum and plain.uses_beta
    del everywhere["code", "student"]
    assert couple(DISTILLM2, TASKS, everywhere).uses_alpha_curriculum


def test_the_mean_over_each_side_stays_1():
    # three code to one vqa of the teacher; of the student vqa alone
    weights = cell_weights([1, 3, 5, 2, 1, 1], [3, 1, 0, 4, 0, 0])
    assert weights == pytest.approx([1 / 1.5, 2, 2.5, 1, 1, 1])
    assert cell_weights([7, 7, 2, 2, 1, 1], [3, 1, 5, 9, 0, 0]) == pytest.approx([1] * 6)


@pytest.mark.parametrize("backend", ["fused", "plain"])
@pytest.mark.parametrize("normalization", ["response", "token"])
def test_the_loss_is_that_of_each_task_by_itself(backend, normalization):
    batch = random_batch(pairs=4, seed=3)
    task_P = torch.tensor([0, 1, 1, 0])
    rows = batch.rows._replace(cell_R=batch.rows.side_R * 2 + task_P[batch.rows.pair_R])
    batch = batch._replace(rows=rows)
    table = {("vqa", "teacher"): Coupling("tvd"), ("vqa", "student"): Coupling("kl")}

    def loss(objective, pairs, backend):
        some = batch.of_pairs(pairs)
        hidden_ND = some.student_hidden_ND.requires_grad_()
        output = objective_loss(
            objective, hidden_ND, *some.arguments[1:], alphas=lambda gap_R, _: torch.full_like(gap_R, 0.1),
            beta=0.3, counts=batch.counts, normalization=normalization, backend=backend,
        )  # fmt: skip
        output.loss.backward()
        return output.loss.detach(), hidden_ND.grad

    # for code the objective itself, for vqa another one with the same weights of the sides
    other = build_objective("distillm2", {})
    terms = zip(other.terms.items(), ("tvd", "kl"), strict=True)
    other = type(other)("", {s: t._replace(divergence=d, alpha_from_curriculum=False) for (s, t), d in terms})
    whole, gradient = loss(couple(DISTILLM2, TASKS, table), [0, 3, 1, 2], backend)
    code, vqa = loss(DISTILLM2, [0, 3], "plain"), loss(other, [1, 2], "plain")
    torch.testing.assert_close(whole, code[0] + vqa[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, torch.cat([code[1], vqa[1]]), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "cell", "entry", "said"),
    [
        ("distillm2", ("math", "teacher"), {}, "unknown task of the coupling 'math'"),
        ("distillm2", ("code", "reference"), {}, "has no effect on the reference's responses"),
        ("kd", ("code", "student"), {}, "'kd' does not train on; it has teacher"),
        ("distillm2", ("code", "teacher"), {"divergence": "skew_lk"}, "Did you mean 'skew_kl'"),
        ("distillm2", ("code", "teacher"), {"weight": 0}, "weight above 0"),
        ("distillm2", ("code", "teacher"), {"alpha": 1.0}, r"alpha in \[0, 1\)"),
        ("kd", ("code", "teacher"), {"alpha": 0.1}, "alpha has no effect but on a skewed divergence"),
        ("kd", ("code", "teacher"), {"divergence": "skew_kl"}, "skew_kl needs an alpha, as 'kd' has none"),
        ("dpkd", ("code", "teacher"), {}, "no coupling in 'dpkd'"),
    ],
)
def test_entries_that_cannot_take_effect(name, cell, entry, said):
    with pytest.raises(UserError, match=said):
        couple(build_objective(name, {}), TASKS, {cell: Coupling(**entry)})


def test_a_weight_needs_another_task():
    with pytest.raises(UserError, match="weight has no effect with code alone"):
        couple(DISTILLM2, ["code"], {("code", "teacher"): Coupling(weight=2.0)})
