"""Responses out of files are those that are written there, to exactly the prompts of the run."""

import json

import pytest

from shared.data.offline import check_offline, offline_responses
from shared.errors import DataError, UserError
from shared.generation.collect import RESPONSE_SCHEMA
from shared.store import Store
from shared.types import Message, Sample, TextPart

SAMPLES = [
    Sample(
        f"s{i}",
        (Message("user", (TextPart("x"),)),),
        source=f"p:{i}",
        reference=f"good {i}",
        rejected=f"bad {i}",
    )
    for i in range(3)
]


class Letters:
    """A token a character; 0 ends a turn."""

    fingerprint = "letters"

    def encode_text(self, text, *, stop):
        return (*map(ord, text), *((0,) if stop else ()))

    def decode(self, token_ids):
        return "".join(map(chr, token_ids)).replace("\0", "")


def read(source, role="teacher", samples=SAMPLES):
    return offline_responses(samples, role, str(source), Letters())


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(**more):
    return [{"sample_id": f"s{i}", "text": f"t{i}", **more} for i in range(3)]


def test_chosen_and_rejected_columns_are_the_two_sides():
    for role, word in (("teacher", "good"), ("student", "bad")):
        found = read("columns", role)
        assert [(r.sample_id, r.text, r.role, r.draw) for r in found.responses] == [
            (f"s{i}", f"{word} {i}", role, 0) for i in range(3)
        ]
        assert Letters().decode(found.responses[0].token_ids) == f"{word} 0"
        assert found.responses[0].token_ids[-1] == 0  # the turn's end is taught
    assert found.summary("columns") == "3 from columns, 3 tokenised from their text"
    bare = [*SAMPLES, Sample("s3", SAMPLES[0].messages, source="p:3")]
    for role, column in (("teacher", "chosen or reference"), ("student", "rejected")):
        with pytest.raises(DataError, match=rf"{role}: columns needs the {column} .* 1 have none \(p:3\)"):
            check_offline(bare, role, "columns")


def test_token_ids_are_taken_over_where_they_mean_the_same_text(tmp_path):
    given = [
        {"id": "s0", "text": "hi", "token_ids": [104, 105], "finish_reason": "length"},
        {"id": "s1", "text": "hi", "token_ids": [1, 2]},  # of another vocabulary
        {"id": "s2", "response": "yo", "finish_reason": "length"},
        {"id": "elsewhere", "text": "passed over"},
    ]
    found = read(write(tmp_path / "r.jsonl", given))
    assert [r.token_ids for r in found.responses] == [(104, 105), (104, 105, 0), (121, 111)]
    assert [r.finish_reason for r in found.responses] == ["length", "stop", "length"]
    assert found.retokenised == 2


def test_another_runs_store_is_read_as_it_is(tmp_path):
    store = Store.open(tmp_path / "teacher", kind="responses", identity={}, schema=RESPONSE_SCHEMA)
    row = {"role": "teacher", "round": 1, "finish_reason": "stop", "fingerprint": "f", "usage": None}
    for part in range(3):
        ids = [116, 48 + part, 0]
        store.write(part, [{**row, "sample_id": f"s{part}", "draw": 0, "token_ids": ids, "text": f"t{part}"}])
    found = read(tmp_path / "teacher")
    assert [r.token_ids for r in found.responses] == [(116, 48, 0), (116, 49, 0), (116, 50, 0)]
    assert found.retokenised == 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no responses"):
        read(tmp_path / "empty")


def test_a_file_of_both_roles_and_several_draws(tmp_path):
    both = [*rows(role="teacher", draw=0), *rows(role="teacher", draw=1), *rows(role="student")]
    path = write(tmp_path / "r.jsonl", both)
    assert [(r.sample_id, r.draw) for r in read(path).responses] == [
        (f"s{i}", draw) for draw in (0, 1) for i in range(3)
    ]
    assert len(read(path, "student").responses) == 3
    (tmp_path / "r.csv").write_text("sample_id,text,draw\n" + "".join(f"s{i},t,1\n" for i in range(3)))
    assert {r.draw for r in read(tmp_path / "r.csv").responses} == {1}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x"}, "needs sample_id and text; has text"),
        ({"id": "s0", "text": 5}, "needs sample_id and text"),
        ({"id": "s0", "text": "x", "draw": -1}, "draw and token_ids must be numbers from 0"),
        ({"id": "s0", "text": "x", "token_ids": ["a"]}, "draw and token_ids must be numbers"),
        ({"id": "s0", "text": "x", "finish_reason": "bored"}, "finish_reason must be one of stop, len"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, row, said):
    path = write(tmp_path / "r.jsonl", [*rows(), row])
    with pytest.raises(
        DataError, match=rf"1 unusable row\(s\) in generation\.offline\.teacher(.|\n)*:4: {said}"
    ):
        check_offline(SAMPLES, "teacher", str(path))


def test_files_that_do_not_answer_every_prompt_or_are_not_there(tmp_path):
    with pytest.raises(DataError, match=r"has no response to 1 of 3 prompts \(s2\)"):
        read(write(tmp_path / "r.jsonl", rows()[:2]))
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:1: not JSON"):
        read(tmp_path / "bad.jsonl")
    (tmp_path / "list.json").write_text("[[1]]")
    with pytest.raises(DataError, match="expected an object with columns, got list"):
        read(tmp_path / "list.json")
    for name in ("nowhere", "./nowhere"):
        with pytest.raises(UserError, match="does not exist"):
            read(name)
