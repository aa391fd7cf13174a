"""What is also in the evaluation leaves the training, by name; what only looks alike stays."""

import json

import pytest

from shared.config_data import PromptsConfig
from shared.data.decontamination import decontaminate, evaluation_texts, prompt_texts
from shared.data.run_prompts import load_run_prompts
from shared.data.words import ngrams, words
from shared.errors import DataError
from shared.objectives.objective import build_objective
from shared.types import ImagePart, Message, Sample, TextPart

LONG = "Natalia sold clips to 48 of her friends in April and then half as many in May how many"


def sample(text, name="s", reference=None, image=None):
    parts = (TextPart(text),) if image is None else (ImagePart(image), TextPart(text))
    return Sample(name, (Message("user", parts),), reference=reference, source=f"train.jsonl:{name}")


def test_words_and_ngrams():
    assert words("It's 3.5 O'CLOCK — naïve_x, 漢字かな!") == [
        *("it", "s", "3", "5", "o", "clock", "naïve_x"),
        *("漢", "字", "か", "な"),
    ]
    assert ngrams(["a", "b", "c"], 2) == [("a", "b"), ("b", "c")]
    assert ngrams(["a"], 2) == [("a",)] and ngrams([], 2) == []


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        (LONG, True),
        (f"Please answer: {LONG.upper()}?!", True),  # case and punctuation do not hide it
        (" ".join(LONG.split()[:12]) + " something else entirely", False),  # 12 words in a row
        (" ".join(LONG.split()[:13]) + " something else entirely", True),
        ("What is the capital of France?", True),  # short, word for word
        ("What is the capital of France, please?", False),
        ("Thank you.", False),  # too short to mean anything
    ],
)
def test_thirteen_words_in_a_row_or_a_short_text_word_for_word(tmp_path, text, gone):
    path = tmp_path / "eval.jsonl"
    rows = [{"q": "Thank you."}, {"nested": {"list": [LONG]}}, {"q": "what is the capital of france"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = decontaminate([sample(text, "x"), sample("bystander", "y")], evaluation_texts([str(path)]))
    assert [s.id for s in result.kept] == (["y"] if gone else ["x", "y"])
    if gone:
        row = 3 if "France" in text else 2
        assert result.removed[0].row == f"eval.jsonl:{row}" and result.removed[0].words in " ".join(
            words(text)
        )
        assert result.notes()[0] == "decontamination: 1 of 2 prompts left out: 1 are in eval.jsonl"
        assert "x (eval.jsonl" in result.notes()[1]


def test_references_count_and_images_do_not(tmp_path):
    heldout = [sample(LONG)]
    given = [
        sample("fine", "a", reference=LONG),
        sample(LONG, "b", image="x.png"),
        sample("other words that nobody else uses", "c"),
    ]
    result = decontaminate(given, prompt_texts(heldout, "prompts.heldout"), n=5)
    assert [s.id for s in result.kept] == ["b", "c"]
    assert "1 prompts with images were not compared" in result.notes()[-1]
    pictures = prompt_texts([sample(LONG, image="y.png")], "prompts.heldout")
    assert decontaminate(given, pictures).removed == []


def test_nothing_left_and_files_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match=r"1 of 1 prompts left out(.|\n)*No prompt is left"):
        decontaminate([sample(LONG)], prompt_texts([sample(LONG)], "h"))
    with pytest.raises(DataError, match="evaluation file 'set' is not a file"):
        list(evaluation_texts(["set"]))
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:1: not JSON"):
        list(evaluation_texts([str(tmp_path / "bad.jsonl")]))


def config(tmp_path, **decontamination):
    for name, texts in {"train": [LONG, "a b c d e"], "heldout": ["A, b, c, d; e"], "eval": [LONG]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([{"prompt": text} for text in texts]))
    return PromptsConfig(
        train=[{"path": str(tmp_path / "train.json")}],
        heldout=[{"path": str(tmp_path / "heldout.json")}],
        decontamination=decontamination or None,
    )


def test_a_run_leaves_out_and_says_what_its_configuration_asks_for(tmp_path):
    def left(**settings):
        loaded = load_run_prompts(config(tmp_path, **settings), build_objective("kd", {}), seed=0)
        return [s.id for s in loaded.train], loaded.notes

    assert left() == (["train.json:1", "train.json:2"], [])
    ids, notes = left(against=[str(tmp_path / "eval.json")])
    assert ids == ["train.json:2"] and "1 are in eval.json" in notes[0]
    ids, notes = left(heldout=True)
    assert ids == ["train.json:1"] and "1 are in prompts.heldout" in notes[0]
    for settings, said in (({"ngram": 8}, "give evaluation files as `against`"), ({"ngram": 3}, "ngram")):
        with pytest.raises(ValueError, match=said):
            config(tmp_path, **settings)


def test_real_problems_of_gsm8k_are_found_in_a_training_set_that_holds_them(real_data):
    test = real_data / "gsm8k" / "test.jsonl"
    if not test.exists():
        test = next((real_data / "gsm8k").glob("*test*"))
    rows = [json.loads(line) for line in test.read_text().splitlines()[:50]]
    given = [sample(f"Solve. {row['question']}", str(i)) for i, row in enumerate(rows)]
    given += [sample(f"Describe a walk through town number {i} in autumn.", f"w{i}") for i in range(20)]
    result = decontaminate(given, evaluation_texts([str(test)]))
    assert len(result.removed) == 50 and all(s.id.startswith("w") for s in result.kept)
    assert {item.file for item in result.removed} == {test.name}
