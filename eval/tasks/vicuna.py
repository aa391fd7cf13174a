"""80 questions in nine categories (Chiang et al. 2023, "Vicuna")."""

from __future__ import annotations

from eval.instructions import instruction_task
from eval.task import Hub, Question, Row


def read(row: Row) -> Question:
    """A row of the data set."""
    turns = row.texts("turns", "question", "text", "prompt", "instruction")
    return Question(row.id("question_id", "id"), turns[0])


TASK = instruction_task(
    "vicuna",
    "80 open questions of Vicuna; without references, so they need a judge",
    read,
    data=Hub("zhengxuanzenwu/vicuna-eval-with-gpt4", "test"),
    columns="question_id, turns (a list of one question); or question",
)
