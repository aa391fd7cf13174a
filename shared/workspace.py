"""What stands in a run's folder, and who may write there?

One process tree owns the folder (run.lock). It belongs to one configuration (config.yaml). `metrics.jsonl` is
cut back to the checkpoint that a resumed run continues from, so that nothing stands in it twice.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import yaml
from pydantic import ValidationError

from shared.config import RunConfig
from shared.config_files import dump_config
from shared.durable import write_atomically
from shared.errors import StoreError, out_of_disk

REPORTED_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "open_clip_torch",
    "vlm-distill",
)
HELDOUT = "heldout"
"""The store of the teacher's held-out responses: the first thing that a run makes."""

_NEXT_STEP = "Set output (or name) to another folder, or delete this one to start again."


class Workspace:
    """A run's folder. Only the main process writes; the others read.

    With `shares`, it is one of a sweep, whose runs take over from each other what is the same.
    """

    def __init__(self, folder: Path, *, main: bool = True, shares: bool = False) -> None:
        self.folder = folder
        self._main = main
        self._shares = shares
        self._lock: IO[str] | None = None

    def open(self, config: RunConfig) -> None:
        """Create or reopen the folder for this configuration and take its lock.

        Raises:
            StoreError: another process works here, or the folder belongs to another configuration.
            UserError: the disk is full.
        """
        if not self._main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self.refuse_other(config)
            if not self._is_begun:
                # an earlier start that failed on its configuration must not stand in the way of a mended one
                for name in ("config.yaml", "student.json", "usage.json"):
                    (self.folder / name).unlink(missing_ok=True)
                write_atomically(self.folder / "environment.json", json.dumps(environment(), indent=1))
                write_atomically(self.folder / "config.yaml", dump_config(config))
        except OSError as error:
            self.close()
            raise self._explain(error) from error
        except BaseException:
            self.close()
            raise

    def refuse_other(self, config: RunConfig) -> None:
        """Refuse a folder that belongs to another configuration; takes no lock and writes nothing.

        Raises:
            StoreError: it does; names each setting that differs. Or its config.yaml cannot be read.
        """
        path = self.folder / "config.yaml"
        if not self._is_begun:
            return
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StoreError(f"{self.folder} holds responses but no config.yaml. {_NEXT_STEP}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise StoreError(f"{path} cannot be read: {error}. {_NEXT_STEP}") from None
        with contextlib.suppress(ValidationError):  # else as it stands there
            # a key that came later had its default
            values = type(config).model_validate(values).model_dump(mode="json")
        # as text, so that what is absent differs from what is null
        before, now = (
            {key: repr(value) for key, value in _flatten(side).items()}
            for side in (values, config.model_dump(mode="json"))
        )
        absent = "(not set)"
        differing = [
            f"{key}: {before.get(key, absent)} there, {now.get(key, absent)} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if differing:
            lines = "\n  ".join(differing)
            raise StoreError(
                f"{self.folder} holds a run with another configuration:\n  {lines}\n{_NEXT_STEP}"
            )

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def round_folder(self, number: int) -> Path:
        """The folder of a round, counted from 1."""
        return self.folder / f"round-{number:02d}"

    def beside(self, path: Path) -> list[Path]:
        """Where the other runs of a sweep have what this one has at `path`; nowhere outside a sweep."""
        place = path.relative_to(self.folder)
        return sorted(self.folder.parent.glob(f"*/{place}")) if self._shares else []

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        """Append a row to metrics.jsonl."""
        if self._main:
            try:
                with self._metrics_path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            except OSError as error:
                raise out_of_disk(error, self._metrics_path) from error

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl."""
        if not self._metrics_path.exists():
            return []
        # a crash may have cut the last line; its step is redone
        text = self._metrics_path.read_bytes().rpartition(b"\n")[0]
        return [
            _parse_json(line, f"{self._metrics_path}:{number}")
            for number, line in enumerate(text.splitlines(), start=1)
        ]

    def cut_metrics(self, step: int | None) -> None:
        """Keep rows up to an optimiser step; with None, none."""
        if self._main:
            kept = [row for row in self.metrics() if step is not None and row["step"] <= step]
            write_atomically(
                self._metrics_path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept)
            )

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds spent in a block, and the peak memory so far, to usage.json."""
        began = time.perf_counter()
        try:
            yield
        finally:
            if self._main:
                usage = self.usage()
                seconds = usage["timing_s"]
                seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - began
                usage["peak_memory_bytes"] = max(usage["peak_memory_bytes"], peak_memory_bytes())
                write_atomically(self.folder / "usage.json", json.dumps(usage, indent=1))

    def usage(self) -> dict[str, Any]:
        """Seconds by stage over all sessions of the run, and its peak memory in bytes."""
        return self.read_json("usage.json") or {"timing_s": {}, "peak_memory_bytes": 0}

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file of the folder."""
        if self._main:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False))

    def read_json(self, name: str) -> Any | None:
        """A JSON file of the folder, or None where it is not there yet."""
        path = self.folder / name
        return _parse_json(path.read_bytes(), str(path)) if path.exists() else None

    @property
    def _is_begun(self) -> bool:
        return (self.folder / HELDOUT).exists()

    @property
    def _metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    def _explain(self, error: OSError) -> Exception:
        if isinstance(error, FileExistsError | NotADirectoryError):
            return StoreError(f"{self.folder} is a file. Set output to a folder.")
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            return StoreError(f"{self.folder} cannot be written. Set output to a folder of yours.")
        return out_of_disk(error, self.folder)

    def _take_lock(self) -> None:
        self._lock = (self.folder / "run.lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            raise StoreError(
                f"{self.folder} is in use by process {owner}. Wait until it ends, "
                "or set output to another folder."
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()


def environment() -> dict[str, object]:
    """The machine and the versions that results depend on."""
    import torch

    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: metadata.version(name) for name in REPORTED_PACKAGES},
    }


def peak_memory_bytes() -> int:
    """The most memory this process has held: on the GPU where one is used, else resident."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        allocated: int = torch.cuda.max_memory_allocated()
        return allocated
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _parse_json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # includes what is not UTF-8
        raise StoreError(f"{where} is damaged: {error}. {_NEXT_STEP}") from None


def _flatten(value: object, prefix: str = "") -> dict[str, object]:
    if isinstance(value, dict) and value:
        pairs = {}
        for key, inner in value.items():
            pairs.update(_flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
        return pairs
    return {prefix: value}
