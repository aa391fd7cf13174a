"""Responses that nobody should learn from are named for what is wrong with them; good ones pass."""

import pytest
from pydantic import ValidationError

from shared.config_data import FilterConfig
from shared.data.filters import fault, is_refusal, repetition
from shared.types import Response


def response(text="a good answer", tokens=range(20), finish="stop", role="teacher"):
    return Response("s", role, 1, 0, tuple(tokens), text, finish, "f")


def found(given, truncated="keep", longest=None, **filters):
    rules = FilterConfig(**filters) if filters else None
    return fault(given, truncated=truncated, filters=rules, longest=longest)


def test_what_goes_always_and_what_only_when_asked():
    assert found(response()) is None
    assert found(response(tokens=())) == "empty"
    assert found(response(finish="filtered")) == "withheld"
    assert found(response(finish="length")) is None
    assert found(response(finish="length"), truncated="drop") == "truncated"
    assert found(response(), longest=19) == "long" and found(response(), longest=20) is None
    assert found(response(text=" \n")) is None  # an end of turn alone can be learned, unless filters are on
    assert found(response(text=" \n"), min_tokens=1) == "empty"


@pytest.mark.parametrize(
    ("given", "filters", "expected"),
    [
        (response(), {"min_tokens": 21}, "short"),
        (response(), {"min_tokens": 20}, None),
        (response(), {"max_tokens": 19}, "long"),
        (response(), {"max_tokens": 20}, None),
        (response(tokens=[1, 2, 3] * 20), {"max_repetition": 0.5}, "repetitive"),
        (response(tokens=range(60)), {"max_repetition": 0.0}, None),
        (response("I’m sorry, but I can’t help with that."), {"refusals": True}, "refusal"),
        (response("I’m sorry, but I can’t help with that."), {"refusals": ("weather",)}, None),
        (response("No WEATHER today"), {"refusals": ("weather",)}, "refusal"),
        (response("I’m sorry, but I can’t help with that."), {"min_tokens": 2}, None),
    ],
)
def test_each_filter(given, filters, expected):
    assert found(given, **filters) == expected


def test_a_students_bad_answers_stay_unless_asked():
    looped = response(tokens=[1, 2, 3] * 20, role="student")
    assert found(looped, max_repetition=0.5) is None
    assert found(looped, max_repetition=0.5, roles=("teacher", "student")) == "repetitive"


def test_a_loop_tells_by_its_end():
    fresh = list(range(1000))
    assert repetition(fresh) == 0
    assert repetition([7] * 15) == 0  # too few to say
    assert repetition([7] * 16) == pytest.approx(12 / 13)
    assert repetition([1, 2, 3, 4] * 16) == pytest.approx(1 - 4 / 61)
    # a long answer that ends in a loop repeats little as a whole
    assert repetition(fresh + [1, 2, 3] * 22) > 0.9
    prose = "the cat sat on the mat and the dog lay on the rug while it rained on the town all day"
    assert repetition([hash(word) for word in prose.split()]) < 0.2


def test_a_refusal_is_in_the_first_words():
    assert is_refusal("As an AI language model, I have no body.")
    assert not is_refusal("To answer politely: " + "x " * 100 + "say “I cannot assist with that”.")
    assert not is_refusal("Here is how to cannot-open a jar.")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens <= max_tokens; got 5 and 4"),
        ({"max_repetition": 1.5}, "less than or equal to 1"),
        ({"roles": ()}, "at least 1"),
        ({"roles": ("judge",)}, "teacher"),
    ],
)
def test_filters_that_cannot_be(settings, said):
    with pytest.raises(ValidationError, match=said):
        FilterConfig(**settings)
