"""What does a side's term become for one kind of task? The coupling of data types with divergences.

A *cell* is one side of one task: `side_index * len(tasks) + task_index`, as `AlphaCurriculum` numbers them.
Shapes in names: K tasks, C cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from shared.errors import UserError, unknown_name
from shared.objectives.objective import SIDES, Objective, Side, Term

COUPLED = ("nll", "kl", "reverse_kl", "skew_kl", "skew_reverse_kl", "tvd")


class Coupling(NamedTuple):
    """What one side of one task has instead of the objective's own term; None leaves that."""

    divergence: str | None = None
    weight: float = 1.0  # beside the objective's own, of this task against the others
    alpha: float | None = None  # the skew's α₀, or a fixed α


Table = Mapping[tuple[str, Side], Coupling]


def couple(objective: Objective, tasks: Sequence[str], table: Table) -> Objective:
    """The objective with a term for every cell; itself where the table is empty.

    Raises:
        UserError: an entry for a task, side or divergence that there is not, or that cannot take effect.
    """
    if not table:
        return objective
    _refuse_idle(objective, tasks, table)
    terms_C = [
        _coupled(objective.terms[side], table.get((task, side), Coupling()))
        if side in objective.terms
        else None
        for side in SIDES
        for task in tasks
    ]
    return replace(objective, terms_C=tuple(terms_C))


def cell_weights(weight_C: Sequence[float], count_C: Sequence[float]) -> list[float]:
    """The same proportions, with a mean of 1 over each side's responses (or rows): count_C of them."""
    width = len(weight_C) // len(SIDES)
    found: list[float] = []
    for first in range(0, len(weight_C), width):
        cells = slice(first, first + width)
        total = sum(count_C[cells])
        weighted = sum(w * n for w, n in zip(weight_C[cells], count_C[cells], strict=True))
        found += [w * total / weighted if total else 1.0 for w in weight_C[cells]]
    return found


def _refuse_idle(objective: Objective, tasks: Sequence[str], table: Table) -> None:
    if objective.is_pairwise:
        raise UserError(f"no coupling in {objective.name!r}, which compares pairs; choose another objective.")
    for (task, side), entry in table.items():
        where = f"coupling of {task}, {side}"
        if task not in tasks:
            raise UserError(unknown_name("task of the coupling", task, tasks))
        if side not in objective.terms:
            raise UserError(
                f"coupling of {task} has no effect on the {side}'s responses, which {objective.name!r} does "
                f"not train on; it has {', '.join(objective.sides)}. Remove it."
            )
        if entry.divergence is not None and entry.divergence not in COUPLED:
            raise UserError(unknown_name("divergence of the coupling", entry.divergence, COUPLED))
        if not entry.weight > 0 or (entry.alpha is not None and not 0 <= entry.alpha < 1):
            raise UserError(
                f"{where}: weight is {entry.weight} and alpha {entry.alpha}; give a "
                "weight above 0 and an alpha in [0, 1)."
            )
        if entry.weight != 1 and len(tasks) == 1:
            raise UserError(f"{where}: weight has no effect with {task} alone; remove it.")
        own = objective.terms[side]
        skewed = (entry.divergence or own.divergence).startswith("skew")
        if entry.alpha is not None and not skewed:
            raise UserError(f"{where}: alpha has no effect but on a skewed divergence.")
        if entry.alpha is None and skewed and not own.divergence.startswith("skew"):
            raise UserError(f"{where}: {entry.divergence} needs an alpha, as {objective.name!r} has none.")


def _coupled(term: Term, entry: Coupling) -> Term:
    alpha = term.parameter if entry.alpha is None else entry.alpha
    if entry.divergence is None or entry.divergence == term.divergence:
        return term._replace(parameter=alpha)
    skewed = entry.divergence.startswith("skew")
    return Term(
        entry.divergence,
        term.weight,
        parameter=alpha if skewed else 0.0,
        alpha_from_curriculum=skewed and term.alpha_from_curriculum,
    )
