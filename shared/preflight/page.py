"""What does `check --models` hand over? A page for a person, facts for a machine, and what would go wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shared.progress import Speaker

UNITS = ("B", "kB", "MB", "GB", "TB")


class Topic(NamedTuple):
    """A part of the page."""

    title: str
    lines: Sequence[str] = ()
    columns: Mapping[str, str] = {}  # texts side by side, above the lines


@dataclass
class Findings:
    """Filled topic by topic."""

    topics: list[Topic] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)  # what would stop the run, or make it wrong

    def add(self, title: str, lines: Sequence[str], columns: Mapping[str, str] | None = None) -> None:
        """One more topic."""
        self.topics.append(Topic(title, lines, columns or {}))

    def show(self, speaker: Speaker) -> None:
        """Print all of it."""
        for topic in self.topics:
            if topic.columns:
                speaker.answers(topic.title, dict(topic.columns))
            else:
                speaker.stage(topic.title)
            for line in topic.lines:
                speaker.say(f"  {line}")
        for problem in self.problems:
            speaker.say(f"✗ {problem}", style="red")


def size(count: float) -> str:
    """Bytes as a person reads them, decimal."""
    power = 0
    while count >= 999.5 and power < len(UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {UNITS[power]}"


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    if seconds < 0.995:
        return f"{seconds * 1000:.2g} ms" if seconds < 0.0995 else f"{seconds * 1000:.0f} ms"
    if seconds < 99.5:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.3g} h"


def millions(count: int) -> str:
    """A number of parameters as a person reads it."""
    return f"{count:,}" if count < 1_000_000 else f"{count / 1e6:,.1f} M"
