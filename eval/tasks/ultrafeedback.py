"""2,000 prompts of the held-out split of UltraFeedback (Cui et al. 2023)."""

from __future__ import annotations

from eval.instructions import instruction_task
from eval.task import Hub, Question, Row


def read(row: Row) -> Question:
    """A row of the data set."""
    answer = row.get("generated_text") or row.get("chosen")
    if isinstance(answer, list):  # a chat, as the hub has it
        answer = answer[-1]["content"]
    return Question(row.id("id"), row.text("prompt"), (answer,) if answer else ())


TASK = instruction_task(
    "ultrafeedback",
    "2,000 held-out prompts of UltraFeedback",
    read,
    columns="prompt, generated_text or chosen (the reference; optional)",
    data=Hub("HuggingFaceH4/ultrafeedback_binarized", "test_prefs"),
)
