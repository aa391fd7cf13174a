"""How do replies become records and scores? From what is in the folder alone, as often as one likes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from eval.records import Record, RecordStore, open_replies, read_questions, scores
from eval.settings import TaskSettings
from eval.task import Question, Reply, Scored, Task
from shared.durable import write_atomically
from shared.errors import StoreError
from shared.generation.collect import RESPONSE_SCHEMA, STORE_KIND, read_responses
from shared.progress import Speaker
from shared.store import JSON
from shared.types import Response

PART, COSTLY_PART = 4096, 64  # replies whose records are committed together; where each takes a while


class Bench:
    """What scorers may ask for (`eval.task.Tools`)."""

    def __init__(self, sandbox: Callable[[], Any], clip_model: str | None) -> None:
        self._make_sandbox = sandbox
        self.clip_model = clip_model

    @property
    def sandbox(self) -> Any:
        """Runs programs that a model wrote."""
        return self._make_sandbox()


def sandbox_maker(*, allow_unsafe_execution: bool) -> Callable[[], Any]:
    """Makes one sandbox when it is first asked for.

    Calling it raises SandboxError where no isolation works and unsafe execution was not asked for.
    """

    @cache
    def make() -> Any:
        from eval.sandbox.runner import Sandbox

        return Sandbox(allow_unsafe_execution=allow_unsafe_execution)

    return make


class Judged(NamedTuple):
    """A judge's values for each reply, and its figures as JSON."""

    values: Sequence[Mapping[str, float]]
    summary: Mapping[str, Any]


Judging = Callable[[Sequence[Reply], Path], Judged]


def score_task(
    folder: Path,
    task: Task,
    settings: TaskSettings,
    sandbox: Callable[[], Any],
    *,
    speaker: Speaker,
    judging: Judging | None = None,
    anew: bool = False,
) -> dict[str, Any]:
    """Score the replies in a task's folder, write `scores.json`, return it.

    Args:
        folder: Of the task.
        task: Scores.
        settings: What scoring depends on: the judge, the CLIP model.
        sandbox: Makes it when it is needed.
        speaker: Says how far it is.
        judging: A judge's opinions on the replies, where one was asked for.
        anew: Score what was scored before too.

    Raises:
        StoreError: replies of another version of the task, or not all of them.
    """
    pinned = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    if pinned["version"] != task.version:
        raise StoreError(
            f"{folder} holds replies to version {pinned['version']} of {task.name}, which is at version "
            f"{task.version} now. Run it into another folder."
        )
    answered = _read_replies(folder)
    judged = judging([reply for reply, _ in answered], folder / "judge") if judging else None
    size = COSTLY_PART if task.runs_code or settings.clip_model else PART
    identity: dict[str, JSON] = {
        "task": task.name,
        "version": task.version,
        "replies": _digest([[*reply.texts, made[-1].fingerprint] for reply, made in answered]),
        "judge": settings.judge.model_dump() if settings.judge else None,
        "clip_model": settings.clip_model,
        "part": size,
    }
    store = RecordStore(folder, identity, anew=anew)
    bench = Bench(sandbox, settings.clip_model)
    _score_parts(store, answered, size, task, bench, judged, _clusters(folder), speaker)
    result = _summary(task, pinned, store.read(), judged)
    write_atomically(folder / "scores.json", json.dumps(result, indent=1, allow_nan=False))
    return result


def write_records(
    folder: Path,
    task: Task,
    records: Sequence[Record],
    identity: Mapping[str, JSON],
    *,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write records that a runner made, and `scores.json`; return the latter.

    Args:
        folder: Of the task, pinned down in `task.json`.
        task: With the metrics of the records.
        records: All of them.
        identity: What they depend on beside the task.
        more: Scores that are no means over records.
    """
    pinned = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    scored_by: dict[str, JSON] = {"judge": None, "clip_model": None}
    store = RecordStore(
        folder, {"task": task.name, "version": task.version, **scored_by, **identity}, anew=True
    )
    for part, start in enumerate(range(0, len(records), PART)):
        store.write(part, records[start : start + PART])
    result = _summary(task, pinned, records, None)
    result["scores"] |= more or {}
    write_atomically(folder / "scores.json", json.dumps(result, indent=1, allow_nan=False))
    return result


class _Answered(NamedTuple):
    reply: Reply
    responses: Sequence[Response]  # one a turn


def _score_parts(
    store: RecordStore,
    answered: Sequence[_Answered],
    size: int,
    task: Task,
    bench: Bench,
    judged: Judged | None,
    clusters: Mapping[str, str | None],
    speaker: Speaker,
) -> None:
    done = store.committed()
    starts = range(0, len(answered), size)
    with speaker.bar(f"{task.name}, scoring") as bar:
        for part, start in enumerate(starts):
            bar(part, len(starts))
            if part in done:
                continue
            rows = answered[start : start + size]
            extra = judged.values[start : start + size] if judged else [{}] * len(rows)
            found = task.score([row.reply for row in rows], bench)
            store.write(
                part,
                [
                    _record(row, scored, more, clusters[row.reply.question.id])
                    for row, scored, more in zip(rows, found, extra, strict=True)
                ],
            )


def _record(row: _Answered, scored: Scored, judged: Mapping[str, float], cluster: str | None) -> Record:
    question, replies = row.reply.question, row.reply.texts
    usages = [response.usage for response in row.responses]
    return Record(
        sample_id=question.id,
        draw=row.reply.draw,
        prompt=_transcript(question, replies),
        images=tuple(part.image for part in question.images),
        references=question.references,
        replies=replies,
        finish_reasons=row.reply.finish_reasons,
        answer=scored.answer,
        values={**scored.values, **judged},
        note=scored.note,
        cluster=cluster,
        prompt_tokens=total(usage and usage.prompt_tokens for usage in usages),
        reply_tokens=total(usage and usage.response_tokens for usage in usages),
        seconds=total(usage and usage.seconds for usage in usages),
    )


def _transcript(question: Question, replies: Sequence[str]) -> str:
    """The chat up to the last reply; a single turn is just its text."""
    text = question.prompt
    for reply, following in zip(replies, question.follow_ups, strict=False):
        text += f"\n\nAssistant:\n{reply}\n\nUser:\n{following}"
    return text


def _summary(
    task: Task, pinned: Mapping[str, Any], records: Sequence[Record], judged: Judged | None
) -> dict[str, Any]:
    last = [record.finish_reasons[-1] for record in records]
    return {
        **pinned,
        "replies": len(records),
        "scores": scores(task, records),
        "finish_reasons": {name: last.count(name) for name in sorted(set(last))},
        "prompt_tokens": total(record.prompt_tokens for record in records),
        "reply_tokens": total(record.reply_tokens for record in records),
        "seconds": total(record.seconds for record in records),
        **({} if judged is None else {"judge": judged.summary}),
    }


def _read_replies(folder: Path) -> list[_Answered]:
    """In the order of questions and draws."""
    questions = read_questions(folder / "questions.jsonl")
    made: dict[str, dict[int, list[Response]]] = {}
    for turn in range(max(question.turns for question in questions)):
        store = open_replies(folder / "replies" / f"turn-{turn + 1}", RESPONSE_SCHEMA, STORE_KIND)
        for response in read_responses(store):
            made.setdefault(response.sample_id, {}).setdefault(response.draw, []).append(response)
    answered = []
    for question in questions:
        for draw, responses in sorted(made.get(question.id, {}).items()):
            if len(responses) != question.turns:
                raise StoreError(
                    f"{folder}: {question.id!r} has {len(responses)} of {question.turns} replies. Finish it "
                    "first: the same distill-eval run command goes on where it was."
                )
            texts = tuple(response.text for response in responses)
            reasons = tuple(response.finish_reason for response in responses)
            answered.append(_Answered(Reply(question, texts, reasons, draw), responses))
    return answered


def _clusters(folder: Path) -> dict[str, str | None]:
    names = [question.id for question in read_questions(folder / "questions.jsonl")]
    return dict(zip(names, json.loads((folder / "clusters.json").read_text(encoding="utf-8")), strict=True))


def total(values: Iterable[Any]) -> Any:
    """The sum, or None where a part of it is not known."""
    known = list(values)
    return None if any(value is None for value in known) else sum(known)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
