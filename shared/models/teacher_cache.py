"""How does a student learn from a teacher that is not in memory? From a cache of its sparse signals.

A cache is a `Store` with one row a response. What the signals depend on is its identity: the teacher's
fingerprint, the adapter's (tokenizer, template), the shared vocabulary, prompts and responses. So a cache of
another teacher, or of responses that have been sampled anew since, is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from shared.adapter import Adapter
from shared.errors import StoreError, UserError
from shared.models.packed_signal import Packed, pack, summing_to_one, unpack
from shared.models.teachers import Dense, Signal, Sparse, Teacher
from shared.models.vocabulary import SharedVocabulary
from shared.objectives.signal import sparse_signal
from shared.store import DESCRIPTION, Store, adopt
from shared.training.plan import fill
from shared.types import Encoded, Group, Response, Sample

KIND = "teacher cache"
LOCK = "build.lock"
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("role", pa.string(), nullable=False),
        *(pa.field(name, pa.binary(), nullable=False) for name in Packed._fields),
    ]
)

PromptKey = Callable[[Sample], object]
"""What of a prompt its responses' signals depend on, as JSON; for images by their content."""

log = logging.getLogger(__name__)


class CacheSummary(NamedTuple):
    """What a cache holds, and what that costs."""

    responses: int
    tokens: int
    bytes_per_token: float  # on the disk
    covered_mass: Mapping[str, float]  # mean probability that is not in the tail, by the response's role


def messages_of(sample: Sample) -> object:
    """The default `PromptKey`: the chat, images by reference."""
    return asdict(sample)["messages"]


def build_cache(
    teacher: Teacher,
    groups: Sequence[Group],
    folder: Path,
    *,
    adapter: Adapter,
    vocabulary: SharedVocabulary,
    top_k: int,
    batch_tokens: int,
    prompt_key: PromptKey = messages_of,
    progress: Callable[[int, int], None] = lambda done, total: None,
    beside: Sequence[Path] = (),
    process: int = 0,
    processes: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> CacheSummary:
    """Make the signals that the cache in `folder` lacks; killed and started again, it goes on.

    Runs may share a cache one after the other; while one of them builds it, another is refused.

    Args:
        teacher: gives dense signals; it runs for what is missing only.
        groups: the samples with the responses to cache.
        folder: of the cache.
        adapter: the teacher's.
        vocabulary: what teacher and student share.
        top_k: ids kept at every token.
        batch_tokens: padded tokens of one pass.
        prompt_key: what identifies a prompt.
        progress: gets batches done and in all.
        beside: folders of caches whose signals are taken over if they are the very same.
        process: of this one; it makes the batches whose number is `process` modulo `processes`.
        processes: how many share the work; all call this with the same arguments.
        barrier: waits for all of them.

    Raises:
        StoreError: the folder holds a cache of another teacher, other responses or settings, or another run
            is building it.
    """
    lengths = [adapter.prompt_tokens(g.sample) + max(len(r.token_ids) for r in g.responses) for g in groups]
    by_length = sorted(range(len(groups)), key=lambda i: (lengths[i], i))
    widest = max((len(group.responses) for group in groups), default=1)
    batches = fill(by_length, lengths, batch_tokens // widest)
    identity = {
        **_known_identity(adapter, vocabulary, groups, prompt_key, top_k=top_k),
        "teacher": teacher.fingerprint,
        "batches": len(batches),
        "batch_tokens": batch_tokens,
    }
    if process == 0:
        adopt(folder, beside, kind=KIND, identity=identity)
    with _building(folder) if process == 0 else nullcontext():
        store = Store.open_together(
            folder, kind=KIND, identity=identity, schema=SCHEMA, first=process == 0, barrier=barrier
        )
        committed = store.committed()
        for part, batch in enumerate(batches):
            progress(part, len(batches))
            if part not in committed and part % processes == process:
                store.write(part, _rows(teacher, [groups[i] for i in batch], vocabulary, top_k, prompt_key))
        progress(len(batches), len(batches))
        barrier()
    summary = _summary(store, vocabulary)
    log.info("%s: %d responses, %.0f bytes a token", folder, summary.responses, summary.bytes_per_token)
    return summary


@contextmanager
def _building(folder: Path) -> Iterator[None]:
    """Keep others from building the same cache: each would remove what the other has not committed yet."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"another run is building the teacher cache in {folder}. Wait until it trains, then start "
                "again, or set teacher.cache.folder to another one."
            ) from None
        yield


class CachedTeacher:
    """A `Teacher` without a model: sparse signals out of a cache, which it holds in memory, packed."""

    reads_encodings = False

    def __init__(
        self,
        store: Store,
        *,
        fingerprint: str,
        vocabulary: SharedVocabulary,
        prompt_key: PromptKey,
        student_responses: bool,
        device: torch.device,
    ) -> None:
        self.fingerprint = fingerprint
        self._folder = store.folder
        self._packed = {row["key"]: Packed(*(row[name] for name in Packed._fields)) for row in store.read()}
        self._vocabulary = vocabulary
        self._prompt_key = prompt_key
        self._student_responses = student_responses
        self._device = device

    @classmethod
    def open(
        cls,
        folder: Path,
        groups: Sequence[Group],
        *,
        adapter: Adapter,
        vocabulary: SharedVocabulary,
        device: torch.device,
        teacher_fingerprint: str | None = None,
        student_responses: bool = False,
        prompt_key: PromptKey = messages_of,
    ) -> CachedTeacher:
        """The teacher that a cache was made of, for the groups that it was made for.

        Args:
            folder: of the cache.
            groups: as `build_cache` got them.
            adapter: the teacher's; it needs no weights.
            vocabulary: what teacher and student share.
            device: where signals are wanted.
            teacher_fingerprint: as `Teacher.fingerprint`, where it is known without loading the model.
            student_responses: give signals for the student's own responses, too, where a top-k signal
                shows much less of the divergence.
            prompt_key: as in `build_cache`.

        Raises:
            StoreError: no cache, an unfinished one, or one of something else; names each difference.
        """
        path = folder / DESCRIPTION
        try:
            stored: dict[str, Any] = json.loads(path.read_bytes())["identity"]
            top_k, batches, fingerprint = stored["top_k"], int(stored["batches"]), str(stored["teacher"])
        except FileNotFoundError:
            raise StoreError(f"{folder} holds no teacher cache. Build it with the teacher first.") from None
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(
                f"{path} cannot be read ({error!r}). Delete the cache and build it anew."
            ) from None
        known = _known_identity(adapter, vocabulary, groups, prompt_key, top_k=top_k)
        if teacher_fingerprint is not None:
            known["teacher"] = teacher_fingerprint
        store = Store.open(folder, kind=KIND, identity=stored | known, schema=SCHEMA, repair=False)
        missing = batches - len(store.committed())
        if missing:
            raise StoreError(
                f"{folder} lacks {missing} of {batches} batches of signals. Build it again with "
                "the teacher: what is there is kept."
            )
        return cls(
            store,
            fingerprint=fingerprint,
            vocabulary=vocabulary,
            prompt_key=prompt_key,
            student_responses=student_responses,
            device=device,
        )

    def signal(self, groups: Sequence[Group], encoded: Encoded | None) -> Signal:
        """The sparse signal at the response rows of the groups; `encoded` is not needed.

        Raises:
            StoreError: a response that the cache does not have.
            UserError: a student's response, and these were not asked for.
        """
        del encoded
        parts = [self._of(group.sample, response) for group in groups for response in group.responses]
        return Sparse(*(torch.cat(columns).to(self._device) for columns in zip(*parts, strict=True)))

    def _of(self, sample: Sample, response: Response) -> Sparse:
        if response.role == "student" and not self._student_responses:
            raise UserError(
                f"sample {sample.id!r}: a student's response, and the teacher is cached. Top-k signals show "
                "only about half of the divergence on a student's own responses, so they are not used for "
                "them unless asked. Load the teacher, choose an objective without student responses, or ask "
                "for it (student_responses)."
            )
        packed = self._packed.get(_key(sample, response, self._prompt_key))
        if packed is None:
            raise StoreError(
                f"{self._folder} has no signal for sample {sample.id!r}, {response.role}'s response: it is "
                "another one than the cache was built for. Build the cache again with the teacher."
            )
        try:
            sparse = unpack(packed, vocabulary=self._vocabulary.width)
        except ValueError as error:
            raise StoreError(f"{self._folder}: {error}. Delete the cache and build it anew.") from None
        return summing_to_one(sparse, torch.tensor(response.token_ids))


def _known_identity(
    adapter: Adapter,
    vocabulary: SharedVocabulary,
    groups: Sequence[Group],
    prompt_key: PromptKey,
    *,
    top_k: object,
) -> dict[str, Any]:
    """What is known of a cache without the teacher's weights."""
    keys = [_key(group.sample, response, prompt_key) for group in groups for response in group.responses]
    return {
        "adapter": adapter.fingerprint,
        "vocabulary": {"width": vocabulary.width, "excluded": _digest(vocabulary.excluded_ids)},
        "responses": {"count": len(keys), "digest": _digest(sorted(keys))},
        "top_k": top_k,
    }


def _key(sample: Sample, response: Response, prompt_key: PromptKey) -> str:
    return _digest([sample.id, prompt_key(sample), response.role, response.token_ids])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _rows(
    teacher: Teacher,
    groups: Sequence[Group],
    vocabulary: SharedVocabulary,
    top_k: int,
    prompt_key: PromptKey,
) -> list[dict[str, Any]]:
    dense = teacher.signal(groups, None)
    assert isinstance(dense, Dense), "a cache is built from whole distributions"
    owners = [(group.sample, response) for group in groups for response in group.responses]
    targets = [token for _, response in owners for token in response.token_ids]
    sparse = sparse_signal(dense, torch.tensor(targets, device=dense.hidden_NE.device), top_k=top_k)
    lengths = [len(response.token_ids) for _, response in owners]
    columns = [torch.split(column, lengths) for column in sparse]
    return [
        {
            "key": _key(sample, response, prompt_key),
            "role": response.role,
            **pack(Sparse(*part), vocabulary=vocabulary.width)._asdict(),
        }
        for (sample, response), *part in zip(owners, *columns, strict=True)
    ]


def _summary(store: Store, vocabulary: SharedVocabulary) -> CacheSummary:
    responses = tokens = 0
    covered: dict[str, list[Tensor]] = {}
    for row in store.read():
        sparse = unpack(Packed(*(row[name] for name in Packed._fields)), vocabulary=vocabulary.width)
        responses += 1
        tokens += len(sparse.log_tail_N)
        covered.setdefault(row["role"], []).append(sparse.covered_N)
    size = sum(path.stat().st_size for path in store.folder.glob("part-*.parquet"))
    means = {role: float(torch.cat(parts).mean()) for role, parts in covered.items()}
    return CacheSummary(responses, tokens, size / max(1, tokens), means)
