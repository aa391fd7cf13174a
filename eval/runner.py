"""How does a model answer a task's questions? Pinned down once, asked turn by turn, nothing done twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from eval.datasets import load_questions
from eval.models import Opened
from eval.records import write_questions
from eval.suites import Job
from eval.task import Question
from shared.data.images import UNLIMITED, image_hash
from shared.data.prompts import split_by_length
from shared.durable import write_atomically
from shared.errors import DataError, StoreError
from shared.generation.collect import collect_responses
from shared.progress import Speaker
from shared.types import Request, Sample, Sampling


class Prepared(NamedTuple):
    """A job with its questions, in its folder."""

    job: Job
    questions: list[Question]
    clusters: list[str | None]  # hash of the images that a question is about
    folder: Path


def prepare(job: Job, folder: Path) -> Prepared:
    """Read a task's data and pin it down in the folder.

    Raises:
        DataError: data that cannot be used.
        StoreError: the folder holds the same task with another version, settings or questions.
    """
    task, settings = job
    folder = folder / task.name
    shown = settings.images == "shown"
    questions = load_questions(
        task, settings.data, limit=settings.limit, image_folder=folder / "images", find_images=shown
    )
    hashes = _Hashes()
    clusters = [hashes.of(question, shown=shown) for question in questions]
    if not shown:
        questions = [replace(question, images=()) for question in questions]
    identity = {
        "task": task.name,
        "version": task.version,
        "sampling": asdict(settings.sampling(task)),
        "samples": settings.samples,
        "images": settings.images if task.images else None,
        "over_length": settings.over_length,
        **({"teacher": settings.teacher} if settings.teacher else {}),
        "questions": len(questions),
        "sample_set": _digest(
            [
                [question.id, question.prompt, question.follow_ups, question.references, cluster]
                for question, cluster in zip(questions, clusters, strict=True)
            ]
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "replies").exists():  # a start that failed before a question was asked binds nothing
        (folder / "task.json").unlink(missing_ok=True)
    pin(folder / "task.json", identity)
    write_atomically(folder / "settings.json", settings.model_dump_json(indent=1))
    write_atomically(folder / "clusters.json", json.dumps(clusters))
    write_atomically(folder / "questions.jsonl", write_questions(questions))
    return Prepared(job, questions, clusters, folder)


def predict(prepared: Prepared, opened: Opened, *, batch_tokens: int, speaker: Speaker) -> None:
    """Make the replies that are missing, turn after turn.

    Raises:
        StoreError: replies of another model or setting are there.
        DataError: prompts that do not fit the model's context, unless they are to be dropped.
    """
    task, settings = prepared.job
    sampling = settings.sampling(task)
    questions = fitting(prepared, opened, sampling, speaker)
    images = dict(zip([question.id for question in prepared.questions], prepared.clusters, strict=True))

    def prompt_key(sample: Sample) -> object:
        # images by content: where the files lie does not matter
        chat = [[message.role, message.text] for message in sample.messages]
        return [chat, images[sample.id] if sample.images else None]

    said: dict[tuple[str, int], list[str]] = {}
    for turn in range(max(question.turns for question in questions)):
        requests = [
            Request(question.sample(task.family, said.get((question.id, draw), [])), "student", turn, draw)
            for question in questions
            if question.turns > turn
            for draw in range(settings.samples)
        ]
        what = task.name if turn == 0 else f"{task.name}, turn {turn + 1}"
        with speaker.bar(what) as bar:
            responses = collect_responses(
                opened.engine,
                requests,
                sampling,
                folder=prepared.folder / "replies" / f"turn-{turn + 1}",
                prompt_tokens=opened.prompt_tokens,
                batch_tokens=batch_tokens,
                identity={"task": task.name, "version": task.version, "model": opened.name},
                prompt_key=prompt_key,
                progress=lambda p: bar(p.batches_done, p.batches_total, p.speed),
            )
        cut = sum(response.finish_reason == "length" for response in responses)
        speaker.say(f"  {what}: {len(responses)} replies, {cut} cut by the length limit")
        for response in responses:
            said.setdefault((response.sample_id, response.draw), []).append(response.text)


def fitting(prepared: Prepared, opened: Opened, sampling: Sampling, speaker: Speaker) -> list[Question]:
    """The questions whose whole chat fits the context, replies at their longest: none is truncated."""
    if opened.context is None:
        return prepared.questions
    task, settings = prepared.job
    by_id = {question.id: question for question in prepared.questions}
    whole = [
        replace(question, prompt="\n".join((question.prompt, *question.follow_ups))).sample(task.family)
        for question in prepared.questions
    ]
    turns = max(question.turns for question in prepared.questions)
    try:
        split = split_by_length(
            whole,
            opened.prompt_tokens,
            max_prompt_tokens=opened.context - turns * sampling.max_new_tokens,
            on_over=settings.over_length,
        )
    except DataError as error:
        text = str(error).replace("generation.max_new_tokens", "max_new_tokens")
        text = text.replace("prompts.over_length: drop", "over_length=drop")
        raise DataError(f"{task.name}: {text}") from None
    if split.dropped:
        names = ", ".join(sample.id for sample, _ in split.dropped[:5])
        speaker.say(
            f"  {task.name}: left out {len(split.dropped)} prompts that do not fit the context: {names}"
        )
    return [by_id[sample.id] for sample in split.kept]


class _Hashes:
    """SHA-256 of image files, each read once."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def of(self, question: Question, *, shown: bool) -> str | None:
        """What questions about the same images share; their names where nobody looks at them."""
        if not question.images:
            return None
        names = [part.image for part in question.images]
        return " ".join(self._hash(name) if shown else name for name in names)

    def _hash(self, path: str) -> str:
        if path not in self._known:
            self._known[path] = image_hash(path, UNLIMITED)[:32]
        return self._known[path]


def pin(path: Path, identity: Mapping[str, Any]) -> None:
    """Write what a task's folder is of, or refuse it where it is of something else."""
    wanted = json.loads(json.dumps(identity))
    if not path.exists():
        write_atomically(path, json.dumps(wanted, indent=1))
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    lines = differences(found, wanted)
    if lines:
        raise StoreError(
            f"{path.parent} holds {found.get('task')} with other settings:\n  "
            + "\n  ".join(f"{key}: {there!r} there, {now!r} now" for key, there, now in lines)
            + "\nUse another --output, or delete this folder to start over."
        )


class Difference(NamedTuple):
    """A setting that two runs do not share."""

    key: str
    first: object
    second: object


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """The settings in which two descriptions differ, nested keys dotted."""
    one, two = _flat(first), _flat(second)
    missing = "(not set)"
    return [
        Difference(key, one.get(key, missing), two.get(key, missing))
        for key in sorted(one.keys() | two.keys())
        if one.get(key, missing) != two.get(key, missing)
    ]


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
