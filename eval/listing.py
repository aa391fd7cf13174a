"""Which tasks and suites are there, what do they need, and can programs be isolated here?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from eval.bridges import HARNESSES
from eval.sandbox.isolation import find_isolation
from eval.sandbox.world import SandboxError
from eval.suites import SUITE_PREFIX, SUITES, Registry


def describe(includes: Sequence[Path] = ()) -> dict[str, Any]:
    """All of it as JSON."""
    registry = Registry(includes)
    tasks = {}
    for name in registry.names():
        task = registry.task(name)
        tasks[name] = {
            "version": task.version,
            "family": task.family,
            "summary": task.summary,
            "metrics": [*task.metrics, *task.quotients],
            "data": None if task.data is None else str(task.data),
            "source": task.source or None,
            "rows": task.columns,
            "images": task.images,
            "runs_code": task.runs_code,
            "judge": task.judged,
        }
    return {
        "tasks": tasks,
        "suites": {name: list(members) for name, members in SUITES.items()},
        "harnesses": {key: _harness(key) for key in HARNESSES},
        "isolation": _isolation(),
    }


def print_listing(described: Mapping[str, Any]) -> None:
    """The same for a reader."""
    console = Console(highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("Task", "What", "Metrics", "Data, unless data.path=FILE"):
        table.add_column(title, overflow="fold")  # a hub id or an address is of use only as a whole
    for name, task in described["tasks"].items():
        metrics = [metric for metric in task["metrics"] if metric in ("pass@1",) or "@" not in metric]
        local = f"a local file: {task['source']}" if task["source"] else "a local file only"
        data = (task["data"] or "").partition(" (")[0] or local  # its split is for --json
        table.add_row(name, Text(task["summary"]), Text(", ".join(metrics)), Text(data))
    console.print(table)
    console.print()
    for name, members in described["suites"].items():
        console.print(Text(f"{SUITE_PREFIX}{name}  {', '.join(members)}"))
    for key, found in described["harnesses"].items():
        console.print(Text(f"{key}:NAME  {found}"))
    console.print(Text(f"programs: {described['isolation']}"))


def _harness(key: str) -> str:
    package = HARNESSES[key].package
    try:
        return f"tasks of {package} {version(package)}"
    except PackageNotFoundError:
        return f"not installed: pip install {package}"


def _isolation() -> str:
    try:
        return find_isolation().description
    except SandboxError as error:
        return str(error)
