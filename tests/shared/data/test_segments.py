"""Every token of a response is in exactly one part, the one in which it begins."""

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.segments import BY_TASK, SEGMENTERS, segment_ids, token_ends
from shared.errors import UserError


def parts(text, segmenter):
    starts = [0, *SEGMENTERS[segmenter](text), len(text)]
    return [text[a:b] for a, b in pairwise(starts)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?", ["One.", " Two!", " Three?"]),
        ("No end", ["No end"]),
        ("", [""]),
        ("He said “Go.” She went.", ["He said “Go.”", " She went."]),
        ("Pi is 3.14 or so. Yes.", ["Pi is 3.14 or so.", " Yes."]),
        ("Ask Dr. Who, e.g. Tom. J. Smith left.", ["Ask Dr. Who, e.g. Tom.", " J. Smith left."]),
        ("Wait... what? ok", ["Wait... what? ok"]),  # a sentence does not begin in lower case
        ("1. Mix.\n2. Bake.\n\nDone.\n", ["1. Mix.\n", "2. Bake.\n\n", "Done.\n"]),
        ("Take a. Then b.", ["Take a.", " Then b."]),
        ("天気がいい。行こう！", ["天気がいい。", "行こう！"]),
        ("\n\nFirst.\n \n", ["\n\nFirst.\n \n"]),
    ],
)
def test_sentences(text, expected):
    assert parts(text, "sentences") == expected


def test_lines_steps_and_the_whole():
    code = "def f(x):\n\n    return x\n"
    assert parts(code, "lines") == ["def f(x):\n\n", "    return x\n"]
    solution = "We add. Then\n\\[\nx = 3.\nY = 4\n\\]\nSo $x$ is 3.\n#### 3"
    assert parts(solution, "steps") == [
        "We add.", " Then\n", "\\[\nx = 3.\nY = 4\n\\]\n", "So $x$ is 3.\n", "#### 3"
    ]  # fmt: skip
    assert parts(solution, "whole") == [solution]
    assert set(BY_TASK.values()) <= set(SEGMENTERS)


class Pieces:
    """Token i is piece i; the last one is the turn's end, without text."""

    def __init__(self, *pieces):
        self.pieces = [piece.encode() if isinstance(piece, str) else piece for piece in pieces] + [b""]
        self.ids = list(range(len(self.pieces)))

    def decode(self, token_ids):
        return b"".join(self.pieces[i] for i in token_ids).decode("utf-8", "replace")


def test_a_straddling_token_is_in_the_earlier_part_and_the_turns_end_in_the_last():
    tokens = Pieces("One", ". T", "wo", ".\n\n", "Three", ".")
    assert segment_ids(tokens.ids, tokens.decode, "sentences") == [0, 0, 1, 1, 2, 2, 2]
    assert segment_ids(tokens.ids, tokens.decode, "whole") == [0] * 7
    spaced = Pieces("One", ".", " Two", ".")
    assert segment_ids(spaced.ids, spaced.decode, "sentences") == [0, 0, 1, 1, 1]
    assert segment_ids([], tokens.decode, "lines") == []
    swallowed = Pieces("A.\nB.\nC", ".")  # a part without a token of its own leaves no gap
    assert segment_ids(swallowed.ids, swallowed.decode, "lines") == [0, 1, 1]


def test_characters_in_several_tokens():
    word = "a😀b".encode()
    tokens = Pieces(*(word[i : i + 1] for i in range(len(word))))
    ends = token_ends(tokens.ids, tokens.decode)
    assert ends[0] == 1 and ends[4:] == [2, 3, 3] and all(1 <= end <= 2 for end in ends[1:4])


def test_a_decoder_that_looks_far_back_is_followed_exactly():
    tokens = Pieces(*"abcdefghij")

    def decode(ids):  # drops the third token's text once ten follow
        text = tokens.decode(ids)
        return text if len(ids) < 8 else text.replace("c", "", 1)

    exact = [len(decode(tokens.ids[:end])) for end in range(1, 12)]
    assert token_ends(tokens.ids, decode)[-1] == exact[-1] == 9


def test_an_unknown_segmenter_suggests_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'sentences'"):
        segment_ids([1], str, "sentence")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "B", ". ", ".", "\n", " ", "1.", "é", "漢。", "$$", "?\n\n"]), min_size=1),
    st.sampled_from(sorted(SEGMENTERS)),
)
def test_parts_cover_the_text_and_the_tokens_without_gaps(pieces, segmenter):
    tokens = Pieces(*pieces)
    text = "".join(pieces)
    assert "".join(parts(text, segmenter)) == text
    assert all(re.search(r"\S", part) for part in parts(text, segmenter)) or not text.strip()
    ids = segment_ids(tokens.ids, tokens.decode, segmenter)
    assert ids[0] == 0 and all(b - a in (0, 1) for a, b in pairwise(ids))
    assert token_ends(tokens.ids, tokens.decode) == [
        len(tokens.decode(tokens.ids[:end])) for end in range(1, len(tokens.ids) + 1)
    ]
