"""The page of a comparison: retention, figures by task, samples, and what the images add."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from eval.browser import Seen, samples_section
from eval.cli import app
from eval.compare import compare
from eval.records import Record
from eval.report import page, report_data
from eval.suites import Registry
from eval.thumbnails import Gallery
from evaluations import ToldEngine, run_tasks, told_model, write_rows
from shared.errors import StoreError
from shared.report.html import render
from shared.report.sections import Bars, Browser, KeyValues, Summary, Table


def ask(monkeypatch, folder: Path, name: str, say, *words: str, model: str = "") -> Path:
    told_model(monkeypatch, ToldEngine(say, name=model or name))
    run_tasks(model or name, *words, output=folder / name)
    return folder / name


def right_on(*images: str):
    """POPE's answer is yes everywhere; without images the answer is no."""
    return lambda request: "yes" if request.sample.images and request.sample.id[0] in images else "no"


@pytest.fixture
def photos(tmp_path) -> list[str]:
    """Three questions on each of four images."""
    rows = []
    for number in range(4):
        Image.new("RGB", (800, 600), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
        rows += [
            {"id": f"{number}-{i}", "image": f"{number}.png", "question": f"{i}?", "answer": "yes"}
            for i in range(3)
        ]
    return ["pope", f"data.path={write_rows(tmp_path / 'pope.jsonl', rows)}"]


@pytest.fixture
def runs(tmp_path, monkeypatch, photos) -> list[Path]:
    """Of four images the teacher sees all, the start one, the student two, the other student three."""
    seen = {"teacher": "0123", "start": "0", "student": "01", "other": "012"}
    return [ask(monkeypatch, tmp_path, name, right_on(*images), *photos) for name, images in seen.items()]


@pytest.fixture
def control(tmp_path, monkeypatch, photos, runs) -> Path:
    return ask(monkeypatch, tmp_path, "blank", right_on(), *photos, "images=removed", model="student")


def sections(compared, kind):
    return [section for section in page(compared).sections if isinstance(section, kind)]


def test_what_the_images_add(runs, control):
    compared = compare(runs, Registry(), controls=[control])
    found = report_data(compared)["controls"]
    assert found.keys() == {"student"}
    assert found["student"]["scores"]["pope/accuracy"]["value"] == 0.0
    added = found["student"]["added_by_images"]["pope/accuracy"]
    assert added == {"value": 0.5, "low": 0.0, "high": 1.0}  # whole images: two of four
    (table,) = sections(compared, Table)
    rows = {row[0]: row[1:] for row in table.rows[:6]}
    assert rows["Accuracy"] == ("1", "0.25 ± 0.25", "0.50 ± 0.29", "0.75 ± 0.25")
    assert rows["… retention"][2:] == ("50.0 % (0.0 to 100.0)", "75.0 % (25.0 to 100.0)")
    assert rows["… added by images"] == (None, None, "+0.500 (+0.000 to +1.000)", None)
    (bars,) = sections(compared, Bars)
    panel = bars.panels[-1]
    assert panel.title == "Student without images"
    assert [series.bars[0].value for series in panel.series] == [0.5, 0.0]
    (browser,) = sections(compared, Browser)
    assert [name for name, _ in browser.columns] == [
        "Teacher", "Start", "Student", "Student 2", "Student without images",
    ]  # fmt: skip


def test_a_control_of_another_model_is_refused(runs, tmp_path, monkeypatch, photos):
    other = ask(monkeypatch, tmp_path, "foreign", right_on(), *photos, "images=removed")
    with pytest.raises(StoreError, match=r"is a control of told \(foreign\)") as refusal:
        compare(runs, Registry(), controls=[other])
    assert "\n  student: told (student)\n  student-2: told (other)\n" in str(refusal.value)


def test_a_control_that_differs_in_more_is_refused(runs, tmp_path, monkeypatch, photos):
    words = (*photos, "images=removed", "max_new_tokens=5", "limit=4")
    other = ask(monkeypatch, tmp_path, "short", right_on(), *words, model="student")
    with pytest.raises(StoreError) as refusal:
        compare(runs, Registry(), controls=[other])
    message = str(refusal.value)
    assert "sampling.max_new_tokens is 32 in" in message and "and 5 in" in message
    assert "questions is 12 in" in message and "8 samples are in one run only" in message
    assert "with images=removed and another --output" in message


def test_a_control_that_shows_images_is_refused(runs):
    with pytest.raises(StoreError, match=r"images is shown in .*, not removed"):
        compare(runs[:3], Registry(), controls=[runs[2]])


def test_two_controls_of_one_model_are_refused(runs, control, tmp_path, monkeypatch, photos):
    second = ask(monkeypatch, tmp_path, "blank-2", right_on(), *photos, "images=removed", model="student")
    with pytest.raises(StoreError, match=r"two controls of student: .*blank and .*blank-2"):
        compare(runs, Registry(), controls=[control, second])


def test_a_control_of_other_tasks_is_refused(runs, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "easy.jsonl", [{"question": "?", "answer": "no", "image": "0.png"}])
    words = ("easy_vqa", f"data.path={rows}", "images=removed")
    other = ask(monkeypatch, tmp_path, "easy", right_on(), *words, model="student")
    with pytest.raises(
        StoreError, match=r"a control of none of the compared tasks \(pope\); it has easy_vqa"
    ):
        compare(runs, Registry(), controls=[other])


def test_filters_and_order_of_the_samples(runs, control):
    (browser,) = sections(compare(runs, Registry(), controls=[control]), Browser)
    options = [(facet.title, option) for facet in browser.facets for option in facet.options]
    found = {
        option: [item.facts[1] for item in browser.items if number in item.tags]
        for number, option in enumerate(options)
    }

    def of(*images: int) -> list[str]:
        return [f"{image}-{i}" for image in images for i in range(3)]

    assert found == {
        ("Outcome", "Teacher right, student wrong"): of(2, 3),
        ("Outcome", "Teacher and student right"): of(0, 1),
        ("Outcome", "Start wrong, student right"): of(1),
        ("Outcome", "Teacher right, student 2 wrong"): of(3),
        ("Outcome", "Teacher and student 2 right"): of(0, 1, 2),
        ("Outcome", "Start wrong, student 2 right"): of(1, 2),
    }
    assert browser.orders[:2] == ("Teacher ahead of student", "Student ahead of teacher")
    assert [item.keys[:2] for item in browser.items[::3]] == [(0, 0), (0, 0), (1, -1), (1, -1)]
    item = browser.items[6]
    assert item.prompt == "0?\nAnswer yes or no." and item.facts == ("pope", "2-0", "yes")
    assert [text.good for text in item.texts] == [True, False, False, True, False]
    assert item.texts[2].facts == ("", "0", "stop", "", "")  # what was read is the reply itself


def test_each_image_is_on_the_page_once(runs, monkeypatch):
    compared = compare(runs, Registry())
    (browser,) = sections(compared, Browser)
    assert [item.images for item in browser.items] == [(n,) for n in range(4) for _ in range(3)]
    assert len(browser.images) == 4 and browser.note.count("image") == 0
    size = len(browser.images[0])
    short = page(compared, gallery=Gallery(budget_bytes=2 * size + 10)).sections[-2]
    assert len(short.images) == 2 and short.items[6].images == ()
    assert "2 images are left out: the first 2 fill the page's share" in short.note


def test_images_that_are_gone_are_counted(runs, tmp_path):
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes(b"no image")
    (browser,) = sections(compare(runs, Registry()), Browser)
    assert len(browser.images) == 2
    assert f"2 images could not be read, such as '{tmp_path}/1.png'" in browser.note


def test_thumbnails_are_small_and_tasks_take_turns(tmp_path):
    path = tmp_path / "large.png"
    Image.effect_noise((2000, 1000), 50).save(path)
    gallery = Gallery()
    assert gallery.place(str(path)) == 0
    assert gallery.urls[0].startswith("data:image/jpeg;base64,") and len(gallery.urls[0]) < 120_000
    Image.open(path).save(tmp_path / "copy.png")
    assert gallery.place(str(tmp_path / "copy.png")) == 0 and len(gallery.urls) == 1


def record(name: str, *, reply: str = "yes", replies=(), images=(), draw=0, **values: float) -> Record:
    replies = replies or (reply,)
    return Record(
        name, draw, "Q" if len(replies) == 1 else f"Q\n\nAssistant:\n{replies[0]}\n\nUser:\nAnd then?",
        tuple(images), ("7", "8", "7"), tuple(replies), ("stop",) * len(replies), reply.strip(),
        values or {"accuracy": 1.0}, "", None, None, None, None,
    )  # fmt: skip


def browser_of(tasks: dict[str, list[Record]], gallery: Gallery | None = None) -> Browser:
    seen = [Seen(name, None, tasks) for name in ("Teacher", "Start", "Student")]
    known = {name: Registry().task(name) for name in tasks}
    return samples_section(seen, known, students=[2], gallery=gallery or Gallery())


def test_images_of_all_tasks_get_a_share_of_the_page(tmp_path):
    paths = []
    for number in range(8):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.new("L", (50, 50), 30 * number).save(paths[-1])
    one = Gallery()
    one.place(paths[0])
    size = len(one.urls[0])
    tasks = {
        "pope": [record(str(n), images=[paths[n]]) for n in range(4)],
        "easy_vqa": [record(str(n), images=[paths[4 + n]]) for n in range(4)],
    }
    browser = browser_of(tasks, Gallery(budget_bytes=round(4.5 * size)))
    shown = [bool(item.images) for item in browser.items]
    assert shown == [True, True, False, False] * 2
    assert browser.facets[0].options == ("pope", "easy_vqa")


def test_turns_draws_and_references():
    browser = browser_of({"mt_bench": [record("a", replies=("one", "two"), draw=1, rouge_l=0.25)]})
    (item,) = browser.items
    assert item.prompt == "Q\n\nUser:\nAnd then?"
    assert item.texts[0].text == "one\n\n――\n\ntwo"
    assert item.facts[1:] == ("a, draw 2", "7 ×2 · 8")
    assert item.texts[0].good is None and item.texts[0].facts[1] == "0.250"  # better or worse, not right
    assert browser.facets == () and item.keys == (0.0, -0.0)


def test_a_program_is_right_by_its_own_pass(monkeypatch):
    browser = browser_of({"humaneval": [record("a", passed=1.0), record("b", passed=0.0)]})
    assert [item.texts[0].good for item in browser.items] == [True, False]


def test_more_text_than_a_page_carries_is_shortened_and_said(monkeypatch):
    monkeypatch.setattr("eval.browser.TEXT_CHARACTERS", 7000)
    browser = browser_of({"gsm8k": [record("a", reply="x" * 5000)]})
    text = browser.items[0].texts[0].text
    assert text == "x" * 1000 + " … (5,000 characters)"
    assert "up to 1,000 characters" in browser.note


def test_cut_and_unread_replies_can_be_filtered():
    cut = record("a")._replace(finish_reasons=("length",), answer="")
    browser = browser_of({"gsm8k": [cut, record("b")]})
    replies = next(facet for facet in browser.facets if facet.title == "Reply")
    assert replies.options[:2] == ("Teacher: cut at the length limit", "Teacher: no answer found")
    assert browser.items[0].texts[0].facts[:3] == ("nothing", "1.00", "length limit")
    assert len(browser.items[1].tags) < len(browser.items[0].tags)


def test_the_page_and_its_data_from_the_command_line(runs, control, tmp_path):
    words = ["compare", *map(str, runs), "--control", str(control), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "Written:" in result.output and "student without images" in result.output
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["retention"]["pope/accuracy"]["value"] == 0.5
    assert data["students"]["student-2"]["retention"]["pope/accuracy"]["value"] == 0.75
    html = (tmp_path / "out" / "report.html").read_text()
    assert "How much is kept of told" in html and 'class="browser"' in html
    printed = CliRunner().invoke(app, [*words, "--json"])
    assert json.loads(printed.output) == data


def test_tiles_and_setup(runs):
    compared = compare(runs, Registry())
    (glance,) = sections(compared, Summary)
    assert [(t.label, t.value, t.detail) for t in glance.tiles] == [
        ("pope: Accuracy, student", "50.0 %", "50.0 % of the teacher's 100.0 %; start 25.0 %"),
        ("pope: Accuracy, student 2", "75.0 %", "75.0 % of the teacher's 100.0 %; start 25.0 %"),
    ]
    (setup,) = sections(compared, KeyValues)
    assert setup.entries["pope"] == "version 1, 12 questions, temperature 0.0, up to 32 tokens"
    assert "Left out" not in render(page(compared))


def test_a_fast_model_did_not_take_no_time(runs):
    compared = compare(runs, Registry())
    for run in compared.runs:
        run.scores["pope"]["seconds"] = 0.0144
    (pope,) = (section for section in sections(compared, Table) if section.title == "pope")
    assert [row[1:] for row in pope.rows if row[0].startswith("Seconds")] == [(pytest.approx(0.0012),) * 4]


def test_a_control_is_named_like_the_other_runs(runs, control):
    (setup,) = sections(compare(runs, Registry(), controls=[control]), KeyValues)
    assert setup.entries["Student without images"] == f"told ({control})"
