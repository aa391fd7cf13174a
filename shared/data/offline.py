"""How do responses come from files instead of models: columns of the prompts, or what another run sampled.

A file holds a response a row: `sample_id` (or `id`), `text` (or `response`), and optionally `draw`,
`token_ids`, `finish_reason` and `role`. A folder is a store of responses, as
runs/NAME/round-01/responses/teacher is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args

from shared.data.tables import read_file
from shared.errors import DataError
from shared.models.references import resolve_path
from shared.types import FinishReason, Response, Role, Sample

COLUMNS = "columns"
LISTED = 5


class Tokens(Protocol):
    """What of an adapter is needed here."""

    @property
    def fingerprint(self) -> str:
        """Of tokenizer and template."""
        ...

    def encode_text(self, text: str, *, stop: bool) -> tuple[int, ...]:
        """Token ids of an answer."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a response."""
        ...


class Offline(NamedTuple):
    """One role's responses, and how many were tokenised anew from their text."""

    responses: list[Response]
    retokenised: int

    def summary(self, source: str) -> str:
        """One line for the log."""
        return f"{len(self.responses)} from {source}, {self.retokenised} tokenised from their text"


def offline_responses(samples: Sequence[Sample], role: Role, source: str, tokens: Tokens) -> Offline:
    """The responses of one role.

    Token ids are taken over where they stand for the same text here; otherwise the text is tokenised, with
    the turn's end unless it was cut.

    Args:
        samples: To which responses are wanted; others are passed over.
        role: "teacher" or "student".
        source: A file or folder, or "columns": the reference (`chosen`) as the teacher's, `rejected` as the
            student's.
        tokens: The student's adapter.

    Raises:
        DataError: samples without a response, or rows that cannot be used.
    """
    found = _columns(samples, role) if source == COLUMNS else _rows_of(source, role, {s.id for s in samples})
    responses: list[Response] = []
    retokenised = 0
    for row in found:
        ids = tuple(row.token_ids or ())
        if not ids or tokens.decode(ids) != row.text:
            ids = tokens.encode_text(row.text, stop=row.finish_reason == "stop") if row.text else ()
            retokenised += 1
        responses.append(
            Response(
                sample_id=row.sample_id,
                role=role,
                round=0,
                draw=row.draw,
                token_ids=ids,
                text=row.text,
                finish_reason=row.finish_reason,
                fingerprint=f"{source}:{tokens.fingerprint}",
            )
        )
    return Offline(responses, retokenised)


def check_offline(samples: Sequence[Sample], role: Role, source: str) -> None:
    """Refuse what `offline_responses` would, without a tokenizer.

    Raises:
        DataError: as there.
    """
    if source == COLUMNS:
        _columns(samples, role)
    else:
        _rows_of(source, role, {sample.id for sample in samples})


class _Row(NamedTuple):
    sample_id: str
    draw: int
    text: str
    token_ids: Sequence[int] | None
    finish_reason: FinishReason


def _columns(samples: Sequence[Sample], role: Role) -> list[_Row]:
    texts = [(sample, sample.reference if role == "teacher" else sample.rejected) for sample in samples]
    missing = [sample.source for sample, text in texts if not text]
    if missing:
        column = "chosen or reference" if role == "teacher" else "rejected"
        raise DataError(
            f"generation.offline.{role}: columns needs the {column} of every prompt, and {len(missing)} have "
            f"none ({', '.join(missing[:LISTED])}). Add it, or have the {role} sample."
        )
    return [_Row(sample.id, 0, text or "", None, "stop") for sample, text in texts]


def _rows_of(source: str, role: Role, wanted: set[str]) -> list[_Row]:
    path = resolve_path(source)
    if path is None:
        raise DataError(
            f"generation.offline.{role}: {source!r} does not exist. Give a file of responses, a folder such "
            "as runs/NAME/round-01/responses/teacher, or columns."
        )
    problems: list[str] = []
    rows: list[_Row] = []
    for place, values in _read(path):
        try:
            if values.get("role", role) != role:
                continue
            row = _parse(values)
        except ValueError as problem:
            problems.append(f"{place}: {problem}")
            continue
        if row.sample_id in wanted:
            rows.append(row)
    if problems:
        shown = "\n  ".join(problems[:LISTED])
        raise DataError(f"{len(problems)} unusable row(s) in generation.offline.{role}:\n  {shown}")
    missing = sorted(wanted - {row.sample_id for row in rows})
    if missing:
        raise DataError(
            f"generation.offline.{role}: {source} has no response to {len(missing)} of {len(wanted)} prompts "
            f"({', '.join(missing[:LISTED])}). Take these out of the prompts, or have the {role} sample."
        )
    return rows


def _read(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    files = sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no responses (part-00000.parquet ...). Give a store or a file.")
    for file in files:
        for number, row in read_file(file):
            if isinstance(row, bytes):
                try:
                    row = json.loads(row)
                except ValueError as error:
                    raise DataError(f"{file}:{number}: not JSON: {error}") from None
            if not isinstance(row, Mapping):
                raise DataError(f"{file}:{number}: expected an object with columns, got {type(row).__name__}")
            yield f"{file}:{number}", row


def _parse(values: Mapping[str, Any]) -> _Row:
    sample_id = values.get("sample_id", values.get("id"))
    text = values.get("text", values.get("response"))
    if not isinstance(sample_id, str | int) or not isinstance(text, str):
        raise ValueError(f"needs sample_id and text; has {', '.join(map(str, values)) or 'nothing'}")
    draw, ids = values.get("draw") or 0, values.get("token_ids")
    if isinstance(draw, str) and draw.isdecimal():  # out of a CSV file
        draw = int(draw)
    if not _is_count(draw) or not (ids is None or (isinstance(ids, list) and all(map(_is_count, ids)))):
        raise ValueError(f"draw and token_ids must be numbers from 0, got {draw!r}")
    finish: Any = values.get("finish_reason") or "stop"
    if finish not in get_args(FinishReason):
        raise ValueError(f"finish_reason must be one of {', '.join(get_args(FinishReason))}; got {finish!r}")
    return _Row(str(sample_id), draw, text, ids, finish)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 0
