"""What rows does a file or a data set of the hub hold? Each with its number, as it stands there.

Files: JSON (a list of rows, or an object with one list of them), JSON lines, CSV and TSV with a header, and
Parquet; all but Parquet also as .gz. Lines of JSON stay bytes, so that one bad line is one bad row.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from shared.config_data import HubData
from shared.errors import DataError

PACKED = frozenset({".gz", ".gzip"})


class Numbered(NamedTuple):
    """A row: an object with columns, a list of values, or a line of JSON; numbers start at 1."""

    number: int
    row: object


def read_file(path: Path) -> Iterator[Numbered]:
    """The rows of a local file, one after another.

    Raises:
        DataError: a type of file that is not read, or a file that is not what its name says.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in PACKED
    suffix = "".join(suffixes[-2:-1] if packed else suffixes[-1:])
    if suffix == ".parquet" and not packed:
        yield from _parquet(path)
        return
    if suffix not in _READERS:
        raise DataError(
            f"{path} is a {suffix or 'nameless'} file; known: {', '.join(_READERS)}, each also as .gz, and "
            ".parquet. Convert it to one JSON object a line (.jsonl)."
        )
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            yield from _READERS[suffix](cast(BinaryIO, file))
    except (ValueError, RecursionError, csv.Error, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path} cannot be read: {error}. Is the file whole, and of this type?") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None


def read_hub(data: HubData) -> Iterator[Numbered]:
    """The rows of a data set of the hub, or of a local folder of data files, through `datasets`.

    Raises:
        DataError: it cannot be had.
    """
    import datasets

    try:
        table = datasets.load_dataset(data.id, data.config, split=data.split, revision=data.revision)
    except Exception as error:  # datasets lets through what hub, readers and the set's own files raise
        lines = str(error).strip().splitlines()
        cause = f"{type(error).__name__}: {lines[0] if lines else ''}"
        raise DataError(
            f"{data.label}: cannot be had from the hub ({cause}). "
            "Check id, config and split; without a network, download its files elsewhere and give their "
            "folder as hub.id or a file as path."
        ) from None
    table = table.cast(datasets.Features({n: _undecoded(f) for n, f in table.features.items()}))
    yield from (Numbered(number, row) for number, row in enumerate(table, start=1))


def _undecoded(feature: Any) -> Any:
    """The same feature with images left as bytes or paths, so that each is judged like any other."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.Sequence):
        return datasets.Sequence(_undecoded(feature.feature), length=feature.length)
    if isinstance(feature, list):
        return [_undecoded(feature[0])]
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    return feature


def _json(file: BinaryIO) -> Iterator[Numbered]:
    content = file.read()
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        yield from _json_lines(io.BytesIO(content))  # many data sets call JSON lines .json
        return
    if isinstance(rows, dict):
        lists = {name: value for name, value in rows.items() if isinstance(value, list)}
        if len(lists) != 1:
            raise ValueError(f"an object with {len(lists)} lists of rows ({', '.join(rows)}); needs one")
        (rows,) = lists.values()
    if not isinstance(rows, list):
        raise ValueError(f"it holds {type(rows).__name__}; needs a list of rows")
    yield from (Numbered(number, row) for number, row in enumerate(rows, start=1))


def _json_lines(file: BinaryIO) -> Iterator[Numbered]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield Numbered(number, line)


def _separated(separator: str) -> Callable[[BinaryIO], Iterator[Numbered]]:
    def read(file: BinaryIO) -> Iterator[Numbered]:
        csv.field_size_limit(2**27)  # a data URL in a cell is long
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        for number, row in enumerate(csv.DictReader(text, delimiter=separator, strict=True), start=1):
            if None in row:
                raise ValueError(f"row {number} has more cells than the header")
            yield Numbered(number, {name: cell for name, cell in row.items() if cell})  # "" is no value

    return read


def _parquet(path: Path) -> Iterator[Numbered]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield Numbered(number, row)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from None


_READERS: dict[str, Callable[[BinaryIO], Iterator[Numbered]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
}
