"""What is a report made of? Sections of figures, tables and texts that say nothing of how they are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

RoleName = Literal["teacher", "start", "student"]
Cell = str | float | int | None


class Tile(NamedTuple):
    """One number to see first, already formatted."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Summary:
    """Tiles side by side."""

    kind: ClassVar[str] = "summary"
    title: str
    tiles: tuple[Tile, ...]
    note: str = ""


class Series(NamedTuple):
    """One line; a None in `y` is a gap. `role` gives it the colour that this role has everywhere."""

    name: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]
    role: RoleName | None = None


class Mark(NamedTuple):
    """A labelled vertical line."""

    x: float
    label: str


class CurvePanel(NamedTuple):
    """Lines that share their axes. The axis titles name the unit."""

    title: str
    x_title: str
    y_title: str
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Curves:
    """Panels of lines."""

    kind: ClassVar[str] = "curves"
    title: str
    panels: tuple[CurvePanel, ...]
    note: str = ""


class Bar(NamedTuple):
    """A value with the ends of its error bar; None where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None


class BarSeries(NamedTuple):
    """One bar for each category of the panel."""

    name: str
    bars: tuple[Bar, ...]
    role: RoleName | None = None


class BarPanel(NamedTuple):
    """Groups of bars on one axis, whose title names the unit. `percent` shows 0.5 as 50 %."""

    title: str
    x_title: str
    categories: tuple[str, ...]
    series: tuple[BarSeries, ...]
    percent: bool = False


@dataclass(frozen=True)
class Bars:
    """Panels of bars with error bars."""

    kind: ClassVar[str] = "bars"
    title: str
    panels: tuple[BarPanel, ...]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells: numbers are shown to four significant digits, None as a dash."""

    kind: ClassVar[str] = "table"
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


class Facet(NamedTuple):
    """A choice by which items are filtered. Options are numbered on through all facets of a browser."""

    title: str
    options: tuple[str, ...]


class Shown(NamedTuple):
    """One column's text for an item, with facts in the order of `Browser.text_facts`."""

    text: str
    facts: tuple[str, ...] = ()
    good: bool | None = None  # shown as a mark, where it can be said


class Item(NamedTuple):
    """What a browser shows at a time."""

    prompt: str
    facts: tuple[str, ...]  # in the order of `Browser.facts`
    texts: tuple[Shown | None, ...]  # of each column; None where it has none
    tags: tuple[int, ...] = ()  # numbers of the facets' options that hold
    keys: tuple[float | None, ...] = ()  # one for each of `Browser.orders`; the highest come first
    images: tuple[int, ...] = ()  # places in `Browser.images`


@dataclass(frozen=True)
class Browser:
    """Any number of items to search, filter and leaf through, one at a time.

    Images are `data:image/` URLs, each once however many items show it.
    """

    kind: ClassVar[str] = "browser"
    title: str
    columns: tuple[tuple[str, RoleName | None], ...]
    items: tuple[Item, ...]
    facts: tuple[str, ...] = ()  # names; the first is the item's own in the list
    text_facts: tuple[str, ...] = ()
    facets: tuple[Facet, ...] = ()
    orders: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    note: str = ""

    def data(self) -> dict[str, object]:
        """What the page's script reads."""
        return {
            "facts": self.facts,
            "textFacts": self.text_facts,
            "options": [len(facet.options) for facet in self.facets],
            "items": self.items,
            "images": self.images,
        }


@dataclass(frozen=True)
class KeyValues:
    """Settings and facts, by name."""

    kind: ClassVar[str] = "key_values"
    title: str
    entries: Mapping[str, Cell]
    note: str = ""


@dataclass(frozen=True)
class Text:
    """Paragraphs."""

    kind: ClassVar[str] = "text"
    title: str
    paragraphs: tuple[str, ...]
    note: str = ""


Section = Summary | Curves | Bars | Table | Browser | KeyValues | Text


@dataclass(frozen=True)
class Report:
    """A page: its sections, in reading order."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]
