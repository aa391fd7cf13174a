"""80 questions of two turns (Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena")."""

from __future__ import annotations

from eval.instructions import METRICS, instruction_task
from eval.task import Hub, Question, Row

TURNS = {
    f"{name}_turn_{turn}": METRICS[name]._replace(title=f"{METRICS[name].title}, turn {turn}")
    for name in ("rating", "win_rate")
    for turn in (1, 2)
}


def read(row: Row) -> Question:
    """A row of the data set."""
    first, *following = row.texts("turns", "prompt")
    references = list(row.get("reference") or [])
    if row.get("choices"):  # a file of reference answers as FastChat writes it, joined by data.annotations
        references = row["choices"][0]["turns"]
    return Question(
        row.id("question_id", "prompt_id", "id"),
        first,
        references=tuple(references[-1:]) if references and references[-1] else (),
        follow_ups=tuple(following),
        data={"references": references},  # of every turn, for a judge
    )


TASK = instruction_task(
    "mt_bench",
    "80 questions of two turns; a judge is needed, few have references",
    read,
    columns="question_id, turns (or prompt): two questions, reference (two answers; optional)",
    data=Hub("HuggingFaceH4/mt_bench_prompts", "train"),
    version=2,
    metrics=METRICS | TURNS,
)
