"""Which divergence meets which response? The table of objectives.

An objective names a term for each side: teacher responses, student responses, the data set's own references.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

from shared.errors import UserError, unknown_name

Side = Literal["teacher", "student", "reference"]
SIDES: tuple[Side, ...] = ("teacher", "student", "reference")
"""Who wrote a response; `side_R` holds indices into this."""


class Weight(NamedTuple):
    """What a side's term counts for: `constant + per_beta · β`."""

    constant: float = 1.0
    per_beta: float = 0.0

    def at(self, beta: float) -> float:
        """The weight for a value of β."""
        return self.constant + self.per_beta * beta


class Term(NamedTuple):
    """What the rows of one side's responses minimise: a name of `DIVERGENCES`, or "nll"."""

    divergence: str
    weight: Weight = Weight()
    parameter: float = 0.0  # α of the skewed divergences, unless from the curriculum; ω of jsd
    alpha_from_curriculum: bool = False
    detach_mixture: bool = False  # of skew_reverse_kl


@dataclass(frozen=True)
class Objective:
    """A row of the table.

    `preference_lam` is λ of `dpkd`, the only objective that compares the two responses of a pair: its loss is
    −log σ(λ · Σ weight · (log q(y) − log p(y))) with the terms' weights as signs.
    """

    name: str
    terms: Mapping[Side, Term]
    preference_lam: float | None = None
    terms_C: tuple[Term | None, ...] = ()  # of each side of each task, where `coupling` tells tasks apart

    @property
    def all_terms(self) -> tuple[Term, ...]:
        """Those that rows are trained by."""
        return tuple(term for term in self.terms_C if term) or tuple(self.terms.values())

    @property
    def sides(self) -> tuple[Side, ...]:
        """The responses that every sample must have."""
        return tuple(side for side in SIDES if side in self.terms)

    @property
    def is_pairwise(self) -> bool:
        """Whether the two responses of a pair must be in one micro-batch."""
        return self.preference_lam is not None

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's distribution is needed, not only its responses."""
        return self.is_pairwise or any(term.divergence != "nll" for term in self.all_terms)

    @property
    def uses_alpha_curriculum(self) -> bool:
        """Whether settings of the α curriculum take effect."""
        return any(term.alpha_from_curriculum for term in self.all_terms)

    @property
    def uses_beta(self) -> bool:
        """Whether settings of the β schedule take effect."""
        return any(term.weight.per_beta for term in self.terms.values())


def sft() -> Objective:
    """Supervised fine-tuning on the data set's own references; the baseline without a teacher."""
    return Objective("sft", {"reference": Term("nll")})


def seqkd() -> Objective:
    """Fine-tuning on the teacher's responses (Kim and Rush, arXiv 1606.07947)."""
    return Objective("seqkd", {"teacher": Term("nll")})


def kd() -> Objective:
    """KL on the teacher's responses (Hinton et al., arXiv 1503.02531)."""
    return Objective("kd", {"teacher": Term("kl")})


def imitkd() -> Objective:
    """KL on the student's responses (Lin et al., arXiv 2009.07253)."""
    return Objective("imitkd", {"student": Term("kl")})


def gkd(*, phi: float = 0.5, omega: float = 0.5) -> Objective:
    """Generalised JSD on both (Agarwal et al., arXiv 2306.13649); `phi` is the student responses' share."""
    _check_range("gkd", "phi", phi, 0, 1)
    _check_range("gkd", "omega", omega, 0, 1, open_ends=True)
    return _both_sides("gkd", "jsd", omega, student_share=phi)


def distillm(*, phi: float = 0.5, alpha: float = 0.1, divergence: str = "skew_kl") -> Objective:
    """One skewed divergence on both (DistiLLM, arXiv 2402.03898), without its replay buffer."""
    _check_range("distillm", "phi", phi, 0, 1)
    _check_range("distillm", "alpha", alpha, 0, 1)
    if divergence not in ("skew_kl", "skew_reverse_kl"):
        raise UserError(unknown_name("divergence of distillm", divergence, ("skew_kl", "skew_reverse_kl")))
    return _both_sides("distillm", divergence, alpha, student_share=phi)


def dpkd(*, lam: float = 0.1) -> Objective:
    """Preference of y_t over y_s against the teacher as reference (Li et al., arXiv 2406.19774)."""
    _check_range("dpkd", "lam", lam, 0, math.inf, open_ends=True)
    terms: dict[Side, Term] = {"teacher": Term("nll"), "student": Term("nll", weight=Weight(-1.0))}
    return Objective("dpkd", terms, preference_lam=lam)


def distillm2(*, detach_mixture: bool = False) -> Objective:
    """The contrastive objective: skew KL on y_t, skew reverse KL on y_s, α and β by their curricula.

    `detach_mixture` takes the released code's gradient of the skew reverse KL instead of the full one.
    """
    if not isinstance(detach_mixture, bool):
        raise UserError(f"distillm2: detach_mixture is {detach_mixture!r}; give true or false.")
    on_teacher = Term("skew_kl", weight=Weight(1.0, -1.0), alpha_from_curriculum=True)
    on_student = Term(
        "skew_reverse_kl",
        weight=Weight(0.0, 1.0),
        alpha_from_curriculum=True,
        detach_mixture=detach_mixture,
    )
    return Objective("distillm2", {"teacher": on_teacher, "student": on_student})


OBJECTIVES: Mapping[str, Callable[..., Objective]] = MappingProxyType(
    {
        "sft": sft,
        "seqkd": seqkd,
        "kd": kd,
        "imitkd": imitkd,
        "gkd": gkd,
        "distillm": distillm,
        "dpkd": dpkd,
        "distillm2": distillm2,
    }
)


def build_objective(name: str, parameters: Mapping[str, object]) -> Objective:
    """The objective of a name, with its parameters.

    Raises:
        UserError: unknown name, unknown parameter or a value out of range; says what is allowed.
    """
    if name not in OBJECTIVES:
        raise UserError(unknown_name("objective", name, OBJECTIVES))
    builder = OBJECTIVES[name]
    known = inspect.signature(builder).parameters
    for parameter in parameters:
        if not known:
            raise UserError(f"objective {name!r} has no parameters; got {parameter!r}. Leave it out.")
        if parameter not in known:
            raise UserError(unknown_name(f"parameter of objective {name!r}:", parameter, known))
    return builder(**parameters)


def _both_sides(name: str, divergence: str, parameter: float, *, student_share: float) -> Objective:
    return Objective(
        name,
        {
            "teacher": Term(divergence, Weight(1 - student_share), parameter),
            "student": Term(divergence, Weight(student_share), parameter),
        },
    )


def _check_range(
    objective: str, parameter: str, value: object, low: float, high: float, *, open_ends: bool = False
) -> None:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if low < number < high or (not open_ends and number in (low, high)):
        return
    span = f"between {low} and {high}, {'ends excluded' if open_ends else 'ends included'}"
    if math.isinf(high):
        span = f"above {low}"
    raise UserError(f"{objective}: {parameter} is {value!r}; give a number {span}.")
