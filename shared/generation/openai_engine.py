"""How does a model behind an OpenAI-compatible server make responses: chat completions, many at a time.

vLLM, llama.cpp's server, Ollama, `transformers serve` and the commercial services speak this protocol. The
server renders its own chat template and stops where it will, so token ids are not to be had: a response that
is trained on is tokenised once, from its text.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol, TypeVar

from pydantic import SecretStr

from shared.errors import UserError
from shared.generation.rendering import estimated_tokens, render_messages
from shared.generation.transport import Answer, Cancelled, Endpoint, MalformedReplyError, error_text
from shared.models.references import ServerRef
from shared.types import FinishReason, Request, Response, Sample, Sampling, Usage

_FINISH_REASONS: Mapping[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_calls": "stop",  # none was offered; the model ended its turn all the same
    "length": "length",
    "max_tokens": "length",
    "content_filter": "filtered",
}

Item = TypeVar("Item")
Result = TypeVar("Result")


class TextEncoder(Protocol):
    """Tokenises answers; every Adapter is one."""

    fingerprint: str

    def encode_text(self, text: str, *, stop: bool) -> tuple[int, ...]:
        """Token ids of an answer, ending with the turn's end if `stop`."""
        ...


class OpenAIEngine:
    """Asks a server, `ref.concurrency` requests at a time.

    Args:
        ref: The server, its model and how to treat it.
        encoder: Tokenises the answers, once; without one they have no token ids, which evaluation needs not.

    Raises:
        UserError: the environment variable with the key is not set, or its value cannot be a key.
    """

    returns_token_ids = False

    def __init__(self, ref: ServerRef, *, encoder: TextEncoder | None = None) -> None:
        self.accepts_images = ref.accepts_images
        self._ref = ref
        self._encoder = encoder
        self._endpoint = Endpoint(
            f"{ref.url}/chat/completions",
            key=_key(ref.api_key_env),
            timeout_s=ref.timeout_s,
            attempts=ref.attempts,
            backoff_s=ref.backoff_s,
        )
        # everything that changes an answer, and neither the key nor how patiently it is asked for
        self.fingerprint = _digest(
            [
                "chat/completions",
                ref.url,
                ref.model,
                ref.system_prompt,
                ref.max_tokens_name,
                ref.send_seed,
                ref.extra_body,
                None if encoder is None else encoder.fingerprint,
            ]
        )

    def prompt_tokens(self, sample: Sample) -> int:
        """An estimate, to plan batches with: the server's tokenizer is elsewhere."""
        return estimated_tokens(sample)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Response]:
        """One response for each request, in their order, as soon as those before it are there.

        Raises:
            UserError: images for a model that takes none, or images that are not there.
            ServerError: the server refuses a request, or fails however often it is asked.
        """
        if not self.accepts_images:
            for request in requests:
                _refuse_images(request.sample, self._ref)
        fingerprint = _digest([self.fingerprint, asdict(sampling)])

        def ask(request: Request, cancelled: threading.Event) -> Answer[_Completion]:
            return self._endpoint.ask(self._body(request, sampling), _completion, cancelled)

        with closing(_in_order(ask, requests, workers=self._ref.concurrency)) as answers:
            for request, answer in zip(requests, answers, strict=True):
                # tokenised here, not in a thread: tokenizers are not safe there
                yield self._response(request, answer, fingerprint)

    def _body(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._ref.model,
            "messages": render_messages(request.sample, system_prompt=self._ref.system_prompt),
            self._ref.max_tokens_name: sampling.max_new_tokens,
            "temperature": sampling.temperature,
            **self._ref.extra_body,
        }
        if sampling.temperature > 0:
            body["top_p"] = sampling.top_p
            if sampling.top_k:  # no field of OpenAI's, which refuses it; the open servers know it
                body["top_k"] = sampling.top_k
            if self._ref.send_seed:
                body["seed"] = _seed(request, sampling.seed)
        return body

    def _response(self, request: Request, answer: Answer[_Completion], fingerprint: str) -> Response:
        text, finish_reason, prompt_tokens, response_tokens = answer.value
        stopped = finish_reason == "stop"
        return Response(
            sample_id=request.sample.id,
            role=request.role,
            round=request.round,
            draw=request.draw,
            token_ids=() if self._encoder is None else self._encoder.encode_text(text, stop=stopped),
            text=text,
            finish_reason=finish_reason,
            fingerprint=fingerprint,
            usage=Usage(prompt_tokens, response_tokens, answer.seconds, answer.attempts),
        )


class _Completion(NamedTuple):
    text: str
    finish_reason: FinishReason
    prompt_tokens: int | None
    response_tokens: int | None


def _completion(reply: Mapping[str, Any]) -> _Completion:
    """The first choice of a chat completion, or MalformedReplyError."""
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        said = error_text(reply)[:300] if reply.get("error") else f"its keys are {sorted(reply)[:8]}"
        raise MalformedReplyError(f"the reply has no choices; {said}")
    message = choices[0].get("message")
    if not isinstance(message, dict):
        raise MalformedReplyError("the reply's choice has no message")
    reason = choices[0].get("finish_reason")
    if not isinstance(reason, str) or reason not in _FINISH_REASONS:
        raise MalformedReplyError(f"finish_reason is {reason!r}; known: {', '.join(_FINISH_REASONS)}")
    usage = reply.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return _Completion(
        _text(message),
        _FINISH_REASONS[reason],
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
    )


def _text(message: Mapping[str, Any]) -> str:
    """The answer; empty where the model said nothing, as when its reasoning used up the limit."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        refusal = message.get("refusal")
        return refusal if isinstance(refusal, str) else ""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return "".join(str(part.get("text", "")) for part in content if part.get("type") == "text")
    raise MalformedReplyError(f"the message's content is a {type(content).__name__}")


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _in_order(
    work: Callable[[Item, threading.Event], Result], items: Sequence[Item], *, workers: int
) -> Generator[Result, None, None]:
    """`work` on all items by some threads; yields in order, and the first failure ends everything.

    The threads are daemons: neither an exception nor Ctrl-C waits for a request that is still on its way.
    """
    waiting = iter(list(enumerate(items)))
    taking, cancelled = threading.Lock(), threading.Event()
    finished: queue.SimpleQueue[tuple[int, Result | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        while not cancelled.is_set():
            with taking:
                index, item = next(waiting, (None, None))
            if index is None:
                return
            try:
                finished.put((index, work(item, cancelled), None))  # type: ignore[arg-type]
            except Cancelled:
                return
            except BaseException as error:  # handed to the caller's thread, which raises it
                finished.put((index, None, error))

    for _ in range(min(workers, len(items))):
        threading.Thread(target=run, name="chat-completions", daemon=True).start()
    results: dict[int, Any] = {}
    try:
        for index in range(len(items)):
            while index not in results:
                done, result, error = finished.get()
                if error is not None:
                    raise error
                results[done] = result
            yield results.pop(index)
    finally:
        cancelled.set()


def _refuse_images(sample: Sample, ref: ServerRef) -> None:
    if sample.images:
        raise UserError(
            f"sample {sample.id!r} ({sample.source}) has images, and the server's model {ref.model!r} is "
            "said to take none. Set accepts_images: true if it does, or choose another model."
        )


def _key(variable: str | None) -> SecretStr | None:
    if variable is None:
        return None
    value = os.environ.get(variable, "").strip()
    if not value:
        raise UserError(
            f"the environment variable {variable} is not set; api_key_env says it holds the API key."
        )
    if not value.isascii() or not value.isprintable() or " " in value:
        # a header cannot hold it, and the error of http.client would print it
        raise UserError(f"the value of the environment variable {variable} cannot be an API key.")
    return SecretStr(value)


def _seed(request: Request, seed: int) -> int:
    """31 bits, which every server takes: the response's own noise, as the local engine has it."""
    named = f"{seed}\0{request.round}\0{request.role}\0{request.draw}\0{request.sample.id}"
    return int.from_bytes(hashlib.sha256(named.encode()).digest()[:4], "little") >> 1


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
