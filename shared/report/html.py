"""How do sections become one self-contained page, and where is it written?

The page fetches nothing: style sheet, charts library and figures are inside it. What models wrote is hostile:
the template escapes every value, data for scripts are JSON without any character that could end a script, and
a content security policy allows the page's own scripts and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from shared.durable import committed_file
from shared.errors import UserError
from shared.report.charts import bar_figure, colors, curve_figure
from shared.report.formats import cell
from shared.report.sections import Browser, Report

FOLDER = Path(__file__).parent


def render(report: Report) -> str:
    """The whole page as HTML.

    Raises:
        UserError: an image that is not a `data:image/` URL.
        ValueError: a NaN or infinity in a figure.
    """
    for section in report.sections:
        if isinstance(section, Browser):
            _check_images(section)
    kinds = {section.kind for section in report.sections}
    scripts = [_plotly(), _read("charts.js.html")] if kinds & {"curves", "bars"} else []
    if "browser" in kinds:
        scripts.append(_read("browser.js.html"))
    return (
        _environment()
        .get_template("page.html")
        .render(
            report=report,
            style=Markup(_read("style.css")),
            scripts=[Markup(script) for script in scripts],
            policy=_policy(scripts),
        )
    )


def write_report(folder: Path, report: Report, data: Mapping[str, Any], *, name: str = "report") -> None:
    """Write `NAME.html` and `NAME.json`, each whole or not at all.

    Raises:
        ValueError: a NaN or infinity in `data`; None says that there is no value.
    """
    page = render(report).encode("utf-8", "replace")  # a lone surrogate cannot be written
    # ... but JSON has an escape for it, which backslashreplace happens to spell
    text = json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with committed_file(folder / f"{name}.html") as file:
        file.write(page)
    with committed_file(folder / f"{name}.json") as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def script_json(value: object) -> Markup:
    """JSON that may stand inside a script element: ASCII only, without <, > and &."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": cell, "script_json": script_json, "colors": colors}
    environment.globals.update(curve_figure=curve_figure, bar_figure=bar_figure)
    environment.tests["number"] = lambda value: isinstance(value, int | float)
    return environment


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs  # slow to import

    library: str = get_plotlyjs()
    return library.replace("\r\n", "\n")  # as browsers do before they hash it


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _policy(scripts: list[str]) -> str:
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{value}'" for value in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _check_images(browser: Browser) -> None:
    for image in browser.images:
        if not image.startswith("data:image/"):
            raise UserError(
                f"report image {image[:80]!r} is not inside the page. Give it as a data:image/ URL."
            )
