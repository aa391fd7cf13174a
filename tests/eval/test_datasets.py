from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eval.datasets import load_questions, read_rows
from eval.settings import DataSettings
from eval.suites import Registry
from eval.task import Hub, Row, RowError
from evaluations import png, write_rows
from shared.errors import DataError, UserError

ROWS = [{"question": "é?", "answer": "1"}, {"question": "b\nc", "answer": "2"}]


def csv_text(separator: str) -> str:
    return f'question{separator}answer\né?{separator}1\n"b\nc"{separator}2\n'


TEXTS = {
    "rows.json": json.dumps(ROWS),
    "wrapped.json": json.dumps({"info": "x", "data": ROWS, "none": []}),
    "rows.jsonl": "\ufeff" + "\n\n".join(map(json.dumps, ROWS)),
    "rows.csv": csv_text(","),
    "rows.tsv": csv_text("\t"),
    "rows.JSON.gz": json.dumps(ROWS),
    "rows.jsonl.gz": "\n".join(map(json.dumps, ROWS)),
    "rows.gzip": json.dumps(ROWS),
    "lines.gzip": "\n".join(map(json.dumps, ROWS)),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_same_rows_in_every_format(name, tmp_path):
    content = TEXTS[name].encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(("gz", "gzip")) else content)
    assert list(read_rows(tmp_path / name)) == ROWS


def test_parquet_and_text(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert list(read_rows(tmp_path / "rows.parquet")) == ROWS
    (tmp_path / "rows.txt").write_text("a b\n\nc\n")
    assert list(read_rows(tmp_path / "rows.txt")) == [{"text": "a b"}, {"text": "c"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n[2]\n', "line 2 holds list"),
        ("a.json", b'{"a": 1', "cannot be read"),
        ("a.json", b"3", "needs a list of rows"),
        ("a.json", b'[{"a": 1}, 2]', "row 1 holds int, not an object"),
        ("a.json", b'{"x": [1], "y": [2]}', "has 2 lists of rows"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.jsonl", b"\xff\xfe\xfa", "cannot be read"),
        ("a.parquet", b"PAR1", "not a readable Parquet file"),
        ("a.pkl", b"", "is a .pkl file; known: .json"),
    ],
)
def test_files_that_are_not_what_they_say(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(tmp_path / name))


def load(task: str, path: Path, **options):
    return load_questions(Registry().task(task), DataSettings(path=str(path)), **options)


def test_unusable_rows_are_named_all_at_once(tmp_path):
    rows = [{"question": "a", "answer": "1"}, {"qestion": "b", "answer": "2"}, {"question": 3, "answer": "2"}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError) as refusal:
        load("gsm8k", path)
    message = str(refusal.value)
    assert "2 unusable row(s) for gsm8k, whose rows hold question, answer" in message
    assert "row 1: needs a column question; has qestion, answer (is it 'qestion'?)" in message
    assert "row 2: question must be text; got 3" in message
    assert len(load("gsm8k", path, limit=1)) == 1  # what is not asked is not read


def test_ids_given_twice_and_no_rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"id": 5, "question": "a", "answer": "1"}] * 2))
    with pytest.raises(DataError, match="id '5' stands twice"):
        load("gsm8k", path)
    path.write_text("[]")
    with pytest.raises(DataError, match="has no rows"):
        load("gsm8k", path)


def test_images_inside_a_parquet_file_become_files(tmp_path):
    rows = [
        {"question": f"{i}?", "answer": "no", "image": {"bytes": png(i % 2), "path": None}} for i in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = load("pope", tmp_path / "rows.parquet", image_folder=tmp_path / "images")
    paths = [Path(question.images[0].image) for question in found]
    assert [path.read_bytes() for path in paths] == [png(0), png(1), png(0)]
    assert paths[0] == paths[2] and len(list((tmp_path / "images").iterdir())) == 2


def test_images_by_name_from_a_folder(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "COCO_val2014_000000000042.jpg").write_bytes(png(0))
    row = {"question_id": 1, "image_id": 42, "question": "What?", "answers": [{"answer": "cat"}] * 10}
    (tmp_path / "rows.json").write_text(json.dumps({"data": [row]}))
    task = Registry().task("vqav2")
    settings = DataSettings(path=str(tmp_path / "rows.json"), images=str(tmp_path / "photos"))
    assert load_questions(task, settings)[0].references == ("cat",) * 10
    with pytest.raises(DataError, match=r"42\.jpg': there is no such file .*data\.images"):
        load("vqav2", tmp_path / "rows.json")


@pytest.mark.parametrize(
    ("image", "message"),
    [("../secret.png", "lies outside the image root"), ("broken.png", "not an image"), ("bomb.png", "bomb")],
)
def test_images_that_nobody_should_open_are_refused_with_their_row(tmp_path, image, message):
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(png(0))
    (folder / "broken.png").write_bytes(b"no image")
    Image.new("1", (9000, 9000)).save(folder / "bomb.png")
    write_rows(folder / "rows.jsonl", [{"question": "?", "answer": "no", "image": image}])
    with pytest.raises(DataError, match=rf"row 0: image .*{message}"):
        load("pope", folder / "rows.jsonl")


def test_data_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="does not exist"):
        load("gsm8k", tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        load("gsm8k", tmp_path)
    with pytest.raises(
        DataError, match=r"daquar has no .* hub .* data\.path=FILE .* from https://www\.kaggle"
    ):
        load_questions(Registry().task("daquar"), DataSettings())
    with pytest.raises(UserError, match=r"openai/gsm8k \(main:test\): cannot be had .*data\.path=FILE"):
        load_questions(Registry().task("gsm8k"), DataSettings())
    with pytest.raises(UserError, match=r"tatsu-lab/alpaca_eval .*cannot be had"):
        load_questions(Registry().task("alpaca_eval"), DataSettings())


def test_rows_say_what_they_lack():
    row = Row({"a": None, "answers": [{"answer": "x"}, "y"], "bad": [1], "n": 0}, 7)
    assert row.texts("answers") == ("x", "y") and row.id("a") == "7" and row.id("n") == "0"
    with pytest.raises(RowError, match="needs a column a or b"):
        row.first("a", "b")
    with pytest.raises(RowError, match="list of texts; got"):
        row.texts("bad")


def test_a_hub_data_set_is_read_in_all_its_configurations_with_images_as_files(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, configuration, *, split, revision):
        asked.append((name, configuration, split, revision))
        images = [{"bytes": png(len(asked)), "path": None}]
        rows = {"question": ["Is it?"], "answer": ["yes"], "id": [configuration], "image": images}
        features = datasets.Features(
            {name: datasets.Value("string") for name in ("question", "answer", "id")}
            | {"image": datasets.Image()}
        )
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = replace(Registry().task("pope"), data=Hub("org/name", "test", ("one", "two")))
    settings = DataSettings(split="validation")
    found = load_questions(task, settings, image_folder=tmp_path)
    assert asked == [("org/name", "one", "validation", None), ("org/name", "two", "validation", None)]
    assert [question.id for question in found] == ["one", "two"]
    assert Path(found[1].images[0].image).read_bytes() == png(2)
