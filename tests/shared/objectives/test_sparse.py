from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from objective_references import DIVERGENCE_CASES, DIVERGENCE_IDS, Batch, random_batch, reference_nats
from shared.objectives.core import ObjectiveOutput, objective_loss, row_nats
from shared.objectives.fused import fused_divergence
from shared.objectives.head import Head
from shared.objectives.objective import OBJECTIVES, build_objective
from shared.objectives.plan import RowKind, RowPlan
from shared.objectives.signal import Dense, Sparse, sparse_signal
from shared.objectives.sparse import merged_outcomes

V = 19
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "width and excluded": {"width": 13, "excluded_ids": torch.tensor([0, 7, 12])},
}
TEACHER_OBJECTIVES = [name for name in OBJECTIVES if build_objective(name, {}).needs_teacher]


def alphas(gap_R: Tensor, cell_R: Tensor) -> Tensor:
    return 0.3 + 0.05 * cell_R + 0.2 * torch.tanh(4 * gap_R)


def sparse_of(batch: Batch, top_k: int, **options: Any) -> Sparse:
    dense = Dense(batch.teacher_hidden_NE, batch.teacher_head)
    return sparse_signal(dense, batch.rows.targets_N, top_k=top_k, **options)


def loss_of(batch: Batch, signal: Any, name: str, **options: Any) -> tuple[ObjectiveOutput, list[Tensor]]:
    hidden_ND = batch.student_hidden_ND.clone().requires_grad_()
    head = batch.student_head._replace(weight_VD=batch.student_head.weight_VD.clone().requires_grad_())
    settings = {"alphas": alphas, "beta": 0.6, "counts": batch.counts, **options}
    output = objective_loss(build_objective(name, {}), hidden_ND, head, signal, batch.rows, **settings)
    return output, list(torch.autograd.grad(output.loss, [hidden_ND, head.weight_VD]))


def batch_for(name: str, **options: Any) -> Batch:
    return random_batch(sides=build_objective(name, {}).sides, **options)


def kinds_of(name: str, parameters: dict[str, Any]) -> tuple[RowKind, float]:
    kind = f"{name}_detached" if parameters.get("detach_mixture") else name
    return RowKind[kind.upper()], parameters.get("alpha", parameters.get("omega", 0.0))


def plan_for(name: str, parameters: dict[str, Any], rows: int) -> RowPlan:
    kind, parameter = kinds_of(name, parameters)
    ones_N = torch.ones(rows, dtype=torch.float64)
    return RowPlan(torch.full((rows,), int(kind)), parameter * ones_N, ones_N)


@pytest.mark.parametrize("buffer_bytes", [1, None])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("top_k", [1, 5, V])
def test_the_signal_is_the_teachers_distribution_with_its_tail_merged(
    top_k: int, head: str, buffer_bytes: int | None
) -> None:
    batch = batch_for("kd", **HEADS[head])
    sparse = sparse_of(batch, top_k, buffer_bytes=buffer_bytes)
    p_NV = batch.teacher_head.logits(batch.teacher_hidden_NE).softmax(-1)
    targets_N = batch.rows.targets_N
    kept = min(top_k, batch.teacher_head.vocabulary_size)
    assert sparse.ids_NJ.shape == (len(targets_N), kept)
    close = {"rtol": 0.0, "atol": 1e-14}
    torch.testing.assert_close(sparse.log_p_NJ.exp(), p_NV.topk(kept).values, **close)
    torch.testing.assert_close(sparse.target_log_p_N.exp(), p_NV.gather(1, targets_N[:, None])[:, 0], **close)
    named_NV = p_NV.scatter(1, sparse.ids_NJ, 0).scatter(1, targets_N[:, None], 0)
    torch.testing.assert_close(sparse.log_tail_N.exp(), named_NV.sum(-1), **close)
    torch.testing.assert_close(sparse.covered_N, 1 - named_NV.sum(-1), **close)
    torch.testing.assert_close(
        sparse.log_p_NO(targets_N).exp().sum(-1), torch.ones(len(targets_N), dtype=torch.float64)
    )


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", TEACHER_OBJECTIVES)
def test_with_all_ids_kept_it_is_the_dense_signal(name: str, head: str) -> None:
    batch = batch_for(name, **HEADS[head])
    dense = Dense(batch.teacher_hidden_NE, batch.teacher_head)
    for backend in ("fused", "plain"):
        whole, gradients = loss_of(batch, sparse_of(batch, V), name, backend=backend)
        expected, expected_gradients = loss_of(batch, dense, name, backend=backend)
        for ours, theirs in zip(whole, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("buffer_bytes", [1, 40 * V * 8, None])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", [*TEACHER_OBJECTIVES, "seqkd"])
def test_fused_is_plain(name: str, head: str, buffer_bytes: int | None) -> None:
    batch = batch_for(name, **HEADS[head])
    sparse = sparse_of(batch, 4)
    fused, gradients = loss_of(batch, sparse, name, backend="fused", buffer_bytes=buffer_bytes)
    plain, expected = loss_of(batch, sparse, name, backend="plain")
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "parameters"), DIVERGENCE_CASES, ids=DIVERGENCE_IDS)
def test_every_divergence_is_its_definition_over_the_merged_outcomes(
    name: str, parameters: dict[str, Any]
) -> None:
    """Hand-merged: two ids kept, the own token beside them in one row and among them in the other."""
    teacher = torch.tensor([[3.0, 1.0, 0.5, -1.0, 0.0], [0.0, 2.0, -2.0, 1.5, 0.3]], dtype=torch.float64)
    student = torch.tensor([[0.0, 1.5, 0.1, -0.5, 2.0], [1.0, -1.0, 0.4, 2.0, 0.0]], dtype=torch.float64)
    targets_N = torch.tensor([4, 3])
    sparse = sparse_signal(Dense(teacher, Head(torch.eye(5, dtype=torch.float64))), targets_N, top_k=2)
    assert sparse.ids_NJ.tolist() == [[0, 1], [1, 3]]
    merged = []
    for logits in (student, teacher):
        first, second = logits.softmax(-1)
        first = torch.stack([first[0], first[1], first[4], first[2] + first[3]])
        second = torch.stack([second[1], second[3], second[0] + second[2] + second[4]])
        merged.append((first.log(), second.log()))
    expected = torch.stack([reference_nats(name, q, p, **parameters) for q, p in zip(*merged, strict=True)])
    plan = plan_for(name, parameters, 2)
    plain = row_nats(*merged_outcomes(student, sparse, targets_N), plan)
    torch.testing.assert_close(plain, expected, rtol=1e-12, atol=1e-14)
    eye = Head(torch.eye(5, dtype=torch.float64))
    fused = fused_divergence(student, eye, sparse, plan, targets_N=targets_N)
    torch.testing.assert_close(fused.nats_N, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(fused.log_p_N, teacher.log_softmax(-1).gather(1, targets_N[:, None])[:, 0])


@pytest.mark.parametrize(("name", "parameters"), DIVERGENCE_CASES, ids=DIVERGENCE_IDS)
def test_the_plain_gradient_is_the_numerical_one(name: str, parameters: dict[str, Any]) -> None:
    if parameters.get("detach_mixture"):
        pytest.skip("its gradient is not the derivative of its value")
    batch = batch_for("kd", pairs=2, longest=3)
    sparse, targets_N = sparse_of(batch, 3), batch.rows.targets_N
    plan = plan_for(name, parameters, len(targets_N))
    logits_NV = batch.student_head.logits(batch.student_hidden_ND).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: row_nats(*merged_outcomes(x, sparse, targets_N), plan), logits_NV
    )


@pytest.mark.parametrize(("name", "parameters"), DIVERGENCE_CASES, ids=DIVERGENCE_IDS)
def test_it_is_a_lower_bound_that_grows_with_k_and_0_at_p_equal_q(
    name: str, parameters: dict[str, Any]
) -> None:
    batch = batch_for("kd", pairs=8)
    targets_N = batch.rows.targets_N
    plan = plan_for(name, parameters, len(targets_N))
    student = (batch.student_hidden_ND, batch.student_head)
    nats = [
        fused_divergence(*student, sparse_of(batch, k), plan, targets_N=targets_N).nats_N
        for k in (1, 2, 4, 8, V)
    ]
    for smaller, larger in pairwise(nats):
        assert (larger - smaller > -1e-12).all() and (larger > smaller).any()
    itself = sparse_signal(Dense(*student), targets_N, top_k=3)
    same = fused_divergence(*student, itself, plan, targets_N=targets_N).nats_N
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-13)


def test_the_gradient_in_the_tail_only_rescales_it() -> None:
    batch = batch_for("kd")
    sparse, targets_N = sparse_of(batch, 3), batch.rows.targets_N
    logits_NV = batch.student_head.logits(batch.student_hidden_ND).requires_grad_()
    plan = plan_for("skew_kl", {"alpha": 0.1}, len(targets_N))
    eye = Head(torch.eye(V, dtype=torch.float64))
    total = fused_divergence(logits_NV, eye, sparse, plan, targets_N=targets_N).total
    (gradient_NV,) = torch.autograd.grad(total, logits_NV)
    named_NV = torch.zeros_like(gradient_NV, dtype=torch.bool).scatter(1, sparse.ids_NJ, True)
    named_NV.scatter_(1, targets_N[:, None], True)
    for gradient_V, q_V, named_V in zip(gradient_NV, logits_NV.softmax(-1), named_NV, strict=True):
        share = (gradient_V / q_V)[~named_V]
        torch.testing.assert_close(share, share[:1].expand_as(share), rtol=1e-9, atol=1e-12)
        assert abs(float(gradient_V.sum())) < 1e-12


@pytest.mark.parametrize("kind", [kind for kind in RowKind if kind is not RowKind.NLL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(kind: RowKind, dtype: torch.dtype) -> None:
    """A tail, kept ids and whole rows whose probability is 0 in one model or the other."""
    teacher = torch.tensor([[1e4, -1e4, 0, 0], [0, 0, 0, -1e4], [0, 0, 0, 0]], dtype=dtype)
    student = torch.tensor([[-1e4, 1e4, 0, 0], [1e4, -1e4, 0, 0], [1e4, 0, 0, -1e4]], dtype=dtype)
    student.requires_grad_()
    head, targets_N = Head(torch.eye(4, dtype=dtype)), torch.tensor([0, 1, 3])
    plan = RowPlan(
        torch.full((3,), int(kind)), torch.full((3,), 0.1, dtype=dtype), torch.ones(3, dtype=dtype)
    )
    for top_k in (1, 2, 4):
        sparse = sparse_signal(Dense(teacher, head), targets_N, top_k=top_k)
        output = fused_divergence(student, head, sparse, plan, targets_N=targets_N)
        expected = row_nats(*merged_outcomes(student, sparse, targets_N), plan)
        torch.testing.assert_close(output.nats_N, expected.detach(), rtol=1e-6, atol=1e-6)
        (ours,) = torch.autograd.grad(output.total, student)
        (theirs,) = torch.autograd.grad(expected.sum(), student)
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_low_precision_students_and_empty_batches() -> None:
    batch = batch_for("distillm2", dtype=torch.float32)
    sparse = sparse_of(batch, 4)
    exact, _ = loss_of(batch, sparse, "distillm2")
    low = batch._replace(
        student_hidden_ND=batch.student_hidden_ND.bfloat16(),
        student_head=Head(batch.student_head.weight_VD.bfloat16()),
    )
    rounded, gradients = loss_of(low, sparse, "distillm2")
    plain, expected = loss_of(low, sparse, "distillm2", backend="plain")
    torch.testing.assert_close(rounded.loss, plain.loss)
    assert abs(rounded.loss - exact.loss) < 0.02
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-6)
    empty = batch.of_pairs([])
    output, gradients = loss_of(empty, sparse_of(empty, 4), "distillm2", counts=batch.counts)
    assert output.loss == 0 and all((gradient == 0).all() for gradient in gradients)


def test_a_broken_student_shows_in_the_loss() -> None:
    batch = batch_for("distillm2")
    batch.student_hidden_ND[3, 0] = float("nan")
    assert loss_of(batch, sparse_of(batch, 4), "distillm2")[0].loss.isnan()
