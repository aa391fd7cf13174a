"""805 instructions with the answers of text-davinci-003 (Li et al. 2023, "AlpacaEval")."""

from __future__ import annotations

from eval.instructions import instruction_task
from eval.task import Hub, Question, Row


def read(row: Row) -> Question:
    """A row of the data set."""
    references = row.texts("output") if row.get("output") else ()
    return Question(row.id("id"), row.text("instruction"), references)


TASK = instruction_task(
    "alpaca_eval",
    "805 instructions of AlpacaEval",
    read,
    columns="instruction, output (the reference; optional)",
    data=Hub("tatsu-lab/alpaca_eval", file="alpaca_eval.json"),
)
