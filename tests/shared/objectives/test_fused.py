from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from objective_references import Batch, random_batch
from shared.objectives import fused
from shared.objectives.core import ObjectiveOutput, objective_loss, row_nats
from shared.objectives.fused import RowPlanner, fused_divergence
from shared.objectives.head import Head
from shared.objectives.kernels import TORCH
from shared.objectives.objective import OBJECTIVES, build_objective
from shared.objectives.plan import RowKind, RowPlan
from shared.objectives.signal import Dense

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # a buffer resized by mistake only warns

TINY = 1  # bytes of buffer: chunks of one row
ROW = 19 * 4  # bytes of a row of float32 logits of the default random batch
CHUNKS = {"one row": TINY, "a few rows": 40 * ROW, "all": None}

OBJECTIVE_CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in OBJECTIVES),
    ("distillm", {"divergence": "skew_reverse_kl"}),
    ("distillm2", {"detach_mixture": True}),
]
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale and bias": {"logit_scale": 0.3, "bias_V": torch.linspace(-2, 2, 19)},
    "softcap": {"softcap": 1.5},
    "width and excluded": {"width": 13, "excluded_ids": torch.tensor([0, 7, 12])},
    "all": {
        "logit_scale": 1.7,
        "bias_V": torch.linspace(-2, 2, 19),
        "softcap": 3.0,
        "width": 16,
        "excluded_ids": torch.tensor([3]),
    },
}


def grading_alphas(gap_R: Tensor, cell_R: Tensor) -> Tensor:
    return 0.3 + 0.05 * cell_R + 0.2 * torch.tanh(4 * gap_R)


def batch_for(name: str, **options: Any) -> Batch:
    return random_batch(**{"sides": build_objective(name, {}).sides, "dtype": torch.float32, **options})


def trainable(batch: Batch, *, hidden: bool = True, weight: bool = True, bias: bool = True) -> Batch:
    """A copy with leaves of its own."""
    head = batch.student_head
    return batch._replace(
        student_hidden_ND=batch.student_hidden_ND.clone().requires_grad_(hidden),
        student_head=head._replace(
            weight_VD=head.weight_VD.clone().requires_grad_(weight),
            bias_V=None if head.bias_V is None else head.bias_V.clone().requires_grad_(bias),
        ),
    )


def gradients(batch: Batch) -> list[Tensor | None]:
    leaves = (batch.student_hidden_ND, batch.student_head.weight_VD, batch.student_head.bias_V)
    return [None if leaf is None else leaf.grad for leaf in leaves]


def loss_of(
    batch: Batch, name: str, parameters: dict[str, Any] | None = None, **options: Any
) -> ObjectiveOutput:
    settings = {"alphas": grading_alphas, "beta": 0.6, "counts": batch.counts, **options}
    return objective_loss(build_objective(name, parameters or {}), *batch.arguments, **settings)


def assert_same(batch: Batch, name: str, parameters: dict[str, Any] | None = None, **options: Any) -> None:
    """Fused against plain, with everything that they return and every gradient."""
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    plain_batch, fused_batch = trainable(batch), trainable(batch)
    buffer_bytes = options.pop("buffer_bytes", None)
    with torch.autocast("cpu", torch.bfloat16, enabled=options.pop("autocast", False)):
        plain = loss_of(plain_batch, name, parameters, backend="plain", **options)
        fused = loss_of(fused_batch, name, parameters, backend="fused", buffer_bytes=buffer_bytes, **options)
    for field, ours, theirs in zip(plain._fields, fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance, msg=lambda m, field=field: f"{field}: {m}")
    plain.loss.backward()
    fused.loss.backward()
    for ours, theirs in zip(gradients(fused_batch), gradients(plain_batch), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.dtype == theirs.dtype and theirs.abs().max() > 1e-4
            if ours.dtype in (torch.bfloat16, torch.float16):  # rounded at the end, maybe to the neighbour
                torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-6)
            else:
                torch.testing.assert_close(ours, theirs, **tolerance)


class Watch(TorchDispatchMode):
    """Counts operations, and the elements of the largest tensor that any of them returned."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *(leaf.untyped_storage().nbytes() for leaf in made)])
        return result


@contextmanager
def watching() -> Iterator[Watch]:
    with Watch() as watch:
        yield watch


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("normalization", ["response", "token"])
@pytest.mark.parametrize(
    ("name", "parameters"), OBJECTIVE_CASES, ids=[f"{n} {[*p.values()]}" for n, p in OBJECTIVE_CASES]
)
def test_every_objective_is_the_plain_one(
    name: str, parameters: dict[str, Any], normalization: str, chunks: str
) -> None:
    assert_same(batch_for(name), name, parameters, normalization=normalization, buffer_bytes=CHUNKS[chunks])


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["kd", "distillm2", "dpkd"])
def test_every_head_is_the_plain_one(name: str, head: str, chunks: str) -> None:
    assert_same(batch_for(name, **HEADS[head]), name, buffer_bytes=CHUNKS[chunks])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["distillm2", "gkd", "sft"])
def test_every_type_is_the_plain_one(
    name: str, hidden_dtype: torch.dtype, weight_dtype: torch.dtype, autocast: bool, monkeypatch: Any
) -> None:
    monkeypatch.setattr(
        "shared.objectives.projection.WEIGHT_BLOCK_BYTES", 7 * 6 * 4
    )  # blocks of 7 ids, and a rest
    batch = batch_for(name, **HEADS["all"])
    batch = batch._replace(
        student_hidden_ND=batch.student_hidden_ND.to(hidden_dtype),
        student_head=batch.student_head._replace(
            weight_VD=batch.student_head.weight_VD.to(weight_dtype),
            bias_V=torch.linspace(-2, 2, 19).to(weight_dtype),
        ),
        teacher_hidden_NE=batch.teacher_hidden_NE.to(torch.bfloat16),
        teacher_head=batch.teacher_head._replace(weight_VD=batch.teacher_head.weight_VD.to(torch.bfloat16)),
    )
    assert_same(batch, name, buffer_bytes=CHUNKS["a few rows"], autocast=autocast)


@pytest.mark.parametrize("vocabulary", [1, 2, 31, 1000])
@pytest.mark.parametrize("longest", [1, 40])
def test_odd_shapes(vocabulary: int, longest: int) -> None:
    batch = batch_for("distillm2", vocabulary=vocabulary, longest=longest, student_width=1, teacher_width=3)
    if vocabulary > 1:
        assert_same(batch, "distillm2", buffer_bytes=10 * vocabulary * 4)
    else:
        assert loss_of(batch, "distillm2").loss.abs() < 1e-6  # one word: nothing to say


def test_row_weights_and_interleaved_pairs() -> None:
    batch = batch_for("dpkd")
    interleaved = batch._replace(rows=batch.rows._replace(pair_R=torch.tensor([0, 1, 1, 0, 2, 3, 3, 2])))
    assert_same(interleaved, "dpkd", buffer_bytes=CHUNKS["a few rows"])
    weights_N = torch.rand(len(batch.rows.targets_N)) + 0.5
    assert_same(batch, "distillm2", row_weights_N=weights_N, buffer_bytes=CHUNKS["a few rows"])


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("name", ["distillm2", "kd", "seqkd"])
def test_row_weights_may_depend_on_the_whole_response(name: str, chunks: str) -> None:
    """As a softmax over a response's rows does, here of their gaps."""
    batch = batch_for(name)

    def weigh(start: int, stop: int, log_p_C: Tensor | None, log_q_C: Tensor) -> Tensor:
        assert log_p_C is not None and len(log_p_C) == len(log_q_C) == stop - start
        response_C = batch.rows.response_N[start:stop]
        weight_C = torch.ones_like(log_q_C)
        for response in response_C.unique():
            mine_C = response_C == response
            weight_C[mine_C] = (log_p_C - log_q_C)[mine_C].softmax(0) * mine_C.sum()
        return weight_C

    assert_same(batch, name, row_weigher=weigh, buffer_bytes=CHUNKS[chunks])
    weighed = loss_of(batch, name, row_weigher=weigh, buffer_bytes=TINY)
    assert weighed.log_p_N is not None
    weights_N = weigh(0, len(weighed.log_q_N), weighed.log_p_N, weighed.log_q_N)
    assert weights_N.std() > 0.1
    known = loss_of(batch, name, row_weights_N=weights_N)
    torch.testing.assert_close(weighed.loss, known.loss)
    assert not torch.isclose(weighed.loss, loss_of(batch, name).loss)
    both = loss_of(batch, name, row_weigher=weigh, row_weights_N=weights_N)
    torch.testing.assert_close(both.loss, loss_of(batch, name, row_weights_N=weights_N.square()).loss)


@pytest.mark.parametrize("backend", ["fused", "plain"])
def test_no_row_is_weighed_twice(backend: str) -> None:
    """Neither for the log: of a whole micro-batch, weighing costs more than small products."""
    batch, spans = batch_for("distillm2"), []

    def weigh(start: int, stop: int, log_p_C: Tensor | None, log_q_C: Tensor) -> Tensor:
        spans.append(range(start, stop))
        return torch.ones_like(log_q_C)

    loss_of(batch, "distillm2", row_weigher=weigh, backend=backend, buffer_bytes=CHUNKS["a few rows"])
    assert [row for span in spans for row in span] == list(range(len(batch.rows.targets_N)))


@pytest.mark.parametrize("planned_late", [False, True])
def test_every_row_may_have_its_own_kind_and_parameter(planned_late: bool) -> None:
    batch = trainable(batch_for("distillm2", pairs=30, seed=3, dtype=torch.float64))
    rows = len(batch.rows.targets_N)
    generator = torch.Generator().manual_seed(0)
    parameter_N = torch.rand(rows, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    plan = RowPlan(
        torch.randint(len(RowKind), (rows,), generator=generator),
        torch.where(torch.arange(rows) % 5 == 0, 0.0, parameter_N),  # no skew in every fifth
        torch.randn(rows, generator=generator, dtype=torch.float64),
    )
    plan.parameter_N[plan.kind_N == RowKind.JSD] = 0.3
    # a plan that is known late, and names other kinds than were announced
    planner = RowPlanner(
        range(rows),
        lambda start, stop, *_: RowPlan(*(column_N[start:stop] for column_N in plan)),
        frozenset({RowKind.SKEW_KL}),
    )
    ours = fused_divergence(
        *batch.arguments[:3],
        planner if planned_late else plan,
        targets_N=batch.rows.targets_N,
        buffer_bytes=40 * 19 * 8,
    )
    reference = row_nats(
        batch.student_head.logits(batch.student_hidden_ND),
        batch.teacher_head.logits(batch.teacher_hidden_NE),
        batch.rows.targets_N,
        plan,
    )
    torch.testing.assert_close(ours.nats_N, reference.detach(), rtol=1e-12, atol=1e-12)
    leaves = [batch.student_hidden_ND, batch.student_head.weight_VD]
    found = torch.autograd.grad(ours.total, leaves)
    expected = torch.autograd.grad((plan.weight_N * reference).sum(), leaves)
    for gradient, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("alpha_needs_gap", [False, True])
def test_one_exponential_serves_normaliser_and_divergence(
    alpha_needs_gap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    exponentials = []
    for kernels in (TORCH, TORCH._replace(normalises=False)):
        monkeypatch.setattr(fused, "kernels_for", lambda device, kernels=kernels: kernels)
        with watching() as watch:
            loss_of(batch_for("distillm2"), "distillm2", alpha_needs_gap=alpha_needs_gap)
        exponentials.append(watch.calls["exp_"])
    assert 0 < 2 * exponentials[0] <= exponentials[1]


@pytest.mark.parametrize("kind", RowKind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(kind: RowKind, dtype: torch.dtype) -> None:
    """Identity heads, so that the hidden states are the logits."""
    teacher = torch.tensor([[1e4, -1e4, 0, 0], [1e4, -1e4, 0, 0], [0, 0, 0, 0]], dtype=dtype)
    student = torch.tensor([[-1e4, 1e4, 0, 0], [1e4, -1e4, 0, 0], [1e4, 0, 0, -1e4]], dtype=dtype)
    student.requires_grad_()
    head = Head(torch.eye(4, dtype=dtype))
    plan = RowPlan(
        torch.full((3,), int(kind)), torch.full((3,), 0.1, dtype=dtype), torch.ones(3, dtype=dtype)
    )
    targets = torch.tensor([0, 1, 3])
    output = fused_divergence(student, head, Dense(teacher, head), plan, targets_N=targets)
    expected = row_nats(student, teacher, targets, plan)
    torch.testing.assert_close(output.nats_N, expected.detach(), rtol=1e-6, atol=1e-6)
    (ours,) = torch.autograd.grad(output.total, student)
    (theirs,) = torch.autograd.grad(expected.sum(), student)
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_rows_give_zero_that_backpropagates(name: str) -> None:
    batch = batch_for(name, **HEADS["all"])
    empty = trainable(batch.of_pairs([]))
    output = loss_of(empty, name, counts=batch.counts)
    assert output.loss.item() == 0
    output.loss.backward()
    assert all(grad is not None and (grad == 0).all() for grad in gradients(empty))


def test_ids_outside_the_shared_vocabulary_get_exactly_no_gradient() -> None:
    batch = trainable(batch_for("distillm2", **HEADS["width and excluded"]))
    loss_of(batch, "distillm2").loss.backward()
    grad = batch.student_head.weight_VD.grad
    assert grad is not None
    assert (grad[[0, 7, 12, *range(13, 19)]] == 0).all() and (grad[1:7] != 0).all()


@pytest.mark.parametrize("name", ["distillm2", "dpkd", "seqkd"])
def test_a_scaled_loss_scales_the_gradient(name: str) -> None:
    batch = batch_for(name)
    once, scaled = trainable(batch), trainable(batch)
    loss_of(once, name).loss.backward()
    (loss_of(scaled, name).loss * 1024 / 3).backward()
    for ours, theirs in zip(gradients(scaled), gradients(once), strict=True):
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs * 1024 / 3)


def test_it_joins_a_larger_graph_and_accumulates() -> None:
    """Two micro-batches through one backbone and a tied head, added up before one backward."""
    batch = batch_for("distillm2")
    table = torch.randn(19, 6, requires_grad=True)

    def total(backend: str) -> Tensor:
        losses = []
        for pairs in ([0, 1], [2, 3]):
            part = batch.of_pairs(pairs)
            hidden = torch.tanh(table[part.rows.targets_N] + part.student_hidden_ND)
            part = part._replace(student_hidden_ND=hidden, student_head=Head(table))
            losses.append(loss_of(part, "distillm2", counts=batch.counts, backend=backend).loss)
        return 0.5 * losses[0] + 2 * losses[1]

    (ours,) = torch.autograd.grad(total("fused"), table)
    (theirs,) = torch.autograd.grad(total("plain"), table)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_second_backward_is_refused() -> None:
    loss = loss_of(trainable(batch_for("kd")), "kd").loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already backpropagated"):
        loss.backward()


@pytest.mark.parametrize(
    "needs",
    [dict.fromkeys(("hidden", "weight", "bias"), False) | {k: True} for k in ("hidden", "weight", "bias")],
)
def test_each_part_of_the_student_alone(needs: dict[str, bool]) -> None:
    batch = batch_for("distillm2", **HEADS["all"])
    plain, fused = trainable(batch, **needs), trainable(batch, **needs)
    loss_of(plain, "distillm2", backend="plain").loss.backward()
    loss_of(fused, "distillm2", backend="fused").loss.backward()
    for ours, theirs, needed in zip(gradients(fused), gradients(plain), needs.values(), strict=True):
        assert (ours is not None) == (theirs is not None) == needed
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_nothing_is_computed_for_a_frozen_head_and_no_gradient_without_one_asked_for() -> None:
    batch = batch_for("kd")
    with watching() as full:
        loss_of(trainable(batch), "kd")
    with watching() as frozen:
        loss_of(trainable(batch, weight=False), "kd")
    with watching() as measured, torch.no_grad():
        output = loss_of(trainable(batch), "kd")
    assert (full.calls["mm"], full.calls["addmm"]) == (2, 2)
    assert (frozen.calls["mm"], frozen.calls["addmm"]) == (2, 1)
    assert (measured.calls["mm"], measured.calls["addmm"]) == (2, 0)
    assert not output.loss.requires_grad
    torch.testing.assert_close(output.loss, loss_of(batch, "kd", backend="plain").loss)


def test_inputs_are_left_alone() -> None:
    batch = trainable(batch_for("distillm2", **HEADS["all"]))
    before = [tensor.detach().clone() for tensor in (*batch[0:1], *batch[1][:2], *batch[2:3], *batch[3][:2])]
    loss_of(batch, "distillm2").loss.backward()
    after = [*batch[0:1], *batch[1][:2], *batch[2:3], *batch[3][:2]]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_memory_does_not_grow_with_the_rows() -> None:
    """No tensor of a run is larger than the buffer that it was given, beside the gradient of the head."""
    vocabulary, buffer_bytes = 5000, 1 << 20
    largest = []
    for pairs in (10, 40):
        batch = batch_for("distillm2", pairs=pairs, vocabulary=vocabulary, longest=20)
        assert len(batch.rows.targets_N) * vocabulary * 4 > 2 * buffer_bytes  # what full logits would take
        with watching() as watch:
            loss_of(trainable(batch), "distillm2", buffer_bytes=buffer_bytes).loss.backward()
        largest.append(watch.largest)
    assert largest[0] == largest[1] <= buffer_bytes / 2


@pytest.mark.parametrize(
    ("name", "rows", "projections"),
    [
        *(
            (name, rows, projections)
            for name in ("distillm2", "gkd")
            for rows, projections in ((10, 1), (30, 2))
        ),
        *(("dpkd", rows, projections) for rows, projections in ((5, 1), (10, 2))),  # a pair must fit
    ],
)
def test_what_looks_at_whole_responses_projects_those_that_fit_once(
    name: str, rows: int, projections: int
) -> None:
    """Its own α, weights by its own log-probabilities, or the pair's margin."""
    batch = random_batch(pairs=1, longest=1, vocabulary=19, dtype=torch.float32)
    index_N = torch.arange(2).repeat_interleave(rows)
    batch = batch._replace(
        student_hidden_ND=torch.randn(2 * rows, 6),
        teacher_hidden_NE=torch.randn(2 * rows, 8),
        rows=batch.rows._replace(targets_N=index_N, response_N=index_N),
    )
    weigh = (lambda start, stop, log_p_C, log_q_C: torch.ones_like(log_q_C)) if name == "gkd" else None
    buffer_bytes = (2 * 15 + 3 * 5) * ROW  # chunks of 15 rows of two models, three intermediates of 5 rows
    chunks = -(-2 * rows // 15) if name == "dpkd" else 2 * -(-rows // 15)
    with watching() as watch:
        loss_of(batch, name, buffer_bytes=buffer_bytes, row_weigher=weigh)
    assert watch.calls["mm"] == 2 * projections * chunks
    if name != "dpkd":
        with watching() as watch:  # a response's own gap plays no part: never twice
            loss_of(batch, name, buffer_bytes=buffer_bytes, alpha_needs_gap=False)
        assert watch.calls["mm"] == 2 * -(-2 * rows // 15)


@pytest.mark.parametrize("name", ["distillm2", "kd", "dpkd", "seqkd"])
def test_a_broken_model_shows_in_the_loss(name: str) -> None:
    """NaN must not be clamped away."""
    for field in ("student_hidden_ND", "teacher_hidden_NE"):
        if field == "teacher_hidden_NE" and name == "seqkd":
            continue
        batch = batch_for(name)
        broken = getattr(batch, field).clone()
        broken[3, 0] = float("nan")
        assert loss_of(batch._replace(**{field: broken}), name).loss.isnan()
