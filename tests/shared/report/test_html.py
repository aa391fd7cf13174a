"""The page: self-contained, safe with hostile text, drawn by a real browser; files written whole."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from shared.errors import UserError
from shared.report.html import render, script_json, write_report
from shared.report.sections import (
    Bar,
    BarPanel,
    Bars,
    BarSeries,
    Browser,
    CurvePanel,
    Curves,
    Facet,
    Item,
    KeyValues,
    Mark,
    Report,
    Series,
    Shown,
    Summary,
    Table,
    Text,
    Tile,
)

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=http://evil.example/x onerror=alert(1)>"
    "\"'`{{ 7 * 7 }}\u2028\u2029&lt;<style>@import url(http://evil.example/y)</style><!--"
)
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


def full_report(text: str) -> Report:
    """Every kind of section, with `text` wherever text goes."""
    curve = CurvePanel(text, text, text, (Series(text, (1, 2), (0.5, None)),), (Mark(1.5, text),))
    bars = BarPanel(
        text,
        text,
        (text,),
        (BarSeries(text, (Bar(0.5, 0.4, 0.6),), "student"), BarSeries(text, (Bar(None),))),
    )
    item = Item(text, (text,), (Shown(text, (text,), True),), tags=(0,), keys=(1.0,), images=(0,))
    browser = Browser(
        text, ((text, "student"),), (item,), (text,), (text,), (Facet(text, (text,)),), (text,), (PIXEL,)
    )
    return Report(
        text,
        text,
        (
            Summary(text, (Tile(text, text, text),), text),
            Curves(text, (curve,)),
            Bars(text, (bars,)),
            Table(text, (text, text), ((text, text), (text, 0.123456), (text, None))),
            browser,
            KeyValues(text, {text: text, "count": 1234567}),
            Text(text, (text,)),
        ),
    )


class Page(HTMLParser):
    """Elements and texts as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.data: list[object] = []
        self._script: str | None = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._script = dict(attrs).get("type") or "code" if tag == "script" else None

    def handle_endtag(self, tag):
        self._script = None

    def handle_data(self, data):
        if self._script == "application/json":
            self.data.append(json.loads(data))
        elif self._script is None:
            self.texts.append(data)


@pytest.fixture(scope="module")
def hostile_page():
    return Page(render(full_report(HOSTILE)))


def test_nothing_is_fetched(hostile_page):
    html = render(full_report(HOSTILE))
    for tag, attributes in hostile_page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "audio", "video", "source"}
        for name, value in attributes.items():
            if name in {"src", "href", "srcset", "poster", "action", "data"}:
                assert re.match(r"#section-\d+$|data:image/", value or ""), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    (policy,) = [a["content"] for _, a in hostile_page.elements if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.partition("style-src")[0]


def test_hostile_text_stays_text(hostile_page):
    harmless = Page(render(full_report("harmless")))
    assert [tag for tag, _ in hostile_page.elements] == [tag for tag, _ in harmless.elements]
    assert hostile_page.texts.count(HOSTILE) == harmless.texts.count("harmless") > 20


def test_hostile_text_inside_figures(hostile_page):
    curve, bars, browser = hostile_page.data
    assert browser["items"][0][0] == HOSTILE
    # Plotly reads a small HTML of its own in its texts, so these are escaped once more
    for text in (curve["layout"]["xaxis"]["title"]["text"], bars["layout"]["annotations"][0]["text"]):
        assert "<" not in text
        assert "&lt;/script&gt;" in text


def test_script_json_cannot_end_a_script():
    text = str(script_json({"a": HOSTILE}))
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"a": HOSTILE}
    with pytest.raises(ValueError, match="JSON"):
        script_json(float("nan"))


def test_all_of_it_is_on_the_page():
    words = Page(render(full_report("harmless"))).texts
    assert {"1,234,567", "0.1235", "–"} <= set(words)


def test_pages_without_charts_carry_no_script():
    page = Page(render(Report("t", "s", (Text("a", ("b",)),))))
    assert "script" not in [tag for tag, _ in page.elements]
    assert "nav" not in [tag for tag, _ in page.elements]


def test_images_must_be_inside_the_page():
    for image in ("https://example.org/a.png", "data:text/html,x"):
        with pytest.raises(UserError, match=rf"{image[:12]}.*data:image/"):
            render(Report("t", "", (Browser("b", (), (), images=(image,)),)))


def test_files_are_written_whole(tmp_path):
    folder = tmp_path / "run"
    report = Report("first \ud800", "", ())  # a lone surrogate, which UTF-8 cannot hold
    write_report(folder, report, {"run": {"name": "é \ud800"}, "retention": {"x": None}})
    assert json.loads((folder / "report.json").read_text("utf-8")) == {
        "run": {"name": "é \ud800"},
        "retention": {"x": None},
    }
    before = (folder / "report.html").read_bytes()
    assert b"first ?" in before
    with pytest.raises(ValueError, match="JSON"):
        write_report(folder, Report("second", "", ()), {"bad": float("nan")})
    assert (folder / "report.html").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]


def test_a_browser_draws_the_charts(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium or google-chrome")
    write_report(tmp_path, full_report(HOSTILE), {})
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    command += ["--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path}/report.html"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    title = dom[dom.index("<title>") : dom.index("</title>")]
    assert "/script" in title and not title.endswith("owned")
    assert dom.count('class="main-svg"') >= 4  # two charts, two layers each
    assert dom.count('class="point"') >= 2
    assert "@student" not in re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)
