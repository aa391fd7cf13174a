"""The browser of items in a real one: right and light with ten thousand items, deaf to hostile text."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.report.html import write_report
from shared.report.sections import Browser, Facet, Item, Report, Shown

COUNT = 10_000
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
HOSTILE = "</script><script>window.owned=1</script><img src=x onerror=window.owned=1><b>bold</b>"
# `settled` waits longer than the search box does after a key, and for two frames
SETTLED = (
    "new Promise((done) => setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(done)), 200))"
)


def item(number: int) -> Item:
    """Every third one's student is wrong, every hundredth mentions a zebra; number 7 is hostile."""
    if number == 7:
        return Item(HOSTILE, (HOSTILE, HOSTILE), (Shown(HOSTILE, (HOSTILE,)),) * 3, (1, 3), (7.0,), ())
    word = "zebra" if number % 100 == 0 else "horse"
    right = number % 3 != 0
    texts = (
        Shown(f"I see a {word}", (word,), True),
        Shown("", ("",), right) if number == 5 else Shown(f"Perhaps a {word}!", (word,), right),
        None,
    )
    tags = (number % 2, 3 if right else 2)
    return Item(f"Question {number}", ("animals", str(number)), texts, tags, (float(number),), (number % 2,))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    browser = Browser(
        "Samples",
        (("Teacher", "teacher"), ("Student", "student"), ("Other", None)),
        tuple(map(item, range(COUNT))),
        facts=("Task", "Sample"),
        text_facts=("Read as",),
        facets=(Facet("Parity", ("even", "odd")), Facet("Outcome", ("student wrong", "student right"))),
        orders=("Largest",),
        images=(PIXEL, PIXEL.replace("TAEAOw", "RAEAOw")),
    )
    write_report(folder, Report("Browser", "", (browser,)), {})
    return folder / "report.html"


@pytest.fixture
def opened(chromium, page):
    chromium.open(page)
    return chromium


def count(browser) -> str:
    return browser.run("document.querySelector('.count').textContent")


def shown(browser) -> str:
    return browser.run("document.querySelector('.prompt-text').textContent")


def nodes(browser) -> int:
    return browser.run("document.querySelectorAll('.browser *').length")


def search(browser, text: str) -> None:
    browser.run("document.querySelector('input').select()")
    browser.type(text)
    browser.run(SETTLED)


def choose(browser, select: int, option: int) -> None:
    browser.run(
        f"((s) => {{ s.selectedIndex = {option}; s.dispatchEvent(new Event('change')) }})"
        f"(document.querySelectorAll('select')[{select}])"
    )


def test_only_what_is_in_sight_is_in_the_page(opened):
    few = nodes(opened)
    assert few < 400
    assert opened.run("document.querySelectorAll('.row').length") < 40
    opened.run("document.querySelector('.list').scrollTop = 62 * 5000")
    opened.run(SETTLED)
    assert nodes(opened) < few + 200
    places = opened.run("[...document.querySelectorAll('.row')].map((row) => +row.dataset.place)")
    assert 5000 in places and min(places) >= 4990
    assert opened.requested == [opened.run("location.href")] + [
        url for url in opened.requested if url.startswith("data:")
    ]


def test_search_finds_words_and_phrases_in_prompts_and_replies(opened):
    search(opened, "ZEBRA perhaps")
    assert count(opened) == "100 of 10,000"
    assert opened.run("document.querySelector('.answers p mark').textContent") == "zebra"
    search(opened, '"question 123"')
    assert count(opened) == "11 of 10,000"  # 123 and 1230 to 1239
    search(opened, "giraffe")
    assert count(opened) == "0 of 10,000"
    assert opened.run("document.querySelector('.nothing').hidden") is False
    assert opened.run("document.querySelector('.item').hidden") is True
    opened.run("document.querySelector('.clear').click()")
    assert count(opened) == "10,000"


def test_filters_combine_and_say_what_each_choice_gives(opened):
    choose(opened, 1, 1)  # student wrong: 0, 3, 6 ...
    assert count(opened) == "3,334 of 10,000"
    options = opened.run("[...document.querySelectorAll('select')[0].options].map((o) => o.textContent)")
    assert options == ["All", "even (1,667)", "odd (1,667)"]
    choose(opened, 0, 2)
    assert count(opened) == "1,667 of 10,000"
    assert shown(opened) == "Question 3"
    search(opened, "zebra")  # of 100, 200 ... the odd ones
    assert count(opened) == "0 of 10,000"
    choose(opened, 0, 1)
    assert count(opened) == "34 of 10,000"  # 0, 300 ... 9900


def test_order(opened):
    choose(opened, 2, 1)
    assert shown(opened) == "Question 0"  # the chosen one stays
    opened.run("document.querySelector('.list').focus()")
    opened.press("Home")
    assert shown(opened) == "Question 9999"


def test_keys(opened):
    opened.run("document.querySelector('.list').focus()")
    opened.press("ArrowDown", "ArrowDown", "ArrowUp", "j", "j")
    assert shown(opened) == "Question 3"
    opened.press("End")
    assert shown(opened) == "Question 9999"
    chosen = "document.getElementById(document.querySelector('.list').getAttribute('aria-activedescendant'))"
    assert opened.run(f"{chosen}.getAttribute('aria-selected')") == "true"
    assert opened.run(f"{chosen}.getAttribute('aria-posinset')") == "10000"
    opened.press("k", "/")
    assert opened.run("document.activeElement.type") == "search"
    opened.type("zebra")
    opened.press("Escape")
    assert count(opened) == "10,000" and shown(opened) == "Question 9998"


@pytest.mark.parametrize("marked", [False, True])
def test_hostile_text_stays_text(opened, marked):
    if marked:
        search(opened, "onerror")
        assert count(opened) == "1 of 10,000"
    else:
        opened.run("document.querySelectorAll('.row')[7].click()")
    for place in (".prompt-text", ".answers p", ".facts div:last-child dd", ".answers dd"):
        assert opened.run(f"document.querySelector('{place}').textContent") == HOSTILE
    assert HOSTILE in opened.run("document.querySelector('.row[aria-selected=true]').textContent")
    assert opened.run("typeof window.owned") == "undefined"
    assert opened.run("document.querySelectorAll('img:not(.images img), b:not(header b)').length") == 0
    assert opened.errors == []
    assert not [url for url in opened.requested if not url.startswith(("file:", "data:"))]


def test_texts_marks_and_images_of_the_chosen_one(opened):
    search(opened, '"question 5"')
    columns = opened.run(
        "[...document.querySelectorAll('.answers > section')].filter((s) => !s.hidden)"
        ".map((s) => s.querySelector('header').textContent + ': ' + s.querySelector('p').textContent)"
    )
    assert columns == ["Teacher✓ right: I see a horse", "Student✓ right: no text"]  # the third has none
    assert opened.run("document.querySelector('.images img').complete")
    assert opened.run("[...document.querySelectorAll('.images img')].map((i) => i.naturalWidth)") == [1]
    assert opened.run("document.querySelector('.facts').textContent") == "TaskanimalsSample5"


def test_a_telephone_shows_it_without_scrolling_sideways(chromium, page):
    chromium.open(page, width=390, height=844)
    assert chromium.run("document.documentElement.scrollWidth") == 390
    chromium.run(
        "new Promise((done) => { addEventListener('scrollend', done);"
        "document.querySelectorAll('.row')[3].click() })"
    )
    assert shown(chromium) == "Question 3"
    assert chromium.run("document.querySelector('.item').getBoundingClientRect().top") < 844 / 2


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(chromium, page, dark):
    """Every text on its card at least 4.5 to 1 (WCAG 2.1, AA)."""
    chromium.open(page, dark=dark)
    chromium.run("document.querySelectorAll('.row')[2].click()")
    lowest = chromium.run(
        """(() => {
          const light = (color) => {
            const [r, g, b] = color.match(/[\\d.]+/g).map((v) => v / 255)
              .map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
            return .2126 * r + .7152 * g + .0722 * b;
          };
          const ground = (e) => {
            const color = getComputedStyle(e).backgroundColor;
            return color === "rgba(0, 0, 0, 0)" ? ground(e.parentElement) : color;
          };
          const ratios = [...document.querySelectorAll("main *")]
            .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
            .filter((e) => !e.disabled && e.checkVisibility())
            .map((e) => [light(getComputedStyle(e).color), light(ground(e))].sort((a, b) => b - a))
            .map(([a, b]) => (a + .05) / (b + .05));
          return Math.min(...ratios);
        })()"""
    )
    assert lowest >= 4.5
