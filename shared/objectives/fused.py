"""How is a loss over a large vocabulary computed without holding its logits? In chunks, gradient included.

A chunk of rows at a time: logits of both models into two reused buffers, the divergence and its
closed-form gradient in place, and one more product for the gradient of the hidden states, two where the
head is trained. So the extra memory does not grow with the number of rows, and backward only multiplies
by a number. Equivalent, plain, with all logits at once: `core.row_nats`.

Shapes in names: N rows, C rows of a chunk, K rows of a slice that fits the cache, D and E widths of hidden
states, V ids of the shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.objectives.chunks import Span, chunk_sizes, even_chunks, slices, whole_units
from shared.objectives.closed_form import (
    PROBABILITY_KINDS,
    Scratch,
    gradient_factor,
    log_sum_exp,
    nats_and_gradient_,
    normalise_,
    probability_nats_and_gradient_,
)
from shared.objectives.head import Head, exact_dtype
from shared.objectives.kernels import Kernels, kernels_for
from shared.objectives.plan import RowKind, RowPlan, kinds_without_idle_skew, runs_of_a_kind
from shared.objectives.projection import Projection, multiplies_natively
from shared.objectives.signal import Dense, Signal, Sparse
from shared.objectives.sparse import sparse_nats_and_gradient_


class RowPlanner(NamedTuple):
    """A plan that depends on the logits, unit by unit: a unit is a response, or a pair.

    `plan(start, stop, log_p_C, log_q_C)` gives the `RowPlan` of rows start:stop, which are whole units.
    Units that fit a chunk are projected once; a longer one twice, first for its log-probabilities.
    """

    starts: Sequence[int]  # the first row of each unit, ascending from 0
    plan: Callable[[int, int, Tensor | None, Tensor], RowPlan]
    kinds: frozenset[RowKind] = frozenset(RowKind)  # expected of the plan; others are right, but slower


class DivergenceOutput(NamedTuple):
    """Σ weight · nats, which backpropagates, with what each row contributed; all else detached."""

    total: Tensor  # scalar
    nats_N: Tensor  # unweighted
    log_p_N: Tensor | None  # the teacher's log-probability of each target; None without a teacher
    log_q_N: Tensor  # the student's


def fused_divergence(
    student_hidden_ND: Tensor,
    student_head: Head,
    signal: Signal | None,
    plan: RowPlan | RowPlanner,
    *,
    targets_N: Tensor,
    buffer_bytes: int | None = None,
    kernels: Kernels | None = None,
) -> DivergenceOutput:
    """Σ weight · nats over rows that may each have their own divergence and parameter.

    Gradients reach the student's hidden states, weight and bias as far as they require one; nothing is
    computed for those that do not, and no gradient at all under `torch.no_grad`. A trained weight takes one
    buffer of its shape in float32. The total can be backpropagated once.

    Args:
        student_hidden_ND: final hidden states at the rows.
        student_head: of the shared vocabulary.
        signal: the teacher's, at the same rows and over the same shared vocabulary: hidden states and
            head, or a few outcomes a row. None where every row is an nll.
        plan: kind, parameter and weight of each row, or how to find them.
        targets_N: the token that each row predicts, inside the shared vocabulary.
        buffer_bytes: for the buffers of a chunk; default 96 MiB on a CPU, 768 MiB on a GPU.
        kernels: what computes; default the fastest that works on the device.
    """
    leaves = (student_hidden_ND, student_head.weight_VD, student_head.bias_V)
    needs_gradient = [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves]
    with torch.no_grad(), torch.autocast(student_hidden_ND.device.type, enabled=False):
        work = _Work(
            student_hidden_ND,
            student_head,
            signal,
            targets_N,
            needs_gradient=needs_gradient,
            buffer_bytes=buffer_bytes,
            kernels=kernels or kernels_for(student_hidden_ND.device),
        )
        work.run(plan)
    total = work.total
    if any(needs_gradient):
        total = _Total.apply(total, work.gradients, *leaves)
    return DivergenceOutput(total, work.nats_N, work.log_p_N, work.log_q_N)


def loss_dtype(student_hidden_ND: Tensor, student_head: Head, signal: Signal | None) -> torch.dtype:
    """The type of logits and loss: float64 where anything is, else float32."""
    tensors = [student_hidden_ND, student_head.weight_VD]
    match signal:
        case Dense():
            tensors += [signal.hidden_NE, signal.head.weight_VD]
        case Sparse():
            tensors.append(signal.log_p_NJ)
    return exact_dtype(*tensors)


class _Gradients(NamedTuple):
    """Of the total, as far as needed."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None


class _Total(torch.autograd.Function):
    """Attaches gradients that are already known to the student's tensors."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: _Gradients, *leaves: Tensor | None) -> Tensor:
        ctx.gradients = gradients
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in leaves]
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradient_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("this loss was already backpropagated, and its gradients were handed over")
        gradients, ctx.gradients = ctx.gradients, None
        (scale,) = gradient_outputs
        # Not asked elsewhere than on a CPU, where it would wait for the device.
        is_one = scale.device.type == "cpu" and scale.item() == 1.0
        return (
            None,
            None,
            *(
                g if g is None else g.to(dtype) if is_one else torch.mul(g, scale, out=_room_for(g, dtype))
                for g, dtype in zip(gradients, ctx.dtypes, strict=True)
            ),
        )


def _room_for(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)


class _Work:
    """The buffers, and what has come out of them so far."""

    def __init__(
        self,
        student_hidden_ND: Tensor,
        student_head: Head,
        signal: Signal | None,
        targets_N: Tensor,
        *,
        needs_gradient: Sequence[bool],
        buffer_bytes: int | None,
        kernels: Kernels,
    ) -> None:
        self.targets_N = targets_N
        # A sparse teacher's outcomes are gathered and scattered by PyTorch's own operations.
        self.by_row = None if isinstance(signal, Sparse) else kernels.rows
        self.normalises = kernels.normalises and self.by_row is None
        self.rows, vocabulary = len(targets_N), student_head.vocabulary_size
        dtype = loss_dtype(student_hidden_ND, student_head, signal)
        intermediates = 0 if self.by_row else 4 if student_head.softcap is not None else 3
        self.sizes = chunk_sizes(
            self.rows,
            vocabulary * dtype.itemsize,
            models=2 if isinstance(signal, Dense) else 1,
            intermediates=intermediates,
            rounded=multiplies_natively(student_hidden_ND.device, student_head.weight_VD.dtype),
            on_cpu=student_hidden_ND.device.type == "cpu",
            buffer_bytes=buffer_bytes,
        )

        self.student = Projection(student_hidden_ND, student_head, rows=self.sizes.chunk, dtype=dtype)
        self.teacher = self.sparse = None
        if isinstance(signal, Dense):
            assert signal.head.vocabulary_size == vocabulary, "heads of two vocabularies"
            self.teacher = Projection(*signal, rows=self.sizes.chunk, dtype=dtype)
        elif signal is not None:
            self.sparse = Sparse(signal.ids_NJ, *(tensor.to(dtype) for tensor in signal[1:]))
        self.softcap = student_head.softcap
        if self.by_row:
            self.sizes = self.sizes._replace(slice=self.sizes.chunk)
        else:
            p_KV, a_KV, b_KV, *softcap_KV = (
                student_hidden_ND.new_empty(self.sizes.slice, vocabulary, dtype=dtype)
                for _ in range(intermediates)
            )
            self.scratch = Scratch(p_KV, a_KV, b_KV, softcap_KV[0] if softcap_KV else None)

        def per_row() -> Tensor:
            return student_hidden_ND.new_zeros(self.rows, dtype=dtype)

        self.total = student_hidden_ND.new_zeros((), dtype=dtype)
        self.nats_N, self.log_q_N, self.student_lse_N = per_row(), per_row(), per_row()
        self.log_p_N = self.teacher_lse_N = None
        if self.teacher is not None:
            self.log_p_N, self.teacher_lse_N = per_row(), per_row()
        elif self.sparse is not None:
            self.log_p_N = self.sparse.target_log_p_N
        leaves = (student_hidden_ND, student_head.weight_VD, student_head.bias_V)
        self.gradients = _Gradients(
            *(
                leaf.new_empty(leaf.shape, dtype=dtype) if leaf is not None and needed else None
                for leaf, needed in zip(leaves, needs_gradient, strict=True)
            )
        )
        # The first chunk overwrites the shared rows: zeroing a large head would cost a share of a product.
        _, weight_VD, bias_V = self.gradients
        if weight_VD is not None:
            weight_VD[vocabulary if self.rows else 0 :].zero_()
        if bias_V is not None:
            bias_V.zero_()

    def run(self, plan: RowPlan | RowPlanner) -> None:
        """Go through all rows."""
        if isinstance(plan, RowPlan):
            for chunk in even_chunks(0, self.rows, self.sizes.chunk):
                self._evaluate(*self._project(chunk), chunk, _rows_of(plan, *chunk), measured=False)
            return
        expected = self._normalises(plan.kinds)
        for span in whole_units(plan.starts, self.rows, self.sizes.chunk):
            chunks = even_chunks(*span, self.sizes.chunk)
            for chunk in chunks:
                logits = self._project(chunk)
                for first, last in slices(0, chunk.stop - chunk.start, self.sizes.slice):
                    self._measure(*logits, chunk, first, last, normalise=expected and len(chunks) == 1)
            log_p_C = None if self.log_p_N is None else self.log_p_N[slice(*span)]
            span_plan = plan.plan(*span, log_p_C, self.log_q_N[slice(*span)])
            for chunk in chunks:
                rows_plan = _rows_of(span_plan, *(row - span.start for row in chunk))
                normalised = expected and len(chunks) == 1
                if len(chunks) > 1 or (
                    normalised and not self._normalises(kinds_without_idle_skew(rows_plan))
                ):
                    logits, normalised = self._project(chunk), False  # else they are still in the buffers
                self._evaluate(*logits, chunk, rows_plan, measured=True, normalised=normalised)

    def _normalises(self, kinds: Iterable[RowKind]) -> bool:
        """Whether probabilities may take the place of logits as soon as their normalisers are known."""
        possible = self.normalises and self.teacher is not None and self.softcap is None
        return possible and PROBABILITY_KINDS.issuperset(kinds)

    def _project(self, chunk: Span) -> tuple[Tensor, Tensor | None]:
        teacher_CV = None if self.teacher is None else self.teacher.logits(*chunk)
        return self.student.logits(*chunk), teacher_CV

    def _measure(
        self,
        student_CV: Tensor,
        teacher_CV: Tensor | None,
        chunk: Span,
        first: int,
        last: int,
        *,
        normalise: bool,
    ) -> None:
        """Normalisers, and log-probabilities of the targets, of the chunk's rows first:last."""
        rows = slice(chunk.start + first, chunk.start + last)
        for logits_CV, lse_N, log_N in (
            (student_CV, self.student_lse_N, self.log_q_N),
            (teacher_CV, self.teacher_lse_N, self.log_p_N),
        ):
            if logits_CV is None or lse_N is None or log_N is None:
                continue
            logits_KV = logits_CV[first:last]
            if self.by_row:
                lse_N[rows], log_N[rows] = self.by_row.log_sum_exp(logits_KV, self.targets_N[rows])
                continue
            target_logit_K = logits_KV.gather(1, self.targets_N[rows, None]).squeeze(1)
            lse_N[rows] = normalise_(logits_KV) if normalise else log_sum_exp(logits_KV, self.scratch)
            torch.sub(target_logit_K, lse_N[rows], out=log_N[rows])

    def _evaluate(
        self,
        student_CV: Tensor,
        teacher_CV: Tensor | None,
        chunk: Span,
        plan: RowPlan,
        *,
        measured: bool,
        normalised: bool = False,
    ) -> None:
        """Divergences and gradients of a chunk, whose student logits (if normalised, all) are used up."""
        if self.by_row:
            scale_C = self._evaluate_rows(student_CV, teacher_CV, chunk, plan, measured=measured)
        else:
            scale_C = self._evaluate_slices(
                student_CV, teacher_CV, chunk, plan, measured=measured, normalised=normalised
            )
        self.total += torch.dot(plan.weight_N, self.nats_N[slice(*chunk)])
        hidden_ND, weight_VD, bias_V = self.gradients
        if hidden_ND is None and weight_VD is None and bias_V is None:
            return
        gradient_CV = self.student.factor(student_CV)
        if hidden_ND is not None:
            self.student.hidden_gradient(gradient_CV, scale_C, out=hidden_ND[slice(*chunk)])
        if weight_VD is not None:
            self.student.add_weight_gradient(
                gradient_CV, scale_C, *chunk, into_VD=weight_VD, is_first=chunk.start == 0
            )
        if bias_V is not None:
            self.student.add_bias_gradient(student_CV, scale_C, into_V=bias_V)

    def _evaluate_rows(
        self, student_CV: Tensor, teacher_CV: Tensor | None, chunk: Span, plan: RowPlan, *, measured: bool
    ) -> Tensor:
        """All rows at once. Returns scale_C, the factor that each row's gradient lacks."""
        assert self.by_row is not None
        if not measured:
            self._measure(student_CV, teacher_CV, chunk, 0, chunk.stop - chunk.start, normalise=False)
        rows = slice(*chunk)
        self.nats_N[rows], scale_C = self.by_row.nats_and_gradient_(
            plan,
            student_CV,
            teacher_CV,
            student_lse_C=self.student_lse_N[rows],
            teacher_lse_C=None if self.teacher_lse_N is None else self.teacher_lse_N[rows],
            targets_C=self.targets_N[rows],
            backward=any(gradient is not None for gradient in self.gradients),
            softcap=self.softcap,
        )
        return scale_C

    def _evaluate_slices(
        self,
        student_CV: Tensor,
        teacher_CV: Tensor | None,
        chunk: Span,
        plan: RowPlan,
        *,
        measured: bool,
        normalised: bool,
    ) -> Tensor:
        """Slices of one kind that fit the cache. Returns scale_C, as `_evaluate_rows`."""
        backward = any(gradient is not None for gradient in self.gradients)
        scale_C = plan.weight_N.clone()
        for kind, first, last in runs_of_a_kind(plan, self.sizes.slice):
            scale_C[first:last] *= gradient_factor(kind, plan.parameter_N[first:last])
            if not measured:  # here the rows are in cache for what follows
                normalised = self._normalises([kind])
                self._measure(student_CV, teacher_CV, chunk, first, last, normalise=normalised)
            rows = slice(chunk.start + first, chunk.start + last)
            student_KV = student_CV[first:last]
            options: dict[str, Any] = {
                "student_lse_K": self.student_lse_N[rows],
                "targets_K": self.targets_N[rows],
                "parameter_K": plan.parameter_N[first:last],
                "backward": backward,
                "softcap": self.softcap,
                "scratch": self.scratch,
            }
            if normalised:
                assert teacher_CV is not None
                share_K1 = plan.parameter_N[first:last, None]
                nats_K = probability_nats_and_gradient_(
                    kind,
                    student_KV,
                    teacher_CV[first:last],
                    share_K1,
                    backward,
                    self.scratch.rows(last - first),
                )
            elif self.sparse is not None and kind is not RowKind.NLL:
                sparse_K = Sparse(*(column_N[rows] for column_N in self.sparse))
                nats_K = sparse_nats_and_gradient_(kind, student_KV, sparse_K, **options)
            else:
                teacher_KV = None if teacher_CV is None else teacher_CV[first:last]
                teacher_lse_K = None if self.teacher_lse_N is None else self.teacher_lse_N[rows]
                nats_K = nats_and_gradient_(
                    kind, student_KV, teacher_KV, teacher_lse_K=teacher_lse_K, **options
                )
            self.nats_N[rows] = nats_K
        return scale_C


def _rows_of(plan: RowPlan, start: int, stop: int) -> RowPlan:
    return RowPlan(*(column_N[start:stop] for column_N in plan))
