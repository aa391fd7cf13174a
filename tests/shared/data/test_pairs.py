"""Pairs: the right responses together, nothing lost without a word."""

import pytest

from shared.data.pairs import Dropped, make_groups, pair_facts
from shared.errors import DataError
from shared.types import Message, Response, Sample, TextPart

SAMPLES = [Sample(f"s{i}", (Message("user", (TextPart("same text"),)),), source=f"p:{i}") for i in range(3)]


def response(sample, role, *, tokens=(5, 6), finish="stop", draw=0, round_=1):
    return Response(sample, role, round_, draw, tuple(tokens), "", finish, "f")


def responses(role, **changed):
    return [changed.get(s.id) or response(s.id, role, tokens=(int(s.id[1:]) + 10,)) for s in SAMPLES]


def pair(teacher, student, *, truncated="keep", roles=("teacher", "student")):
    return make_groups(SAMPLES, {"student": student, "teacher": teacher}, roles, truncated=truncated)


def test_groups_follow_the_samples_and_the_roles_and_duplicates_stay_apart():
    grouping = pair(reversed(responses("teacher")), responses("student"))
    assert [group.sample for group in grouping.groups] == SAMPLES
    for index, group in enumerate(grouping.groups):
        assert [r.role for r in group.responses] == ["teacher", "student"]
        assert {r.token_ids for r in group.responses} == {(index + 10,)}
    swapped = pair(responses("teacher"), responses("student"), roles=("student",))
    assert [[r.role for r in g.responses] for g in swapped.groups] == [["student"]] * 3
    assert grouping.summary() == "3 groups, none left out"


def test_empty_and_truncated_are_left_out_counted_and_listed():
    teacher = responses("teacher", s1=response("s1", "teacher", finish="length"))
    student = responses("student", s0=response("s0", "student", tokens=()))
    kept = pair(teacher, student, truncated="keep")
    assert [g.sample.id for g in kept.groups] == ["s1", "s2"]
    assert kept.dropped == [Dropped("s0", 0, "student", "empty")]
    dropped = pair(teacher, student, truncated="drop")
    assert [g.sample.id for g in dropped.groups] == ["s2"]
    assert dropped.dropped == [Dropped("s0", 0, "student", "empty"), Dropped("s1", 0, "teacher", "truncated")]
    assert dropped.summary() == (
        "left out 2 of 3 groups (1 × student response empty, 1 × teacher response truncated): s0, s1"
    )


def test_missing_response_is_an_error():
    with pytest.raises(DataError, match=r"1 response\(s\) missing(.|\n)*'s2' \(p:2\), draw 0: no student"):
        pair(responses("teacher"), responses("student")[:2])
    with pytest.raises(DataError, match="no teacher or student"):
        pair([], [])
    two_draws = [*responses("teacher"), response("s0", "teacher", draw=1)]
    with pytest.raises(DataError, match=r"'s0' .*draw 1: no student"):
        pair(two_draws, responses("student"))


def test_each_draw_is_a_group():
    teacher = [*responses("teacher"), response("s1", "teacher", draw=1, tokens=(1,))]
    student = [*responses("student"), response("s1", "student", draw=1, tokens=(2,))]
    groups = pair(teacher, student).groups
    assert [g.sample.id for g in groups] == ["s0", "s1", "s1", "s2"]
    assert [r.token_ids for r in groups[2].responses] == [(1,), (2,)]


def test_two_responses_of_one_draw_are_refused():
    with pytest.raises(DataError, match=r"rounds 1 and 2"):
        pair([*responses("teacher"), response("s0", "teacher", round_=2)], responses("student"))


def test_nothing_left_is_an_error():
    cut = [response(s.id, "teacher", finish="length") for s in SAMPLES]
    with pytest.raises(DataError, match=r"no group is left.*3 × teacher response truncated"):
        pair(cut, responses("student"), truncated="drop")


def test_facts_of_a_round_count_pairs_with_one_answer():
    student = responses("student", s0=response("s0", "student", tokens=(1, 2, 3, 4)))
    facts = pair_facts(pair(responses("teacher"), student).groups)
    assert facts == {"groups": 3, "mean_tokens": {"student": 2.0, "teacher": 1.0}, "same": 2 / 3}
    alone = pair_facts(pair(responses("teacher"), student, roles=("student",)).groups)
    assert alone == {"groups": 3, "mean_tokens": {"student": 2.0}, "same": None}
