"""How is work kept so that a killed run loses nothing: the resumable, append-only Parquet store.

A store is a folder: `store.json` says what it holds (format, kind, identity) and each `part-NNNNN.parquet` is
one committed batch of the caller's plan. A part is written under a temporary name, flushed to the disk and
renamed, so it is either whole or absent. The plan being a pure function of the identity, a part's number says
which work it holds, and an absent part is redone whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.durable import TEMPORARY, committed_file, committed_folder
from shared.errors import StoreError

FORMAT = 1
DESCRIPTION = "store.json"
JSON = None | bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"]

_DAMAGED = ".damaged"
_PART_NAME = re.compile(r"part-(\d{5,})\.parquet")

log = logging.getLogger(__name__)


class Store:
    """Rows of one schema in numbered parts. Open one with `Store.open`."""

    def __init__(self, folder: Path, schema: pa.Schema, digest: str) -> None:
        self.folder = folder
        self._schema = schema
        self._digest = digest

    @classmethod
    def open(
        cls, folder: Path, *, kind: str, identity: Mapping[str, JSON], schema: pa.Schema, repair: bool = True
    ) -> Store:
        """Create a store, or reopen the one in `folder`.

        Args:
            folder: Of this store alone.
            kind: What the rows are, e.g. "responses".
            identity: Everything that must not change between openings, by readable names.
            schema: Of the rows; declare what is never absent as not nullable.
            repair: Remove what a killed process left and set damaged parts aside. Every part is read once.
                Where several processes share a store, the first one repairs before the others open it.

        Raises:
            StoreError: the folder holds another kind, format or identity; the message names each difference.
            UserError: the disk is full.
        """
        described = _described(kind, identity)
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        store = cls(folder, schema, digest)
        folder.mkdir(parents=True, exist_ok=True)
        if repair:
            for leftover in folder.glob(f"*{TEMPORARY}"):
                leftover.unlink(missing_ok=True)
        path = folder / DESCRIPTION
        if path.exists():
            _refuse_other(path, described)
        elif store.committed():
            raise StoreError(f"{folder} holds parts but no {DESCRIPTION}. {_NEXT_STEP}")
        else:
            with committed_file(path) as file:
                file.write(json.dumps(described, indent=2, ensure_ascii=False).encode())
        if repair:
            store._set_damaged_aside()
        return store

    @classmethod
    def open_together(
        cls,
        folder: Path,
        *,
        kind: str,
        identity: Mapping[str, JSON],
        schema: pa.Schema,
        first: bool,
        barrier: Callable[[], None],
    ) -> Store:
        """As `open`, by all processes of a run; the first repairs what a killed run left before any other."""
        if not first:
            barrier()
        store = cls.open(folder, kind=kind, identity=identity, schema=schema, repair=first)
        if first:
            barrier()
        barrier()  # nobody writes while another one still lists what is committed
        return store

    def committed(self) -> set[int]:
        """The numbers of the parts that are there, whole."""
        matches = (_PART_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return {int(match[1]) for match in matches if match}

    def write(self, part: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Commit one whole batch of the plan.

        Raises:
            UserError: the disk is full; nothing that was committed is lost.
        """
        path = self._path(part)
        assert not path.exists(), f"part {part} of {self.folder} is written twice"
        names = set(self._schema.names)
        assert all(set(row) == names for row in rows), (
            f"rows of {path} need exactly the columns {sorted(names)}"
        )
        schema = self._schema.with_metadata({"store": self._digest, "part": str(part)})
        table = pa.Table.from_pylist(list(rows), schema=schema)
        with committed_file(path) as file:
            pq.write_table(table, file, compression="zstd", write_page_checksum=True)

    def read(self, part: int | None = None) -> Iterator[dict[str, Any]]:
        """The rows of one part, or of all parts in the order of their numbers.

        Raises:
            StoreError: a part was damaged after the store was opened.
        """
        for number in sorted(self.committed()) if part is None else (part,):
            try:
                for batch in self._batches(number):
                    yield from batch.to_pylist()
            except (pa.ArrowException, OSError, ValueError) as error:
                raise StoreError(
                    f"{self._path(number)} cannot be read: {error}. Start again: the damaged part is redone."
                ) from error

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.parquet"

    def _batches(self, part: int) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(self._path(part), page_checksum_verification=True) as file:
            schema = file.schema_arrow
            expected = {b"store": self._digest.encode(), b"part": str(part).encode()}
            found = {key: (schema.metadata or {}).get(key) for key in expected}
            if found != expected or not schema.equals(self._schema):
                raise ValueError("it was written for another store or part")
            yield from file.iter_batches()

    def _set_damaged_aside(self) -> None:
        for part in sorted(self.committed()):
            path = self._path(part)
            try:
                for _ in self._batches(part):
                    pass
            except (pa.ArrowException, OSError, ValueError) as error:
                aside = path.with_name(path.name + _DAMAGED)
                os.replace(path, aside)
                log.warning("%s is damaged (%s); set aside as %s and redone", path, error, aside.name)


def adopt(folder: Path, beside: Iterable[Path], *, kind: str, identity: Mapping[str, JSON]) -> Path | None:
    """Copy the parts of another store of the very same kind and identity, where this one is not begun.

    Args:
        folder: Of this store.
        beside: Folders that may hold such a store; the one with the most parts is taken.
        kind: As for `Store.open`.
        identity: As for `Store.open`.

    Returns:
        The folder that was copied, or None.

    Raises:
        UserError: the disk is full.
    """
    if folder.exists():
        return None
    described = _described(kind, identity)
    parts = {path: sorted(path.glob("part-*.parquet")) for path in beside if _is_described(path, described)}
    if not any(parts.values()):
        return None
    fullest = max(parts, key=lambda path: len(parts[path]))
    with committed_folder(folder) as target:
        for file in (fullest / DESCRIPTION, *parts[fullest]):
            shutil.copyfile(file, target / file.name)
    return fullest


def _described(kind: str, identity: Mapping[str, JSON]) -> dict[str, Any]:
    return {"format": FORMAT, "kind": kind, "identity": _as_json(identity)}


def _is_described(folder: Path, described: Mapping[str, Any]) -> bool:
    try:
        return bool(json.loads((folder / DESCRIPTION).read_bytes()) == described)
    except (OSError, ValueError):  # not there, or damaged: then it is not taken from
        return False


_NEXT_STEP = "Use another run folder, or delete this one to start over."


def _refuse_other(path: Path, described: Mapping[str, Any]) -> None:
    try:
        found = json.loads(path.read_bytes())
        stored = _flat({key: found[key] for key in described})
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{path} is not the description of a store ({error!r}). {_NEXT_STEP}") from None
    wanted = _flat(described)
    absent = "(absent)"
    differences = [
        f"\n  {key.removeprefix('identity.')}: stored {_short(stored.get(key, absent))}, "
        f"now {_short(wanted.get(key, absent))}"
        for key in sorted({*stored, *wanted})
        if stored.get(key, absent) != wanted.get(key, absent)
    ]
    if differences:
        raise StoreError(
            f"{path.parent} was written with other settings:{''.join(differences)}\n{_NEXT_STEP}"
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings with dotted keys, so that a message names the one setting that differs."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return flat


def _as_json(identity: Mapping[str, JSON]) -> Any:
    """The identity as JSON reads it back, so that tuples equal the lists they become."""
    return json.loads(json.dumps(identity, allow_nan=False))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
