"""How are open instructions scored without a judge? ROUGE-L against a reference, and the reply's length."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from eval.code_extraction import strip_reasoning
from eval.metrics.rouge_l import rouge_l_f1
from eval.scores import Metric
from eval.task import Hub, Question, Quotient, Reply, Row, Scored, Task, each
from shared.types import Sampling

METRICS = {
    "rouge_l": Metric("ROUGE-L against the reference", "share", True),
    "win_rate": Metric("Win rate against the reference", "share", True),
    "rating": Metric("Judge's rating", "1 to 10", True),
}
QUOTIENTS = {"words": Quotient("Words of a reply", "words", "replies", None)}
# the DistiLLM-2 paper's settings for instruction following
SAMPLING = Sampling(max_new_tokens=512, temperature=0.8, top_p=0.95)


def instruction_task(
    name: str,
    summary: str,
    read: Callable[[Row], Question],
    *,
    columns: str,
    data: Hub | None = None,
    source: str = "",
    version: int = 1,
    metrics: Mapping[str, Metric] = METRICS,
) -> Task:
    """A task of open instructions; the arguments are as `Task` has them."""
    return Task(
        name=name,
        version=version,
        family="instruction",
        summary=summary,
        data=data,
        source=source,
        columns=columns,
        read=read,
        metrics=metrics,
        score=each(_score),
        sampling=SAMPLING,
        quotients=QUOTIENTS,
        judged=True,
    )


def _score(reply: Reply) -> Scored:
    """A question without a reference has no ROUGE-L: only a judge can say something of it."""
    answer = strip_reasoning(reply.text).strip()
    values = {"words": float(len(answer.split())), "replies": 1.0}
    if reply.question.references:
        values["rouge_l"] = rouge_l_f1(answer, reply.question.references)
    return Scored(answer, values)
