"""A teacher's own prompts: the good ones once each, the same whatever the batch."""

import json

import numpy as np
import pytest

from shared.config_data import PromptSource
from shared.data.near_duplicates import NearDuplicates
from shared.data.prompts import load_prompts
from shared.data.teacher_written import Continuation, save_prompts, user_turn_start, write_prompts
from shared.data.words import ngrams, words
from shared.errors import DataError, UserError

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
        self.starts, self.asked = set(), 0

    def __call__(self, start, draws):
        self.starts.add(start)
        self.asked += len(draws)
        return [Continuation(f" {TEXTS[draw % 7]}\n", finished=draw % 7 != CUT) for draw in draws]


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_what_is_kept_does_not_depend_on_the_batch(batch):
    teacher = Teacher()
    written = write_prompts(teacher, "<user>", count=3, task="code", batch=batch)
    assert [s.id for s in written.samples] == ["written:0", "written:5", "written:6"]
    assert written.samples[0].messages[0].text == TEXTS[0] and written.samples[0].task == "code"
    assert written.dropped == {
        "nearly an earlier one": 1, "under 3 words": 1, "cut by the length limit": 1, "over 400 words": 1
    }  # fmt: skip
    assert written.note() == (
        "3 prompts written by the teacher; left out: 1 × cut by the length limit, 1 × nearly an earlier one, "
        "1 × over 400 words, 1 × under 3 words"
    )
    assert teacher.starts == {"<user>"} and teacher.asked <= 24


def test_a_teacher_that_repeats_itself_is_given_up():
    with pytest.raises(DataError, match=r"3 prompts .*after 40 tries; 5 were wanted.*raise the temperature"):
        write_prompts(Teacher(), "", count=5, batch=7)


def test_the_start_of_the_users_turn_in_a_template():
    def template(messages):
        return "".join(f"<|{m.role}|>\n{m.text}<|end|>\n" for m in messages)

    assert user_turn_start(template) == "<|user|>\n"
    with pytest.raises(UserError, match="does not write a user's text as it is"):
        user_turn_start(lambda messages: template(messages).upper())


def test_saved_prompts_are_a_prompt_source(tmp_path):
    written = write_prompts(Teacher(), "", count=2)
    save_prompts(tmp_path / "written.jsonl", written)
    (loaded, _) = load_prompts([PromptSource(path=str(tmp_path / "written.jsonl"))], seed=0)
    assert [(s.id, s.messages) for s in loaded] == [(s.id, s.messages) for s in written.samples]
    assert json.loads((tmp_path / "written.jsonl").read_text().splitlines()[0])["task"] == "instruction"


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
