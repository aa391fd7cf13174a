"""218 evolved instructions of graded difficulty (Xu et al. 2023, "WizardLM")."""

from __future__ import annotations

from eval.instructions import instruction_task
from eval.task import Question, Row


def read(row: Row) -> Question:
    """A row of the data set."""
    answer = row.get("generated_text") or row.get("output")
    return Question(
        row.id("id", "idx"), row.text("prompt", "instruction", "Instruction"), (answer,) if answer else ()
    )


TASK = instruction_task(
    "evol_instruct",
    "218 evolved instructions of WizardLM's test set",
    read,
    columns="prompt (or instruction), generated_text (the reference; optional)",
    source="WizardLM/data/WizardLM_testset.jsonl of https://github.com/nlpxucan/WizardLM",
)
