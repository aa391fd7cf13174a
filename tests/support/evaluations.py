"""Evaluations for tests: data files, an engine that answers as told, and runs of both."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from eval.evaluation import evaluate
from eval.models import Opened
from shared.generation.rendering import estimated_tokens
from shared.progress import Speaker
from shared.types import Request, Response, Sample, Sampling

QUIET = Speaker(quiet=True)
Say = Callable[[Request], str]


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def png(grey: int) -> bytes:
    """A small picture, another one for each shade up to 255."""
    file = io.BytesIO()
    Image.new("L", (2, 2), grey).save(file, "PNG")
    return file.getvalue()


def sums(folder: Path, count: int = 5) -> str:
    """`gsm8k` rows: 0 + 1, 1 + 1, ..."""
    rows = [{"question": f"What is {i} plus 1?", "answer": f"Count.\n#### {i + 1}"} for i in range(count)]
    return str(write_rows(folder / "sums.jsonl", rows))


class ToldEngine:
    """Answers with what `say` says; counts the requests, and dies before the one numbered `dies_at`."""

    returns_token_ids = False
    accepts_images = True

    def __init__(self, say: Say, *, name: str = "told", dies_at: int | None = None) -> None:
        self.fingerprint = name
        self.asked: list[Request] = []
        self._say = say
        self._dies_at = dies_at

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Response]:
        """One response a request."""
        for request in requests:
            if len(self.asked) == self._dies_at:
                raise KeyboardInterrupt
            self.asked.append(request)
            yield Response(
                request.sample.id, request.role, request.round, request.draw, (), self._say(request), "stop",
                self.fingerprint,
            )  # fmt: skip


def told_model(monkeypatch, engine: ToldEngine) -> None:
    """Let every model that is opened be this one."""

    def tokens(sample: Sample) -> int:
        return estimated_tokens(sample)

    opened = Opened("told", engine, tokens, None, {})
    monkeypatch.setattr("eval.evaluation.open_model", lambda *_, **__: opened)
    monkeypatch.setattr("eval.evaluation.require_images", lambda *_: None)
    monkeypatch.setattr("eval.judging.open_model", lambda *_, **__: opened)


def run_tasks(model: str, *words: str, output: Path, batch_tokens: int = 8192, **options):
    """`distill-eval run`, quiet."""
    defaults = {"dtype": "float32", "device": "cpu", "includes": [], "allow_unsafe_execution": False}
    return evaluate(
        model, words, output=output, batch_tokens=batch_tokens, speaker=QUIET, **{**defaults, **options}
    )
