"""How are many responses made so that nothing is lost or done twice: planned batches into a store."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from shared.data.images import ContentKeys
from shared.errors import StoreError
from shared.generation.engine import Engine
from shared.generation.plan import plan_batches
from shared.store import JSON, Store, adopt
from shared.types import Request, Response, Sample, Sampling, Usage

STORE_KIND = "responses"
RESPONSE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("role", pa.string(), nullable=False),
        pa.field("round", pa.int32(), nullable=False),
        pa.field("draw", pa.int32(), nullable=False),
        pa.field("token_ids", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("fingerprint", pa.string(), nullable=False),
        pa.field(
            "usage",
            pa.struct(
                [
                    pa.field("prompt_tokens", pa.int64()),
                    pa.field("response_tokens", pa.int64()),
                    pa.field("seconds", pa.float64(), nullable=False),
                    pa.field("attempts", pa.int32(), nullable=False),
                ]
            ),
        ),
    ]
)


class Progress(NamedTuple):
    """How far a collection is, after each batch. Tokens and seconds are of this process since it started."""

    batches_done: int  # of all processes as far as known: committed before, and by this process
    batches_total: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Response tokens made per second; 0 before the first batch."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def speed(self) -> str:
        """The same for a progress bar, which says nothing as long as no batch is done."""
        return f"{self.tokens_per_second:.0f} tokens/s" if self.tokens else ""


def collect_responses(
    engine: Engine,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    folder: Path,
    prompt_tokens: Callable[[Sample], int],
    batch_tokens: int,
    identity: Mapping[str, JSON] | None = None,
    prompt_key: Callable[[Sample], object] | None = None,
    progress: Callable[[Progress], None] | None = None,
    beside: Sequence[Path] = (),
    adopted: Callable[[Path], None] = lambda folder: None,
    process: int = 0,
    processes: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> list[Response]:
    """Make the responses that the store in `folder` lacks; return all, in the order of the requests.

    Each planned batch is committed whole, so a process killed at any moment (or Ctrl-C) loses at most the
    batch at hand; started again, it makes the same responses as an uninterrupted one would have.

    Args:
        engine: Makes the responses.
        requests: All different.
        sampling: How they are drawn.
        folder: Of the store.
        prompt_tokens: Length of a sample's prompt in the engine's model.
        batch_tokens: Budget of a batch, see `plan_batches`.
        identity: Further values that must not change on resuming (model name, dtype), by the names used in
            messages.
        prompt_key: What of a prompt must not change, as JSON; by default its messages, images by content.
        progress: Called at the start and after each batch.
        beside: Folders of stores whose responses are taken over if all that makes them is the same.
        adopted: Called with the one of them that was.
        process: Index of this process; it makes the batches whose number is `process` modulo `processes`.
        processes: How many share the store; all must call this with the same arguments.
        barrier: Waits for all processes.

    Raises:
        StoreError: the folder holds responses of another engine, prompt set, setting or plan.
        UserError: full disk, or what the engine raises.
    """
    prompt_key = prompt_key or ContentKeys()
    keys = [_key(request) for request in requests]
    assert len(set(keys)) == len(keys), "the same response is requested twice"
    batches = plan_batches(
        requests,
        [prompt_tokens(request.sample) for request in requests],
        batch_tokens=batch_tokens,
        max_new_tokens=sampling.max_new_tokens,
    )
    described = {
        **(identity or {}),
        "engine": engine.fingerprint,
        **({} if engine.returns_token_ids else {"token_ids": "re-tokenised text"}),
        "sampling": asdict(sampling),
        "batch_tokens": batch_tokens,
        "requests": len(requests),
        "roles": sorted({request.role for request in requests}),
        "rounds": sorted({request.round for request in requests}),
        "prompts": _digest(
            [(*key, prompt_key(request.sample)) for key, request in zip(keys, requests, strict=True)]
        ),
        "plan": _digest(batches),
    }
    if process == 0 and (source := adopt(folder, beside, kind=STORE_KIND, identity=described)) is not None:
        adopted(source)
    store = Store.open_together(
        folder,
        kind=STORE_KIND,
        identity=described,
        schema=RESPONSE_SCHEMA,
        first=process == 0,
        barrier=barrier,
    )
    committed = store.committed()
    for part in sorted(committed):
        _check_part(store, part, [keys[index] for index in batches[part]] if part < len(batches) else [])

    done, tokens, started = len(committed), 0, time.monotonic()

    def report() -> None:
        if progress is not None:
            progress(Progress(done, len(batches), tokens, time.monotonic() - started))

    report()
    for part, batch in enumerate(batches):
        if part in committed or part % processes != process:
            continue
        made = {
            _key(response): response for response in engine.generate([requests[i] for i in batch], sampling)
        }
        assert set(made) == {keys[i] for i in batch}, "an engine must answer exactly what it was asked"
        store.write(part, [asdict(made[keys[i]]) for i in batch])
        done += 1
        tokens += sum(len(response.token_ids) for response in made.values())
        report()
    barrier()
    by_key = {_key(response): response for response in read_responses(store)}
    return [by_key[key] for key in keys]


def read_responses(store: Store) -> list[Response]:
    """All responses of a store, in the order of its parts."""
    return [_response(row) for row in store.read()]


def _response(row: Mapping[str, Any]) -> Response:
    usage = None if row["usage"] is None else Usage(**row["usage"])
    return Response(**{**row, "token_ids": tuple(row["token_ids"]), "usage": usage})


Key = tuple[str, str, int, int]


def _key(item: Request | Response) -> Key:
    sample_id = item.sample.id if isinstance(item, Request) else item.sample_id
    return (sample_id, item.role, item.round, item.draw)


def _check_part(store: Store, part: int, planned: Sequence[Key]) -> None:
    found = [(row["sample_id"], row["role"], row["round"], row["draw"]) for row in store.read(part)]
    if found != list(planned):
        raise StoreError(
            f"part {part} of {store.folder} holds other responses than the plan says ({found[:2]} ..., "
            f"planned {list(planned)[:2]} ...). Delete this part to have it redone."
        )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
