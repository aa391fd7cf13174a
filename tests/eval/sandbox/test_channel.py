"""Values come back as they went, and no bytes make more than data."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.sandbox.inside.channel import Channel, ChannelError, NotSendableError


class Strict:
    """A peer that has no objects."""

    def export(self, value: object) -> tuple[str, int]:
        raise NotSendableError(type(value).__name__)

    def resolve(self, owner: str, number: int) -> object:
        raise ValueError(owner)


def through(value: object) -> Any:
    read_fd, write_fd = os.pipe()
    with os.fdopen(read_fd, "rb"), os.fdopen(write_fd, "wb"):
        Channel(-1, write_fd, Strict()).send({"value": value})
        return Channel(read_fd, -1, Strict()).receive()["value"]


def received(body: bytes) -> Any:
    read_fd, write_fd = os.pipe()
    with os.fdopen(read_fd, "rb"):
        with os.fdopen(write_fd, "wb") as file:
            file.write(body)
        return Channel(read_fd, -1, Strict()).receive()


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.text(),
    st.binary(),
    st.dates(),
    st.timedeltas(),
    st.fractions(),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(scalars, inner)
        | st.sets(scalars)
        | st.frozensets(scalars)
    ),
)


def same(one: Any, other: Any) -> bool:
    """Equal, of one type, and so is all that is in them."""
    if type(one) is not type(other) or one != other:
        return False
    if isinstance(one, dict):
        one, other = list(one.items()), list(other.items())
    return not isinstance(one, list | tuple) or all(map(same, one, other))


@settings(deadline=None)
@given(values)
def test_a_value_comes_back_as_it_went(value: object) -> None:
    assert same(through(value), value)


@pytest.mark.parametrize(
    "value", [2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 7 << 20_000, "\ud800"], ids=range(6)
)
def test_edges(value: object) -> None:
    assert through(value) == value


def test_zero_keeps_its_sign() -> None:
    assert math.copysign(1, through(-0.0)) == -1


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60))
def test_no_bytes_do_harm(body: bytes) -> None:
    message = len(body).to_bytes(4, "little") + body
    with suppress(ChannelError):
        assert isinstance(received(message), dict)


@settings(deadline=None, max_examples=100)
@given(values, st.data())
def test_no_damage_to_a_message_does_harm(value: object, data: st.DataObject) -> None:
    read_fd, write_fd = os.pipe()
    with os.fdopen(read_fd, "rb") as file:
        Channel(-1, write_fd, Strict()).send({"value": value})
        os.close(write_fd)
        body = bytearray(file.read())
    place = data.draw(st.integers(4, len(body) - 1))
    body[place] = data.draw(st.integers(0, 255))
    with suppress(ChannelError):
        received(bytes(body))


@pytest.mark.parametrize("name", [b"os", b"eval", b"exec", b"open", b"__import__", b"subprocess", b"\xff"])
@pytest.mark.parametrize("tag", [b"m", b"n", b"x", b"p"])
def test_only_harmless_names_are_known(tag: bytes, name: bytes) -> None:
    body = b"d\x02\0\0\0s\x01\0\0\0v" + tag + len(name).to_bytes(4, "little") + name + b"t\0\0\0\0" + bytes(8)
    with pytest.raises(ChannelError):
        received(len(body).to_bytes(4, "little") + body)


def test_a_value_in_itself_is_refused_before_a_byte_is_sent() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(NotSendableError, match="nested too deeply"):
        through(loop)
