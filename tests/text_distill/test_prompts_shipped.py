"""Are the shipped prompts enough, balanced and never twice, and is nothing held out that is trained on?"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from shared.config_data import PromptSource
from shared.data.prompts import load_prompts
from shared.models.references import resolve_path
from shared.types import Message, TextPart

SPLITS = {"train": 288, "heldout": 64}  # at least so many rows
TASK_OF_CATEGORY = {
    "explain": "instruction",
    "summarise": "instruction",
    "rewrite": "instruction",
    "list": "instruction",
    "classify": "instruction",
    "code": "code",
    "math": "math",
}


def reference(split: str) -> str:
    return f"pkg://text_distill/prompts/everyday-{split}.jsonl"


def rows(split: str) -> list[dict[str, Any]]:
    path = resolve_path(reference(split))
    assert isinstance(path, Path)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def words(text: str) -> list[str]:
    """Lower-cased words, so that case, spacing and punctuation hide no repetition."""
    return re.findall(r"\w+", text.lower())


def runs(texts: list[str], length: int) -> set[tuple[str, ...]]:
    """Every run of `length` words in the texts."""
    return {
        tuple(row[start : start + length])
        for row in map(words, texts)
        for start in range(len(row) - length + 1)
    }


@pytest.mark.parametrize("split", SPLITS)
def test_every_row_is_complete_and_of_a_known_task(split: str) -> None:
    for row in rows(split):
        assert row.keys() == {"id", "task", "category", "prompt"}, row
        assert row["task"] == TASK_OF_CATEGORY[row["category"]], row
        assert row["prompt"] == row["prompt"].strip(), row["id"]
        assert 5 <= len(words(row["prompt"])) <= 100, row["id"]


def test_both_files_load_together_as_the_user_turns_they_hold() -> None:
    samples = load_prompts([PromptSource(path=reference(split)) for split in SPLITS], seed=0).samples
    expected = [row for split in SPLITS for row in rows(split)]
    for sample, row in zip(samples, expected, strict=True):
        assert (sample.id, sample.task) == (row["id"], row["task"])
        assert sample.messages == (Message("user", (TextPart(row["prompt"]),)),)


@pytest.mark.parametrize(("split", "least"), SPLITS.items())
def test_there_are_enough_prompts_and_any_prefix_is_balanced(split: str, least: int) -> None:
    categories = [row["category"] for row in rows(split)]
    assert len(categories) >= least
    for taken in (14, 35, len(categories)):
        counts = Counter(categories[:taken])
        assert counts.keys() == TASK_OF_CATEGORY.keys()
        assert max(counts.values()) - min(counts.values()) <= 1, counts


def test_no_id_and_no_prompt_appears_twice_in_either_file() -> None:
    both = [row for split in SPLITS for row in rows(split)]
    ids = Counter(row["id"] for row in both)
    texts = Counter(" ".join(words(row["prompt"])) for row in both)
    assert [key for key, count in ids.items() if count > 1] == []
    assert [text for text, count in texts.items() if count > 1] == []


def test_heldout_prompts_share_no_long_run_of_words_with_training() -> None:
    prompts = {split: [row["prompt"] for row in rows(split)] for split in SPLITS}
    assert runs(prompts["train"], 8) & runs(prompts["heldout"], 8) == set()


def test_few_prompts_open_alike() -> None:
    openings = Counter(tuple(words(row["prompt"])[:5]) for row in rows("train"))
    opening, count = openings.most_common(1)[0]
    assert count <= 12, (opening, count)
