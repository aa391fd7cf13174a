"""How does a run speak? Lines that stay, and bars that move where there is a terminal.

Away from a terminal a long stage says now and then how far it is: a log is neither silent nor flooded.
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

SILENCE_S = 20.0


class Bar(Protocol):
    """Where a long stage says how far it is."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Tell the count of finished pieces."""
        ...


class Speaker:
    """All output of a run; `quiet` for every process but the main one."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)

    def say(self, text: str, *, style: str = "") -> None:
        """A line that stays; model output and paths in it are never read as markup."""
        self.console.print(Text(_printable(text), style=style))

    def stage(self, text: str) -> None:
        """The headline of a stage."""
        self.console.print(Text(_printable(f"▸ {text}"), style="bold"))

    def answers(self, prompt: str, answers: dict[str, str]) -> None:
        """A prompt with several answers side by side."""
        table = Table(box=None, padding=(0, 2, 0, 0), expand=True)
        for name in answers:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*(Text(_printable(text.strip()) or "(empty)") for text in answers.values()))
        self.console.print(
            Panel(table, title=Text(_one_line(_printable(prompt)), style="italic"), title_align="left")
        )

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Columns under each other, as wide as they are: a log keeps them, a terminal may scroll."""
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        for number, row in enumerate((columns, *rows)):
            line = "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
            self.say(f"  {line.rstrip()}", style="" if number else "bold")

    @contextmanager
    def bar(self, text: str) -> Iterator[Bar]:
        """A progress bar on a terminal, a line every 20 s elsewhere."""
        if self.console.is_terminal:
            columns = (
                TextColumn("  {task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self.console, transient=True) as progress:
                task = progress.add_task(text, total=None, note="")
                yield lambda done, total, note="": progress.update(
                    task, completed=done, total=total, note=note
                )
            return
        spoke = time.monotonic()

        def tell(done: int, total: int, note: str = "") -> None:
            nonlocal spoke
            if time.monotonic() - spoke >= SILENCE_S:
                spoke = time.monotonic()
                self.say(f"  {text}: {done}/{total}  {note}".rstrip())

        yield tell


def _printable(text: str) -> str:
    """Control characters made visible: what a model writes must not steer the terminal."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c
        for c in text
    )


def _one_line(text: str, width: int = 90) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
