"""How do another harness's requests become ours? Every reply and log-likelihood is stored as it comes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from eval.models import Opened
from eval.settings import TaskSettings
from shared.errors import DataError, UserError
from shared.generation.collect import collect_responses
from shared.progress import Speaker
from shared.store import Store
from shared.types import FinishReason, Message, Request, Sample, Sampling, TaskName, Usage

DEFAULT_NEW_TOKENS = 256  # where the harness's task does not say, as lm_eval has it
LIKELIHOODS_A_PART = 256
LIKELIHOODS = "likelihoods"
_SCHEMA = pa.schema(
    [
        pa.field("log_likelihood", pa.float64(), nullable=False),  # nats
        pa.field("greedy", pa.bool_()),  # would the model have said just that? Null where it was not asked
    ]
)

Document = tuple[str, int]  # the harness's task, and the number of its document


class Asked(NamedTuple):
    """One thing that the harness asked about a document, and what came back."""

    prompt: str
    images: tuple[str, ...]
    reply: str
    finish_reason: FinishReason
    usage: Usage | None = None
    log_likelihood: float | None = None  # nats, of a continuation that was given


class Generation(NamedTuple):
    """One reply to be made. `settings` are the harness's: until, max_gen_toks, temperature ..."""

    document: Document
    number: int  # among the document's requests
    draw: int
    messages: tuple[Message, ...]
    settings: Mapping[str, Any]


class Asker:
    """Asks one model for one bridged task.

    Args:
        opened: The model.
        family: What kind of samples these are.
        settings: What is set here goes before what the harness says.
        folder: Of the task.
        identity: What must not change on resuming.
        batch_tokens: Prompt and reply tokens of one batch.
        speaker: Says how far it is.
    """

    def __init__(
        self,
        opened: Opened,
        family: TaskName,
        settings: TaskSettings,
        *,
        folder: Path,
        identity: Mapping[str, str],
        batch_tokens: int,
        speaker: Speaker,
    ) -> None:
        self.opened = opened
        self.batch_tokens = batch_tokens
        self.asked: dict[Document, list[Asked]] = {}
        self._family = family
        self._settings = settings
        self._folder = folder
        self._identity = identity
        self._speaker = speaker

    def generate(self, wanted: Sequence[Generation]) -> list[str]:
        """Replies, cut where the harness says."""
        replies: list[str] = [""] * len(wanted)
        groups: dict[Sampling, list[int]] = {}
        for place, one in enumerate(wanted):
            groups.setdefault(self._sampling(one.settings), []).append(place)
        for sampling, places in groups.items():
            requests = [self._request(wanted[place]) for place in places]
            self._refuse_too_long(requests, sampling)
            what = f"{self._identity['task']}, replies"
            with self._speaker.bar(what) as bar:
                responses = collect_responses(
                    self.opened.engine,
                    requests,
                    sampling,
                    folder=self._folder / "replies" / _digest([vars(sampling)]),
                    prompt_tokens=self.opened.prompt_tokens,
                    batch_tokens=self.batch_tokens,
                    identity=self._identity,
                    prompt_key=_content,
                    progress=lambda p: bar(p.batches_done, p.batches_total, p.speed),
                )
            for place, request, response in zip(places, requests, responses, strict=True):
                one = wanted[place]
                replies[place] = _cut(response.text, one.settings.get("until"))
                prompt = "\n\n".join(message.text for message in one.messages)
                self.asked.setdefault(one.document, []).append(
                    Asked(
                        prompt,
                        request.sample.images,
                        replies[place],
                        response.finish_reason,
                        response.usage,
                    )
                )
        return replies

    def likelihoods(
        self,
        documents: Sequence[Document],
        texts: Sequence[tuple[str, ...]],
        compute: Callable[[Sequence[int]], Sequence[tuple[float, bool | None]]],
    ) -> list[tuple[float, bool | None]]:
        """Log-likelihoods of texts, each the last one of its tuple after those before it.

        Args:
            documents: Which each belongs to.
            texts: Context and continuation, or a text alone.
            compute: Those with the numbers that it is given.
        """
        name = _digest(texts)
        store = Store.open(
            self._folder / LIKELIHOODS / name,
            kind=LIKELIHOODS,
            identity={**self._identity, "engine": self.opened.engine.fingerprint, "texts": name},
            schema=_SCHEMA,
        )
        starts = range(0, len(texts), LIKELIHOODS_A_PART)
        done = store.committed()
        with self._speaker.bar(f"{self._identity['task']}, likelihoods") as bar:
            for part, start in enumerate(starts):
                bar(part, len(starts))
                if part not in done:
                    found = compute(range(start, min(start + LIKELIHOODS_A_PART, len(texts))))
                    store.write(part, [{"log_likelihood": ll, "greedy": greedy} for ll, greedy in found])
        results = [(row["log_likelihood"], row["greedy"]) for row in store.read()]
        for document, pieces, (value, _) in zip(documents, texts, results, strict=True):
            asked = Asked("".join(pieces[:-1]), (), pieces[-1], "stop", log_likelihood=value)
            self.asked.setdefault(document, []).append(asked)
        return results

    def _request(self, one: Generation) -> Request:
        task, number = one.document
        name = f"{task}/{number}" + (f"/{one.number}" if one.number else "")
        sample = Sample(name, one.messages, self._family, source=name)
        if sample.images and not self.opened.engine.accepts_images:
            raise UserError(
                f"{self._identity['task']} shows images, and {self.opened.name} takes none. Name a "
                "vision-language model; of a server that takes images say model.accepts_images=true."
            )
        return Request(sample, "student", 0, one.draw)

    def _sampling(self, given: Mapping[str, Any]) -> Sampling:
        own = self._settings
        temperature = float(given.get("temperature") or 0.0)
        if given.get("do_sample") is False:
            temperature = 0.0
        elif given.get("do_sample") and given.get("temperature") is None:
            temperature = 1.0
        tokens = given.get("max_gen_toks") or given.get("max_new_tokens") or DEFAULT_NEW_TOKENS
        top_p, top_k = given.get("top_p"), given.get("top_k")
        return Sampling(
            max_new_tokens=own.max_new_tokens or int(tokens),
            temperature=temperature if own.temperature is None else own.temperature,
            top_p=own.top_p or (1.0 if top_p is None else float(top_p)),
            top_k=own.top_k if own.top_k is not None else int(top_k or 0),
            seed=own.seed or 0,
        )

    def _refuse_too_long(self, requests: Sequence[Request], sampling: Sampling) -> None:
        if self.opened.context is None:
            return
        room = self.opened.context - sampling.max_new_tokens
        for request in requests:
            length = self.opened.prompt_tokens(request.sample)
            if length > room:
                raise DataError(
                    f"{request.sample.id} has a prompt of {length} tokens; a context of "
                    f"{self.opened.context} with {sampling.max_new_tokens} for the reply leaves {room}. "
                    "Lower max_new_tokens or num_fewshot."
                )


def _content(sample: Sample) -> object:
    """A prompt with its images by content: their files are named by it."""
    return [
        [[message.role, message.text] for message in sample.messages],
        [Path(i).name for i in sample.images],
    ]


def _cut(text: str, until: object) -> str:
    """The text before the first of the harness's stop strings."""
    stops = [until] if isinstance(until, str) else list(until) if isinstance(until, list | tuple) else []
    for stop in stops:
        if stop:
            text = text.split(stop, 1)[0]
    return text


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
