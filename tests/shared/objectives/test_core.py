from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from objective_references import Batch, random_batch, reference_nats
from shared.errors import AlignmentError, UserError
from shared.objectives.core import ObjectiveOutput, objective_loss
from shared.objectives.curriculum import AlphaCurriculum
from shared.objectives.objective import OBJECTIVES, SIDES, build_objective

PARAMETERS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in OBJECTIVES),
    ("gkd", {"phi": 0.3, "omega": 0.9}),
    ("distillm", {"phi": 0.3, "alpha": 0.2, "divergence": "skew_reverse_kl"}),
    ("dpkd", {"lam": 0.7}),
    ("distillm2", {"detach_mixture": True}),
]
each_objective = pytest.mark.parametrize(
    ("name", "parameters"), PARAMETERS, ids=[f"{name} {list(p.values())}" for name, p in PARAMETERS]
)
each_normalization = pytest.mark.parametrize("normalization", ["response", "token"])


def grading_alphas(gap_R: Tensor, cell_R: Tensor) -> Tensor:
    return 0.3 + 0.05 * cell_R + 0.2 * torch.tanh(4 * gap_R)


BACKEND: dict[str, Any] = {}


@pytest.fixture(params=["plain", "fused", "fused, a row at a time"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test here holds for each backend."""
    name, _, chunked = request.param.partition(",")
    monkeypatch.setitem(BACKEND, "backend", name)
    if chunked:
        monkeypatch.setattr("shared.objectives.chunks.CPU_BUFFER_BYTES", 1)


def loss_of(
    batch: Batch, name: str, parameters: dict[str, Any] | None = None, **options: Any
) -> ObjectiveOutput:
    settings: dict[str, Any] = {
        "alphas": grading_alphas,
        "beta": 0.6,
        "counts": batch.counts,
        "normalization": "response",
        **BACKEND,
        **options,
    }
    return objective_loss(build_objective(name, parameters or {}), *batch.arguments, **settings)


def batch_for(name: str, **options: Any) -> Batch:
    return random_batch(sides=build_objective(name, {}).sides, **options)


def reference_loss(
    batch: Batch, name: str, parameters: dict[str, Any], *, beta: float, normalization: str
) -> Tensor:
    """Every objective spelt out pair by pair, from full logits."""
    q_logits = batch.student_hidden_ND @ batch.student_head.weight_VD.T
    p_logits = batch.teacher_hidden_NE @ batch.teacher_head.weight_VD.T
    targets = batch.rows.targets_N
    pairs = batch.rows.pair_R.unique()
    phi, omega = parameters.get("phi", 0.5), parameters.get("omega", 0.5)
    total = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        sums = {}
        for response in (batch.rows.pair_R == pair).nonzero().flatten():
            side = SIDES[batch.rows.side_R[response]]
            rows = (batch.rows.response_N == response).nonzero().flatten()
            q, p, y = q_logits[rows], p_logits[rows], targets[rows]
            log_q = q.log_softmax(-1)[range(len(y)), y]
            log_p = p.log_softmax(-1)[range(len(y)), y]
            sums[side] = (log_q - log_p).sum()
            gap = (log_p.mean().exp() - log_q.mean().exp()) * (-1 if side == "student" else 1)
            alpha = grading_alphas(gap.detach(), batch.rows.cell_R[response])
            match name, side:
                case (("sft" | "seqkd"), _):
                    nats, weight = -log_q, 1.0
                case (("kd" | "imitkd"), _):
                    nats, weight = reference_nats("kl", q, p), 1.0
                case "gkd", _:
                    nats = reference_nats("jsd", q, p, omega=omega)
                    weight = phi if side == "student" else 1 - phi
                case "distillm", _:
                    divergence = parameters.get("divergence", "skew_kl")
                    nats = reference_nats(divergence, q, p, alpha=parameters.get("alpha", 0.1))
                    weight = phi if side == "student" else 1 - phi
                case "distillm2", "teacher":
                    nats, weight = reference_nats("skew_kl", q, p, alpha=alpha), 1 - beta
                case "distillm2", "student":
                    detach = parameters.get("detach_mixture", False)
                    nats = reference_nats("skew_reverse_kl", q, p, alpha=alpha, detach_mixture=detach)
                    weight = beta
                case _:
                    continue
            if normalization == "response":
                total = total + weight * nats.mean() / len(pairs)
            else:
                side_N = batch.rows.side_R[batch.rows.response_N]
                total = total + weight * nats.sum() / (side_N == SIDES.index(side)).sum()
        if name == "dpkd":
            margin = parameters.get("lam", 0.1) * (sums["teacher"] - sums["student"])
            total = total - torch.log(torch.sigmoid(margin)) / len(pairs)
    return total


def with_gradients(batch: Batch) -> tuple[Batch, list[Tensor]]:
    hidden = batch.student_hidden_ND.detach().requires_grad_()
    weight = batch.student_head.weight_VD.detach().requires_grad_()
    batch = batch._replace(
        student_hidden_ND=hidden, student_head=batch.student_head._replace(weight_VD=weight)
    )
    return batch, [hidden, weight]


@each_normalization
@each_objective
def test_loss_and_gradients_are_the_definition_s(
    name: str, parameters: dict[str, Any], normalization: str
) -> None:
    batch, leaves = with_gradients(batch_for(name))
    loss = loss_of(batch, name, parameters, normalization=normalization).loss
    expected = reference_loss(batch, name, parameters, beta=0.6, normalization=normalization)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
        assert ours.abs().max() > 1e-4


@each_normalization
@each_objective
def test_any_split_into_micro_batches_sums_to_the_batch(
    name: str, parameters: dict[str, Any], normalization: str
) -> None:
    batch, leaves = with_gradients(batch_for(name, pairs=5))
    whole = loss_of(batch, name, parameters, normalization=normalization).loss
    expected = torch.autograd.grad(whole, leaves)
    for split in ([[0], [1], [2], [3], [4]], [[4, 2], [], [0, 3, 1]]):
        parts = [
            loss_of(
                batch.of_pairs(p), name, parameters, normalization=normalization, counts=batch.counts
            ).loss
            for p in split
        ]
        total = torch.stack(parts).sum()
        torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)
        for ours, theirs in zip(torch.autograd.grad(total, leaves), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@each_objective
def test_no_rows_give_zero_that_backpropagates(name: str, parameters: dict[str, Any]) -> None:
    batch, leaves = with_gradients(batch_for(name))
    output = loss_of(batch.of_pairs([]), name, parameters, counts=batch.counts)
    assert output.loss.item() == 0.0 and output.nats_N.shape == (0,)
    output.loss.backward()
    for leaf in leaves:
        assert leaf.grad is not None and (leaf.grad == 0).all()


@each_objective
def test_only_the_student_gets_a_gradient(name: str, parameters: dict[str, Any]) -> None:
    batch, _ = with_gradients(batch_for(name))
    batch = batch._replace(
        teacher_hidden_NE=batch.teacher_hidden_NE.requires_grad_(),
        teacher_head=batch.teacher_head._replace(weight_VD=batch.teacher_head.weight_VD.requires_grad_()),
    )
    output = loss_of(batch, name, parameters)
    output.loss.backward()
    assert batch.teacher_hidden_NE.grad is None and batch.teacher_head.weight_VD.grad is None
    reports = (output.nats_N, output.log_p_N, output.log_q_N, output.gap_R, output.alpha_R)
    assert not any(report.requires_grad for report in reports if report is not None)


def test_fixed_halves_are_the_paper_s_contrastive_loss() -> None:
    batch = batch_for("distillm2")
    fixed = AlphaCurriculum(schedule="fixed", start=0.1)
    loss = loss_of(batch, "distillm2", alphas=fixed.alphas, beta=0.5).loss
    q = batch.student_head.logits(batch.student_hidden_ND)
    p = batch.teacher_head.logits(batch.teacher_hidden_NE)
    sides = {"teacher": "skew_kl", "student": "skew_reverse_kl"}
    means = [
        reference_nats(sides[SIDES[side]], q[rows], p[rows], alpha=0.1).mean()
        for response, side in enumerate(batch.rows.side_R)
        if len(rows := (batch.rows.response_N == response).nonzero().flatten())
    ]
    cald = torch.stack(means).sum() / (2 * batch.counts.pairs)
    torch.testing.assert_close(loss, cald, rtol=1e-12, atol=0)


def test_gaps_are_mean_probabilities_of_the_writer_s_side() -> None:
    batch = batch_for("distillm2")
    seen: list[Tensor] = []

    def alphas(gap_R: Tensor, cell_R: Tensor) -> Tensor:
        seen.extend([gap_R, cell_R])
        return torch.full_like(gap_R, 0.1)

    output = loss_of(batch, "distillm2", alphas=alphas)
    assert output.log_p_N is not None and output.gap_R is not None and output.alpha_R is not None
    for response, side in enumerate(batch.rows.side_R.tolist()):
        rows = batch.rows.response_N == response
        p, q = output.log_p_N[rows].mean().exp(), output.log_q_N[rows].mean().exp()
        expected = p - q if side == 0 else q - p
        torch.testing.assert_close(output.gap_R[response], expected)
    assert torch.equal(seen[-2], output.gap_R) and torch.equal(seen[-1], batch.rows.cell_R)
    logits = batch.student_head.logits(batch.student_hidden_ND).log_softmax(-1)
    torch.testing.assert_close(
        output.log_q_N, logits.gather(1, batch.rows.targets_N[:, None]).squeeze(1), rtol=0, atol=1e-13
    )


def test_the_curriculum_reaches_the_loss() -> None:
    batch = batch_for("distillm2")
    curriculum = AlphaCurriculum(maximum=0.3)
    first = loss_of(batch, "distillm2", alphas=curriculum.alphas)
    assert first.gap_R is not None
    sums = torch.zeros(3, dtype=torch.float64).index_add(0, batch.rows.cell_R, first.gap_R)
    curriculum.observe(sums.abs() / 2 + 0.01, torch.bincount(batch.rows.cell_R, minlength=3))
    curriculum.end_round()
    second = loss_of(batch, "distillm2", alphas=curriculum.alphas)
    assert first.alpha_R is not None and second.alpha_R is not None
    assert (first.alpha_R == 0.1).all()
    assert second.alpha_R.min() == 0.01 and second.alpha_R.max() > 0.2
    assert second.loss != first.loss


@pytest.mark.parametrize("name", ["sft", "seqkd"])
def test_without_a_teacher(name: str) -> None:
    batch = batch_for(name)
    objective = build_objective(name, {})
    output = objective_loss(
        objective,
        batch.student_hidden_ND,
        batch.student_head,
        None,
        batch.rows,
        alphas=None,
        beta=0.5,
        counts=batch.counts,
        **BACKEND,
    )
    assert output.log_p_N is None and output.gap_R is None and output.alpha_R is None
    torch.testing.assert_close(output.loss, loss_of(batch, name).loss)


@each_normalization
def test_row_weights_multiply_rows_before_the_mean(normalization: str) -> None:
    batch = batch_for("distillm2")
    weights = torch.rand(len(batch.rows.targets_N), dtype=torch.float64) + 0.5
    plain = loss_of(batch, "distillm2", normalization=normalization)
    ones = torch.ones_like(weights)
    assert loss_of(batch, "distillm2", normalization=normalization, row_weights_N=ones).loss == plain.loss
    weighted = loss_of(batch, "distillm2", normalization=normalization, row_weights_N=weights)
    side_N = batch.rows.side_R[batch.rows.response_N]
    share_N = torch.tensor([0.4, 0.6], dtype=torch.float64)[side_N]
    if normalization == "response":
        share_N = share_N / torch.bincount(batch.rows.response_N)[batch.rows.response_N] / batch.counts.pairs
    else:
        share_N = share_N / torch.tensor(batch.counts.rows_S, dtype=torch.float64)[side_N]
    torch.testing.assert_close(weighted.loss, (weights * share_N * weighted.nats_N).sum())
    with pytest.raises(UserError, match="row weights cannot take effect in 'dpkd'"):
        loss_of(batch, "dpkd", row_weights_N=weights)


def test_heads_with_a_shared_width_and_excluded_ids() -> None:
    """A padded vocabulary with a placeholder gives the loss of the models without those rows."""
    excluded = torch.tensor([2, 9])
    padded = batch_for("distillm2", width=13, excluded_ids=excluded)
    kept = torch.tensor([i for i in range(13) if i not in excluded.tolist()])
    compact = padded._replace(
        student_head=padded.student_head._replace(
            weight_VD=padded.student_head.weight_VD[kept], width=None, excluded_ids=None
        ),
        teacher_head=padded.teacher_head._replace(
            weight_VD=padded.teacher_head.weight_VD[kept], width=None, excluded_ids=None
        ),
        rows=padded.rows._replace(targets_N=torch.searchsorted(kept, padded.rows.targets_N)),
    )
    torch.testing.assert_close(loss_of(padded, "distillm2").loss, loss_of(compact, "distillm2").loss)
    foreign = padded._replace(rows=padded.rows._replace(targets_N=padded.rows.targets_N.clone().fill_(9)))
    with pytest.raises(AlignmentError, match="token id 9 is not in the shared vocabulary"):
        loss_of(foreign, "distillm2")


@each_objective
def test_extreme_logits_stay_finite(name: str, parameters: dict[str, Any]) -> None:
    batch, leaves = with_gradients(batch_for(name, dtype=torch.float32, scale=1e4))
    output = loss_of(batch, name, parameters)
    output.loss.backward()
    assert torch.isfinite(output.loss) and torch.isfinite(output.nats_N).all()
    for leaf in leaves:
        assert leaf.grad is not None and torch.isfinite(leaf.grad).all()


@each_objective
def test_bfloat16_models_are_measured_in_float32(name: str, parameters: dict[str, Any]) -> None:
    batch, leaves = with_gradients(batch_for(name, dtype=torch.bfloat16))
    loss = loss_of(batch, name, parameters).loss
    exact = batch._replace(
        student_hidden_ND=batch.student_hidden_ND.double(),
        student_head=batch.student_head._replace(weight_VD=batch.student_head.weight_VD.double()),
        teacher_hidden_NE=batch.teacher_hidden_NE.double(),
        teacher_head=batch.teacher_head._replace(weight_VD=batch.teacher_head.weight_VD.double()),
    )
    expected = loss_of(exact, name, parameters).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    for ours, theirs in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        assert ours.dtype == torch.bfloat16  # the only rounding: the gradient itself, to the leaf's own type
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-5)


def test_a_pair_torn_apart_is_our_own_bug() -> None:
    batch = batch_for("dpkd")
    torn = batch._replace(rows=batch.rows._replace(pair_R=torch.arange(len(batch.rows.pair_R))))
    with pytest.raises(AssertionError, match="one response of either side"):
        loss_of(torn, "dpkd")
