"""252 user-oriented instructions with expert answers (Wang et al. 2023, "Self-Instruct")."""

from __future__ import annotations

from eval.instructions import instruction_task
from eval.task import Hub, Question, Row, RowError


def read(row: Row) -> Question:
    """A row of the data set."""
    instances = row.first("instances")
    if isinstance(instances, dict):  # the hub turns the list of records into a record of lists
        instances = [
            dict(zip(instances, values, strict=True)) for values in zip(*instances.values(), strict=True)
        ]
    if not instances:
        raise RowError("instances is empty; needs {input, output}")
    given, answer = instances[0].get("input", ""), instances[0].get("output", "")
    prompt = "\n\n".join(part for part in (row.text("instruction"), given) if part.strip())
    return Question(row.id("id"), prompt, (answer,) if answer else ())


TASK = instruction_task(
    "self_instruct",
    "252 user-oriented instructions of Self-Instruct",
    read,
    columns="id, instruction, instances (a list of {input, output})",
    # the hub's own copy in Parquet: the data set itself is a script, which nobody should run
    data=Hub("yizhongw/self_instruct", file="human_eval/train/0000.parquet", revision="refs/convert/parquet"),
)
