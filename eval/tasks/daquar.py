"""Questions on photos of rooms (Malinowski and Fritz 2014, "A Multi-World Approach …")."""

from __future__ import annotations

from eval.answers import several, short_answer
from eval.scores import Metric
from eval.task import Question, Reply, Row, Scored, Task, each
from eval.visual import SAMPLING

PROMPT = """\
{question}
Answer with a single word, number or color; where there are several things, list them with commas."""


def read(row: Row) -> Question:
    """A row with the things that make up the answer."""
    answers = row.texts("answers", "answer")
    named = row.get("image") or f"images/{row.first('image_id')}.png"
    return Question(
        id=row.id("id"),
        prompt=PROMPT.format(question=row.text("question").strip()),
        references=answers if len(answers) > 1 else tuple(part.strip() for part in answers[0].split(",")),
        images=(row.image_file(named),),
    )


def score(reply: Reply) -> Scored:
    """The exact set of things, and the share that the two sets have in common."""
    answer = short_answer(reply.text)
    said = several(answer)
    right = frozenset().union(*map(several, reply.question.references))
    return Scored(
        answer,
        {"accuracy": float(said == right), "overlap": len(said & right) / max(1, len(said | right))},
    )


TASK = Task(
    name="daquar",
    version=1,
    family="vqa",
    summary="questions on photos of rooms, exact match of the set of things",
    data=None,
    source="https://www.kaggle.com/datasets/tezansahu/processed-daquar-dataset",
    columns="id, question, answers (a list: all of them make up the answer), image",
    read=read,
    metrics={
        "accuracy": Metric("Exact match", "share", True),
        "overlap": Metric("Overlap of sets", "share", True),
    },
    score=each(score),
    sampling=SAMPLING,
    images=True,
)
