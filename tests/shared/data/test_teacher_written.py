"""A teacher's own prompts: the good ones once each, the same whatever the batch."""

import numpy as np
import pytest

from shared.config_data import PromptSource, WrittenConfig
from shared.data.near_duplicates import NearDuplicates
from shared.data.prompts import load_prompts
from shared.data.teacher_written import save_prompts, user_turn, write_prompts
from shared.data.words import ngrams, words
from shared.errors import DataError, UserError
from shared.types import Response

TEXTS = [
    "How do I bake a sourdough bread at home without a starter?",
    "how do I bake a sourdough bread, at home, without a starter",  # the first, nearly
    "Hi",
    "Explain the difference between a list and a tuple in Python.",
    "word " * 500,
    "Write a haiku about the autumn wind over a harbour town.",
    "List three ways to save water in a small garden.",
]
CUT = 3


class Teacher:
    """Goes through TEXTS again and again, by the number of the draw."""

    def __init__(self):
        self.asked = 0

    def __call__(self, draws):
        self.asked += len(draws)
        for draw in draws:
            reason = "length" if draw % 7 == CUT else "stop"
            yield Response("s", "teacher", 0, draw, (1,), f" {TEXTS[draw % 7]}\n", reason, "")


def wanted(count, **options):
    return PromptSource(written=WrittenConfig(count=count, **options))


@pytest.mark.parametrize("least", [1, 3, 64])
def test_what_is_kept_does_not_depend_on_how_many_are_asked_for_together(least):
    teacher = Teacher()
    written = write_prompts(teacher, wanted(3), least=least)
    assert written.prompts == {0: TEXTS[0], 5: TEXTS[5], 6: TEXTS[6]}
    assert written.dropped == {
        "nearly an earlier one": 1, "under 3 words": 1, "cut by the length limit": 1, "over 400 words": 1
    }  # fmt: skip
    assert written.note() == (
        "3 prompts written by the teacher; left out: 1 × cut by the length limit, 1 × nearly an earlier one, "
        "1 × over 400 words, 1 × under 3 words"
    )
    assert teacher.asked <= 24


def test_limits_and_threshold_are_the_configured_ones():
    written = write_prompts(Teacher(), wanted(3, min_words=1, near_duplicate=1.0))
    assert list(written.prompts) == [0, 2, 5]  # the second has the same words in the same order
    assert list(write_prompts(Teacher(), wanted(1, max_words=10)).prompts) == [6]


def test_what_an_earlier_source_has_does_not_come_again():
    written = write_prompts(Teacher(), wanted(1), earlier=[TEXTS[0], TEXTS[5]])
    assert written.prompts == {6: TEXTS[6]} and written.dropped["nearly an earlier one"] == 3


def test_a_teacher_that_repeats_itself_is_given_up():
    with pytest.raises(
        DataError, match=r"3 prompts .*after 40 tries; 5 were wanted.*raise written.temperature"
    ):
        write_prompts(Teacher(), wanted(5), least=7)


def test_what_a_template_writes_around_a_users_text():
    def template(message):
        return f"<|{message.role}|>\n{message.text}<|end|>\n<|assistant|>"

    assert user_turn(template) == ("<|user|>\n", "<|end|>\n<|assistant|>")
    for unfit in (lambda message: template(message).upper(), lambda message: message.text):
        with pytest.raises(UserError, match=r"no user turn that begins .* Give prompts as a file"):
            user_turn(unfit)


def test_saved_prompts_are_a_prompt_source(tmp_path):
    path = tmp_path / "prompts" / "written.jsonl"
    written = write_prompts(Teacher(), wanted(2))
    save_prompts(path, written, name="w")
    (loaded, _) = load_prompts([PromptSource(path=str(path))], seed=0)
    assert {s.id: s.messages[0].text for s in loaded} == {"w:0": TEXTS[0], "w:5": TEXTS[5]}


def test_near_duplicates_are_those_of_the_exact_jaccard_index():
    random = np.random.default_rng(3)
    vocabulary = [f"w{i}" for i in range(400)]
    texts = []
    for _ in range(60):
        base = list(random.choice(vocabulary, 40))
        texts.append(" ".join(base))
        for changes in (1, 4, 12):
            twin = list(base)
            for place in random.integers(0, 40, changes):
                twin[place] = random.choice(vocabulary)
            texts.append(" ".join(twin))
    order = random.permutation(len(texts))
    seen, kept, near = NearDuplicates(0.7), [], 0
    for number, index in enumerate(order):
        triples = set(ngrams(words(texts[index]), 3))
        twins = [n for n, other in kept if len(triples & other) >= 0.7 * len(triples | other)]
        found = seen.add(texts[index])
        assert (found is None) == (not twins) and (found is None or found in twins)
        near += found is not None
        if found is None:
            kept.append((number, triples))
    assert 60 < near < 180


def test_texts_without_words_and_with_few():
    seen = NearDuplicates(0.7)
    assert [seen.add(text) for text in ("?", "!", "hello", "Hello!", "hello there")] == [
        None,
        0,
        None,
        2,
        None,
    ]
