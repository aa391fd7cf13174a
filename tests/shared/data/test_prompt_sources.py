"""Rows of many spellings and files of many kinds become the same samples, images in their places."""

import gzip
import io
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from shared.config_data import HubData, PromptSource
from shared.data.image_references import Handling, as_data_url
from shared.data.images import load_images
from shared.data.prompts import load_prompts
from shared.errors import DataError
from shared.types import ImagePart, TextPart


def png(shade=0):
    file = io.BytesIO()
    Image.new("L", (2, 2), shade).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    for index, name in enumerate("abc"):
        (tmp_path / f"{name}.png").write_bytes(png(index))
    return tmp_path


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


def load(path, *, on_bad_row="fail", images=None, **options):
    source = PromptSource(path=str(path), **options)
    return load_prompts([source], seed=0, on_bad_row=on_bad_row, images=images or Handling())


def human(value):
    return {"from": "human", "value": value}


def gpt(value):
    return {"from": "gpt", "value": value}


def parts(sample):
    """Text as it is, images by their names."""
    return [
        p.text if isinstance(p, TextPart) else p.image.rpartition("/")[2].removesuffix(".png")
        for message in sample.messages
        for p in message.parts
    ]


# --- conversations and their images -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "image", "expected"),
    [
        ("<image>\nWhat?", "a.png", ["a", "What?"]),
        ("What?\n<image>", "a.png", ["What?", "a"]),
        ("First <image> then <image>, well?", ["b.png", "a.png"], ["First ", "b", " then ", "a", ", well?"]),
        ("<image>\n<image>\nSame?", ["a.png", "a.png"], ["a", "a", "Same?"]),
        ("<image>", "a.png", ["a"]),
        ("No picture", None, ["No picture"]),
        ("A line\n\n<image>\n\nmore", "a.png", ["A line\n", "a", "\nmore"]),
    ],
)
def test_llava_marks_become_parts_in_order(folder, text, image, expected):
    row = {"id": "x", "image": image, "conversations": [human(text), gpt("Answer.")]}
    (sample,) = load(write(folder / "llava.json", [row])).samples
    assert parts(sample) == expected and sample.reference == "Answer."


def test_images_of_a_chat_stand_in_the_turns_that_mark_them(folder):
    chat = [human("<image>\nOne?"), gpt("1"), human("And <image> this?"), gpt("2")]
    row = {"images": ["a.png", "b.png"], "conversations": chat}
    (sample,) = load(write(folder / "chat.json", [row])).samples
    assert [len([p for p in m.parts if isinstance(p, ImagePart)]) for m in sample.messages] == [1, 0, 1]
    assert parts(sample) == ["a", "One?", "1", "And ", "b", " this?"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"conversations": [human("<image>\nx")]}, r"1 image mark\(s\) .* and 0 image\(s\) in the row"),
        ({"conversations": [human("x")], "image": "a.png"}, r"0 image mark\(s\) .* and 1 image\(s\)"),
        ({"conversations": [human("<image><image>")], "images": ["a.png"]}, r"2 image mark\(s\) .* and 1"),
        ({"prompt": "<image>", "images": ["a.png", "b.png"]}, r"1 image mark\(s\) .* and 2"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"1 image mark\(s\) .* and 0"),
        ({"prompt": "x", "image": "absent.png"}, "no such file below the image root"),
        ({"prompt": "x", "image": "../a.png"}, "outside the image root"),
        ({"prompt": "x", "image": "rows.json"}, "not an image that is read here"),
        ({"prompt": "x", "image": 5}, "an image must be a path"),
        ({"prompt": "x", "image": "https://example.org/a.png"}, "allow_remote: true"),
        ({"conversations": [{"from": "humn", "value": "x"}]}, "Did you mean 'human'?"),
        ({"conversations": [{"who": "human"}]}, r"\{role, content\} or \{from, value\}"),
        ({"conversations": [gpt("x")]}, "an assistant's turn alone"),
        ({"conversations": [human("")]}, "the prompt is empty"),
    ],
)
def test_bad_rows_with_images_are_named_or_skipped_and_counted(folder, row, said):
    path = write(folder / "rows.json", [{"prompt": "fine"}, row])
    with pytest.raises(DataError, match=rf"1 unusable row\(s\)(.|\n)*rows\.json:2: .*{said}"):
        load(path)
    samples, notes = load(path, on_bad_row="skip")
    assert [sample.id for sample in samples] == ["rows.json:1"]
    assert notes[0].startswith("skipped 1 unusable row(s)") and "rows.json:2" in notes[0]


def test_a_cut_image_is_a_bad_row_where_images_are_decoded(folder):
    noisy = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(noisy, "JPEG")
    (folder / "cut.jpg").write_bytes(noisy.getvalue()[:-300])
    path = write(folder / "rows.json", [{"prompt": "x", "image": "cut.jpg"}, {"prompt": "y"}])
    assert len(load(path).samples) == 2
    with pytest.raises(DataError, match=r"rows\.json:1: image 'cut\.jpg': truncated"):
        load(path, images=Handling(look="decode"))


def test_text_alone_may_speak_of_the_mark_unless_the_source_has_images(folder):
    path = write(folder / "rows.json", [{"prompt": "What does the tag <image> do?"}])
    assert parts(load(path).samples[0]) == ["What does the tag <image> do?"]
    with pytest.raises(DataError, match="1 image mark"):
        load(path, image_root=str(folder))


def test_an_image_root_elsewhere(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("rows")
    path = write(elsewhere / "rows.json", [{"prompt": "x", "image": "a.png"}])
    assert load(path, image_root=str(folder)).samples[0].images == (str(folder / "a.png"),)
    with pytest.raises(DataError, match=r"image_root .* is not a folder"):
        load(path, image_root=str(folder / "absent"))


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image"}, {"type": "text", "text": "What?"}],
        [{"type": "image", "image": None}, {"type": "text", "text": "What?"}],
        "<image>What?",
    ],
)
def test_placeholders_of_other_tools_take_the_rows_images(folder, content):
    row = {"messages": [{"role": "user", "content": content}], "images": ["b.png"]}
    assert parts(load(write(folder / "r.json", [row])).samples[0]) == ["b", "What?"]


def test_image_urls_of_chat_servers(folder):
    url = {"type": "image_url", "image_url": {"url": as_data_url(png(7))}}
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}, url]}]}
    (sample,) = load(write(folder / "r.json", [row]), images=Handling(keep=as_data_url)).samples
    assert load_images(sample)[0].getpixel((0, 0)) == (7, 7, 7)


# --- files --------------------------------------------------------------------------------------------------

PLAIN = [{"question": "1+1?", "answer": "2"}, {"question": "ä, \"b\"\nc?", "answer": "d"}]  # fmt: skip


def check_plain(loaded):
    assert [(s.messages[0].text, s.reference) for s in loaded.samples] == [
        ("1+1?", "2"),
        (PLAIN[1]["question"], "d"),
    ]


def test_json_is_a_list_or_an_object_with_one_or_lines(tmp_path):
    check_plain(load(write(tmp_path / "list.json", PLAIN)))
    check_plain(load(write(tmp_path / "object.json", {"version": 1, "data": PLAIN})))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in PLAIN))
    check_plain(load(tmp_path / "lines.json"))
    for content, said in {
        '{"a": [], "b": []}': "an object with 2 lists of rows",
        "5": "it holds int",
        "[1, 2": "Is the file whole",
        "[" * 100_000: "cannot be read",
    }.items():
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(DataError, match=said):
            load(tmp_path / "bad.json")


def test_csv_and_tsv(tmp_path):
    for suffix, separator in (("csv", ","), ("tsv", "\t")):
        cells = [[f'"{row[name].replace(chr(34), chr(34) * 2)}"' for name in row] for row in PLAIN]
        lines = [separator.join(row) for row in [["question", "answer"], *cells]]
        path = tmp_path / f"rows.{suffix}"
        path.write_text("\n".join(lines) + "\n")
        check_plain(load(path))
    path = tmp_path / "bad.csv"
    path.write_text("question,answer\na,\nb,c,d\n")
    with pytest.raises(DataError, match=r"row 2 has more cells than the header"):
        load(path)
    path.write_text("question,answer,rejected\na,,\n")
    (sample,) = load(path).samples
    assert sample.reference is None and sample.rejected is None  # an empty cell is no answer


def test_packed_files(tmp_path):
    for name, text in (
        ("rows.jsonl.gz", "".join(json.dumps(row) + "\n" for row in PLAIN)),
        ("r.json.gz", json.dumps(PLAIN)),
    ):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
        check_plain(load(tmp_path / name))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:-10])
    with pytest.raises(DataError, match="Is the file whole"):
        load(tmp_path / "cut.jsonl.gz")


def test_parquet_with_images_as_the_hub_stores_them(folder):
    table = pa.table(
        {
            "question": ["a?", "b?"],
            "image": [{"bytes": png(9), "path": None}, {"bytes": None, "path": "b.png"}],
        }
    )
    pq.write_table(table, folder / "rows.parquet")
    samples = load(folder / "rows.parquet", images=Handling(keep=as_data_url)).samples
    assert [load_images(sample)[0].getpixel((0, 0))[0] for sample in samples] == [9, 1]


def test_a_hub_data_set_by_id_configuration_and_split(folder):
    datasets = pytest.importorskip("datasets")
    rows = {"question": ["a?", "b?"], "images": [["a.png"], ["b.png", "c.png"]]}
    rows["images"] = [[str(folder / name) for name in names] for names in rows["images"]]
    table = datasets.Dataset.from_dict(rows).cast_column("images", datasets.List(datasets.Image()))
    (folder / "set").mkdir()
    table.to_parquet(folder / "set" / "validation-00000.parquet")
    source = PromptSource(hub=HubData(id=str(folder / "set"), split="validation"), image_root=str(folder))
    samples = load_prompts([source], seed=0, images=Handling(keep=as_data_url)).samples
    assert [[i.getpixel((0, 0))[0] for i in load_images(s)] for s in samples] == [[0], [1, 2]]
    assert samples[0].source == f"{folder}/set/validation:1"


def test_what_the_hub_is_asked_and_what_is_said_where_it_cannot_be(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        raise ConnectionError("Couldn't reach 'owner/set' on the Hub (offline)\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = PromptSource(hub={"id": "owner/set", "config": "main", "split": "test[:5]", "revision": "v1"})
    with pytest.raises(DataError) as offline:
        load_prompts([source], seed=0)
    assert asked == [(("owner/set", "main"), {"split": "test[:5]", "revision": "v1"})]
    for said in (
        "owner/set/main/test[:5]",
        "ConnectionError: Couldn't reach",
        "without a network",
        "as path",
    ):
        assert said in str(offline.value)
    assert "more" not in str(offline.value)


# --- how rows are read --------------------------------------------------------------------------------------


def test_columns_by_other_names_and_numbers(folder):
    easy = write(folder / "questions.json", [["what shape?", "circle", "a"], ["what colour?", "red", "b"]])
    options = {"columns": {"prompt": 0, "reference": 1, "image": 2}, "image_name": "{}.png", "task": "vqa"}
    samples = load(easy, template="{}\nAnswer briefly.", **options).samples
    assert [parts(sample) for sample in samples] == [
        ["a", "what shape?\nAnswer briefly."],
        ["b", "what colour?\nAnswer briefly."],
    ]
    assert [(s.reference, s.task) for s in samples] == [("circle", "vqa"), ("red", "vqa")]
    renamed = write(folder / "r.json", [{"q": "x", "prompt": "taken over", "gold": "y"}])
    (sample,) = load(renamed, columns={"prompt": "q", "reference": "gold"}).samples
    assert (sample.messages[0].text, sample.reference) == ("x", "y")
    with pytest.raises(
        DataError, match=r"no column 'quest', which columns\.prompt names; has q, prompt, gold"
    ):
        load(renamed, columns={"prompt": "quest"})
    with pytest.raises(DataError, match="expected an object with columns, got list"):
        load(easy)
    with pytest.raises(DataError, match="is a chat, to which `template` does not apply"):
        load(write(folder / "c.json", [{"conversations": [human("x")]}]), template="{}!")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give path, hub or written; got none"),
        ({"path": "x", "hub": {"id": "y"}}, "got path and hub"),
        ({"path": "x", "template": "no braces"}, "needs {} once"),
        ({"path": "x", "image_name": "{}/{}"}, "needs {} once"),
        ({"path": "x", "columns": {"promt": "q"}}, "columns"),
        ({"path": "x", "weight": 0}, "greater than 0"),
    ],
)
def test_sources_that_cannot_be_read(options, said):
    with pytest.raises(ValidationError, match=said):
        PromptSource(**options)


CHAT = {
    "id": "c",
    "system": "Be brief.",
    "conversations": [human("1?"), gpt("one"), human("2?"), gpt("two"), human("3?")],
}


def test_each_turn_is_a_prompt_with_its_history_and_its_own_answer(tmp_path):
    path = write(tmp_path / "chat.json", [CHAT])
    (last,) = load(path).samples
    assert parts(last) == ["Be brief.", "1?", "one", "2?", "two", "3?"] and last.reference is None
    samples = load(path, turns="all").samples
    assert [s.id for s in samples] == ["c#1", "c#2", "c#3"]
    assert [s.reference for s in samples] == ["one", "two", None]
    assert [parts(s) for s in samples] == [
        ["Be brief.", "1?"],
        ["Be brief.", "1?", "one", "2?"],
        ["Be brief.", "1?", "one", "2?", "two", "3?"],
    ]
    assert len(load(path, turns="all", limit=2).samples) == 2


def test_a_turn_has_the_images_up_to_it_and_no_later_ones(folder):
    chat = [human("<image>\n1?"), gpt("one"), human("<image>\n2?"), gpt("two")]
    path = write(folder / "r.json", [{"image": ["a.png", "b.png"], "conversations": chat}])
    assert [len(s.images) for s in load(path, turns="all").samples] == [1, 2]


def test_a_system_prompt_of_the_source_goes_where_there_is_none(tmp_path):
    own = {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "x"}]}
    samples = load(write(tmp_path / "r.json", [own, {"prompt": "y"}]), system="given").samples
    assert [parts(sample)[0] for sample in samples] == ["own", "given"]


def test_ids_that_are_not_unique_can_be_passed_over(tmp_path):
    path = write(tmp_path / "r.json", [{"id": "k", "prompt": "x"}, {"id": "k", "prompt": "y"}])
    with pytest.raises(DataError, match=r"1 id\(s\) given twice(.|\n)*'k'(.|\n)*ids: place"):
        load(path)
    assert [s.id for s in load(path, ids="place").samples] == ["r.json:1", "r.json:2"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {"conversations": [human("p")], "chosen": gpt("good"), "rejected": gpt("bad")},
        {
            "chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "good"}],
            "rejected": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "bad"}],
        },
    ],
)
def test_chosen_and_rejected_answers(tmp_path, row):
    (sample,) = load(write(tmp_path / "r.json", [row])).samples
    assert (parts(sample), sample.reference, sample.rejected) == (["p"], "good", "bad")


def test_an_answer_must_be_an_assistants_text(tmp_path):
    for value, said in ((human("x"), "must end with the assistant's turn"), (5, "must be text, got int 5")):
        with pytest.raises(DataError, match=f"rejected {said}"):
            load(write(tmp_path / "r.json", [{"prompt": "p", "rejected": value}]))


# --- mixtures -----------------------------------------------------------------------------------------------


def sources(tmp_path, **weights):
    given = []
    for name, (count, weight) in weights.items():
        path = write(tmp_path / f"{name}.json", [{"prompt": f"{name}{i}"} for i in range(count)])
        given.append(PromptSource(path=str(path), weight=weight, task="math" if name == "a" else "code"))
    return given


def test_a_mixture_keeps_its_shares_and_repeats_nothing(tmp_path):
    samples, notes = load_prompts(sources(tmp_path, a=(30, 1), b=(30, 3)), seed=0)
    assert [sum(s.task == task for s in samples) for task in ("math", "code")] == [10, 30]
    assert len({s.id for s in samples}) == 40
    assert notes == [f"mixture by weight: 10 of 30 from {tmp_path}/a.json, 30 of 30 from {tmp_path}/b.json"]
    whole, none = load_prompts(sources(tmp_path, a=(3, None), b=(5, None)), seed=0)
    assert len(whole) == 8 and none == []


def test_weights_that_cannot_be_kept(tmp_path):
    with pytest.raises(DataError, match=r"b\.json has no weight, and other sources have one"):
        load_prompts(sources(tmp_path, a=(3, 1), b=(5, None)), seed=0)
    with pytest.raises(DataError, match=r"b\.json has a weight and no prompts"):
        load_prompts(sources(tmp_path, a=(3, 1), b=(0, 1)), seed=0)


# --- whole data sets ----------------------------------------------------------------------------------------


def test_real_conversations_with_images(real_data):
    demo = real_data / "llamafactory_demo"
    samples = load(demo / "mllm_demo.json").samples
    assert samples and all(sample.images for sample in samples)
    every = load(demo / "mllm_demo.json", turns="all", images=Handling(look="decode")).samples
    assert len(every) > len(samples) and all(sample.reference for sample in every)
    preferences = load(demo / "dpo_en_demo.json").samples
    assert len(preferences) == 300 and all(s.reference and s.rejected for s in preferences)


def test_real_photos(real_data):
    daquar = load(
        real_data / "daquar" / "train.jsonl", columns={"reference": "answer_raw"}, limit=200
    ).samples
    assert len(daquar) == 200 and all(len(s.images) == 1 and s.reference for s in daquar)


def test_easy_vqa_as_its_package_ships_it():
    pytest.importorskip("easy_vqa", reason="needs pip install --no-deps easy-vqa")
    samples = load(
        "pkg://easy_vqa/data/train/questions.json",
        columns={"prompt": 0, "reference": 1, "image": 2},
        image_name="images/{}.png",
        task="vqa",
    ).samples
    assert len(samples) == 38_575 and len({i for s in samples for i in s.images}) == 4000


def test_reading_prompts_needs_neither_torch_nor_datasets(folder):
    path = write(folder / "r.json", [{"prompt": "x", "image": "a.png"}])
    code = (
        "import sys\nfrom shared.config_data import PromptSource\n"
        "from shared.data.prompts import load_prompts\n"
        f"load_prompts([PromptSource(path={str(path)!r})], seed=0)\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
