"""How does a data set become questions: local files first, the hub only where no path is given?

Local files: JSON (a list of rows, or an object that holds one under a single key such as `data`), JSON lines,
CSV and TSV with a header, Parquet, and text (a row {"text": line} a line); each also as .gz or .gzip.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

from eval.settings import DataSettings
from eval.task import Hub, Question, Row, RowError, Task
from shared.data.image_references import Handling, ImageFinder, in_folder
from shared.data.images import ImageError, content_hash
from shared.errors import DataError, UserError
from shared.models.references import PACKAGE_SCHEME, resolve_path

COMPRESSED = frozenset({".gz", ".gzip"})
LISTED = 10  # problems that one message lists


def load_questions(
    task: Task,
    settings: DataSettings,
    *,
    limit: int | None = None,
    image_folder: Path = Path("images"),
    find_images: bool = True,
) -> list[Question]:
    """A task's questions, the first `limit` rows.

    Args:
        task: Reads the rows.
        settings: Where they are.
        limit: How many to take; None for all.
        image_folder: Where images that are inside the data (Parquet, hub) are written as files.
        find_images: False where nobody will look at them: then images are names, and need not be there.

    Raises:
        DataError: no such file, rows that cannot be used (the first ten are named), ids given twice.
        UserError: a hub data set that cannot be had.
    """
    source, rows, beside = _open(task, settings)
    base = Path(settings.images).expanduser() if settings.images else beside
    find_image = _image_finder(base or image_folder, image_folder) if find_images else _name_of_image
    questions: list[Question] = []
    problems: list[str] = []
    for number, values in islice(enumerate(rows), limit):
        try:
            questions.append(task.read(Row(values, number, find_image)))
        except RowError as error:
            problems.append(f"row {number}: {error}")
        except (LookupError, TypeError, ValueError, AttributeError) as error:  # of a reader that checks less
            problems.append(f"row {number}: reading it raised {type(error).__name__}: {error}")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            problems.append(f"id {question.id!r} stands twice")
        seen.add(question.id)
    if problems:
        more = [f"... and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
        head = f"{source}: {len(problems)} unusable row(s) for {task.name}, whose rows hold {task.columns}:"
        raise DataError("\n  ".join([head, *problems[:LISTED], *more]))
    if not questions:
        raise DataError(f"{source} has no rows. {task.name} needs at least one: {task.columns}.")
    return questions


def read_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a local file.

    Raises:
        DataError: a type of file that is not read, or a file that is not what its name says.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in COMPRESSED
    suffix = suffixes[-2] if packed and len(suffixes) > 1 else "" if packed else (suffixes or [""])[-1]
    if suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        with (
            gzip.open(path, "rb") if packed else path.open("rb") as raw,
            io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file,
        ):
            yield from _reader(path, suffix)(file)
    except (ValueError, csv.Error, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path} cannot be read: {error}. Is the file whole, and of this type?") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def _reader(path: Path, suffix: str) -> Callable[[IO[str]], Iterator[Mapping[str, Any]]]:
    if suffix == "":
        return _json_of_either_kind
    if suffix not in _READERS:
        known = ", ".join([*_READERS, ".parquet"])
        raise DataError(f"{path} is a {suffix} file; known: {known}, and each of them as .gz.")
    return _READERS[suffix]


def _json(file: IO[str]) -> Iterator[Mapping[str, Any]]:
    yield from _rows_in(json.load(file))


def _json_lines(file: IO[str]) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} holds {type(row).__name__}, not an object with columns")
            yield row


def _json_of_either_kind(file: IO[str]) -> Iterator[Mapping[str, Any]]:
    """For a compressed file without another suffix."""
    text = file.read()
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        yield from _json_lines(io.StringIO(text))
        return
    yield from _rows_in(whole)


def _rows_in(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list) and inner]
        if len(lists) != 1:
            raise ValueError(
                f"the JSON object has {len(lists)} lists of rows ({', '.join(value)}); needs one"
            )
        value = lists[0]
    if not isinstance(value, list):
        raise ValueError(f"the JSON holds {type(value).__name__}; needs a list of rows")
    for number, item in enumerate(value):
        if not isinstance(item, dict | list):
            raise ValueError(f"row {number} holds {type(item).__name__}, not an object with columns")
        # a data set may write rows as lists; their columns are then "0", "1", ...
        yield item if isinstance(item, dict) else {str(i): part for i, part in enumerate(item)}


def _separated(separator: str) -> Callable[[IO[str]], Iterator[Mapping[str, Any]]]:
    return lambda file: csv.DictReader(file, delimiter=separator, strict=True)


def _lines(file: IO[str]) -> Iterator[Mapping[str, Any]]:
    for line in file:
        if line.strip():
            yield {"text": line.rstrip("\r\n")}


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from None


_READERS: dict[str, Callable[[IO[str]], Iterator[Mapping[str, Any]]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".txt": _lines,
}


def _open(task: Task, settings: DataSettings) -> tuple[str, Iterator[Mapping[str, Any]], Path | None]:
    """What the source is called, its rows, and the folder that image paths in it start from."""
    named = settings.path
    if named is None and isinstance(task.data, str):
        named = task.data
    if named is None:
        if task.data is None:
            raise DataError(
                f"{task.name} has no data set on the hub that we know of: give data.path=FILE with rows of "
                f"{task.columns}." + (f" It can be had from {task.source}" if task.source else "")
            )
        assert isinstance(task.data, Hub)
        hub = task.data._replace(split=settings.split) if settings.split else task.data
        return f"{hub}", _hub_rows(task, hub), None
    path = resolve_path(named)
    if path is None or not path.is_file():
        what = "is a folder" if path is not None else "does not exist"
        advice = " Install the package with pip." if named.startswith(PACKAGE_SCHEME) else ""
        raise DataError(f"data.path of {task.name}: {named!r} {what}. Give a file.{advice}")
    rows = read_rows(path)
    if settings.annotations is not None:
        rows = _joined(rows, Path(settings.annotations).expanduser())
    return str(path), rows, path.parent


def _joined(rows: Iterator[Mapping[str, Any]], path: Path) -> Iterator[Mapping[str, Any]]:
    """Questions with their annotations, by `question_id`, as VQA keeps them in two files."""
    if not path.is_file():
        raise DataError(f"data.annotations: {str(path)!r} is no file.")
    annotations = {row.get("question_id"): row for row in read_rows(path)}
    for row in rows:
        yield {**annotations.get(row.get("question_id"), {}), **row}


def _hub_rows(task: Task, hub: Hub) -> Iterator[Mapping[str, Any]]:
    advice = f"Give data.path=FILE with rows of {task.columns}."
    if hub.file is not None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

        try:
            found = hf_hub_download(hub.name, hub.file, repo_type="dataset", revision=hub.revision)
        except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
            raise UserError(f"{hub}: cannot be had from the hub ({_first_line(error)}). {advice}") from None
        yield from read_rows(Path(found))
        return
    import datasets

    for configuration in hub.configurations:
        try:
            table = datasets.load_dataset(hub.name, configuration, split=hub.split, revision=hub.revision)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"{hub}: cannot be had from the hub ({_first_line(error)}). {advice}") from None
        for name, feature in table.features.items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(name, datasets.Image(decode=False))
        yield from table


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _image_finder(base: Path, folder: Path) -> Callable[[object], str]:
    """Makes a local file's path, below `base` or stored in `folder`, out of what an image column holds."""
    finder = ImageFinder(base, Handling(keep=in_folder(folder)))

    def find(value: object) -> str:
        try:
            return finder.reference(value)
        except ImageError as error:
            raise RowError(str(error)) from None

    return find


def _name_of_image(value: object) -> str:
    """What tells images apart where none is looked at."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    return content_hash(value) if isinstance(value, bytes) else str(value)
