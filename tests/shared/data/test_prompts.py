"""Prompt files become samples; what cannot be used is named by file and line, all at once."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shared.config_data import PromptSource
from shared.data.prompts import load_prompts, split_by_length
from shared.errors import DataError, UserError
from shared.types import ImagePart, Message, Sample, TextPart


def write_jsonl(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def load(*paths, seed=0, **options):
    return load_prompts([PromptSource(path=str(path), **options) for path in paths], seed=seed).samples


def turn(role, content):
    return {"role": role, "content": content}


ROWS = [
    {
        "messages": [turn("system", "be brief"), turn("user", "hi"), turn("assistant", "hello")],
        "task": "code",
    },
    {"prompt": "count", "reference": "1 2 3", "id": "given"},
    {"instruction": "sort", "input": "3 1", "output": "1 3", "id": 7},
    {"instruction": "alone", "input": ""},
    {"prompt": [turn("user", "a"), turn("assistant", "b"), turn("user", [{"type": "text", "text": "c"}])]},
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_every_column_form(tmp_path, suffix):
    rows = ROWS[:4]  # a Parquet column has one type, so a `prompt` that is a chat stays out
    if suffix == "parquet":
        path = tmp_path / "p.parquet"
        columns = {"messages", "prompt", "instruction", "input", "output", "reference", "task"}
        uniform = [
            {c: row.get(c) for c in columns} | {"id": str(row.get("id", f"p{i}"))}
            for i, row in enumerate(rows)
        ]
        pq.write_table(pa.Table.from_pylist(uniform), path)
    else:
        path = write_jsonl(tmp_path / "p.jsonl", *ROWS)
    first, second, third, fourth, *rest = load(path, task="math")
    assert first.messages == (Message("system", (TextPart("be brief"),)), Message("user", (TextPart("hi"),)))
    assert (first.reference, first.task, first.source) == ("hello", "code", f"{path.name}:1")
    assert (second.id, second.messages[0].text, second.reference, second.task) == (
        "given",
        "count",
        "1 2 3",
        "math",
    )
    assert (third.id, third.messages[0].text, third.reference) == ("7", "sort\n\n3 1", "1 3")
    assert (fourth.messages[0].text, fourth.reference) == ("alone", None)
    if suffix == "jsonl":
        assert first.id == "p.jsonl:1"
        assert [m.role for m in rest[0].messages] == ["user", "assistant", "user"]


def test_image_parts_become_the_paths_of_files_beside_the_prompts(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]
    (sample,) = load(write_jsonl(tmp_path / "p.jsonl", {"messages": [turn("user", content)]}))
    assert sample.messages[0].parts == (ImagePart(str(tmp_path / "a.png")), TextPart("what?"))


def test_same_text_stays_apart_also_across_files_of_one_name(tmp_path):
    (tmp_path / "other").mkdir()
    one = write_jsonl(tmp_path / "p.jsonl", {"prompt": "same"}, "", {"prompt": "same"})
    two = write_jsonl(tmp_path / "other" / "p.jsonl", {"prompt": "same"})
    assert [s.id for s in load(one, two)] == ["p.jsonl:1", "p.jsonl:3", "p.jsonl#2:1"]


def test_id_given_twice_names_both_rows(tmp_path):
    one = write_jsonl(tmp_path / "a.jsonl", {"prompt": "x", "id": "k"})
    two = write_jsonl(tmp_path / "b.jsonl", {"prompt": "y"}, {"prompt": "z", "id": "k"})
    with pytest.raises(DataError, match=r"b\.jsonl:2: id 'k' is also that of a\.jsonl:1"):
        load(one, two)


def test_shuffle_is_seeded_stable_under_added_rows_and_comes_before_the_limit(tmp_path):
    path = tmp_path / "p.jsonl"
    write_jsonl(path, *({"prompt": f"p{i}"} for i in range(30)))
    first = [s.id for s in load(path, shuffle=True, seed=1)]
    assert first == [s.id for s in load(path, shuffle=True, seed=1)]
    assert first != [s.id for s in load(path, shuffle=True, seed=2)]
    assert sorted(first) == sorted(s.id for s in load(path)) and first != [s.id for s in load(path)]
    assert [s.id for s in load(path, shuffle=True, seed=1, limit=5)] == first[:5]
    assert [s.id for s in load(path, limit=2)] == ["p.jsonl:1", "p.jsonl:2"]
    assert [s.id for s in load(path, shuffle=True, seed=1, skip=5)] == first[5:]
    assert [s.id for s in load(path, shuffle=True, seed=1, skip=5, limit=2)] == first[5:7]
    assert [s.id for s in load(path, skip=1, limit=1)] == ["p.jsonl:2"]
    with pytest.raises(DataError, match="at least one row beyond what `skip`"):
        load(path, skip=1000)
    write_jsonl(path, *({"prompt": f"p{i}"} for i in range(40)))
    assert [i for i in (s.id for s in load(path, shuffle=True, seed=1)) if i in set(first)] == first


BAD = {
    "{oops": "not JSON",
    "[1]": "expected an object",
    '{"text": "x"}': r"needs a column messages, .*instruction or chosen; has text; .*as in \{prompt: text\}",
    '{"prompt": "  "}': "the prompt is empty",
    '{"prompt": 3}': "prompt must be text, got int 3",
    '{"prompt": "x", "task": "maths"}': "Did you mean 'math'?",
    '{"prompt": "x", "id": ""}': "id must be text or an integer",
    '{"prompt": "\\ud800"}': "surrogate",
    '{"messages": []}': "must be a list of turns",
    '{"messages": [{"role": "user"}]}': r"messages\[0\] must be {role, content}",
    '{"messages": [{"role": "usr", "content": "x"}]}': "Did you mean 'user'?",
    '{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}': r"content\[0\] must be",
    '{"messages": [{"role": "assistant", "content": "x"}]}': "an assistant's turn alone",
    '{"messages": [{"role": "system", "content": "x"}]}': "must be the user's, got the system's",
    '{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}, '
    '{"role": "user", "content": "z"}]}': "can only be the first",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_row_is_named_by_file_and_line(tmp_path, line):
    path = write_jsonl(tmp_path / "bad.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(DataError, match=rf"1 unusable row\(s\)(.|\n)*bad\.jsonl:2: .*{BAD[line]}"):
        load(path)


def test_all_bad_rows_of_all_files_in_one_message_the_first_ten_listed(tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", *({"prompt": [{"role": f"r{i}"}]} for i in range(11)))
    two = tmp_path / "two.jsonl"
    two.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError) as bad:
        load(one, two)
    message = str(bad.value)
    assert "12 unusable" in message and "... and 2 more" in message
    assert "one.jsonl:10" in message and "one.jsonl:11" not in message
    with pytest.raises(DataError, match="not UTF-8"):
        load(two)


def test_rows_with_the_same_cause_are_listed_once(tmp_path):
    path = write_jsonl(tmp_path / "mine.jsonl", {"prompt": 3}, *([{"ticket": "x"}] * 11))
    with pytest.raises(DataError) as bad:
        load(path)
    head, first, second, _ = str(bad.value).splitlines()
    assert "12 unusable" in head and first.endswith("mine.jsonl:1: prompt must be text, got int 3")
    assert "mine.jsonl:2: needs a column" in second and second.endswith("(and 10 more such rows)")


def test_files_that_are_no_prompt_files(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="is not a file"):
        load("hub/dataset")
    (tmp_path / "rows.xml").write_text("<prompt/>")
    with pytest.raises(DataError, match=r"is a \.xml file; known: \.jsonl, .* and \.parquet"):
        load(tmp_path / "rows.xml")
    (tmp_path / "half.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        load(tmp_path / "half.parquet")
    with pytest.raises(DataError, match="no prompts in"):
        load(write_jsonl(tmp_path / "empty.jsonl", "", ""))


def samples(*lengths):
    return [
        Sample(f"s{i}", (Message("user", (TextPart("x" * n),)),), source=f"p.jsonl:{i}")
        for i, n in enumerate(lengths)
    ]


def length(sample):
    return len(sample.messages[0].text)


def test_long_prompts_are_dropped_and_listed_or_fail_the_run():
    given = samples(3, 9, 5, 6)
    split = split_by_length(given, length, max_prompt_tokens=5, on_over="drop")
    assert split.kept == [given[0], given[2]]
    assert split.dropped == [(given[1], 9), (given[3], 6)]
    with pytest.raises(DataError) as over:
        split_by_length(given, length, max_prompt_tokens=5, on_over="fail")
    for said in ("2 of 4 prompts", "5 tokens", "'s1' (p.jsonl:1): 9 tokens", "over_length: drop"):
        assert said in str(over.value)
    with pytest.raises(DataError, match="4 of 4"):
        split_by_length(given, length, max_prompt_tokens=1, on_over="drop")
    assert split_by_length(given, length, max_prompt_tokens=9, on_over="fail").kept == given


def test_real_rows(real_data):
    seeds = load(real_data / "self_instruct" / "seed_tasks.jsonl")
    assert len(seeds) == 175 and len({s.id for s in seeds}) == 175
