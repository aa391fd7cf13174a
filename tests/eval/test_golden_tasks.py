"""Real data sets: every row is read, and what is known to be right scores as right."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from eval.datasets import load_questions, read_rows
from eval.metrics.pope import compute as pope
from eval.records import Record, scores
from eval.sandbox.isolation import find_isolation
from eval.sandbox.world import SandboxError
from eval.scoring import Bench, sandbox_maker
from eval.settings import DataSettings
from eval.suites import Registry
from eval.task import Question, Reply, Scored
from evaluations import png

FILES = {
    "alpaca_eval": ("distillm2_eval/alpaca_eval.json", 805),
    "evol_instruct": ("distillm2_eval/evol_inst_eval.json", 218),
    "ultrafeedback": ("distillm2_eval/ultrafeedback_eval.json", 2000),
    "mt_bench": ("mtbench_vicuna/mt_bench/question.jsonl", 80),
    "vicuna": ("mtbench_vicuna/vicuna_bench/question.jsonl", 80),
    "self_instruct": ("self_instruct/human_eval/user_oriented_instructions.jsonl", 252),
    "humaneval": ("humaneval/HumanEval.jsonl.gz", 164),
    "mbpp": ("mbpp/sanitized-mbpp.json", 427),
    "mbpp_full": ("mbpp/mbpp.jsonl", 974),
    "gsm8k": ("gsm8k/test.jsonl", 1319),
    "pope": ("pope_coco_subset/random.jsonl", 636),
    "daquar": ("daquar/test.jsonl", 5673),
    "caption": ("llava_bench_coco_subset/questions.jsonl", 24),
}


def questions(name: str, real_data: Path, *, limit: int | None = None, **data: str) -> list[Question]:
    settings = DataSettings(path=str(real_data / FILES[name][0]), **data)
    return load_questions(Registry().task(name), settings, limit=limit)


def replied(name: str, asked: list[Question], replies: list[str]) -> list[Scored]:
    bench = Bench(sandbox_maker(allow_unsafe_execution=False), None)
    made = [Reply(q, (text,), ("stop",)) for q, text in zip(asked, replies, strict=True)]
    return list(Registry().task(name).score(made, bench))


def mean(scored: list[Scored], column: str) -> float:
    return sum(s.values[column] for s in scored) / len(scored)


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_read(name, real_data):
    found = questions(name, real_data)
    assert len(found) == FILES[name][1]
    assert len({question.id for question in found}) == len(found)
    assert all(question.prompt.strip() for question in found)
    assert all(Path(part.image).is_file() for question in found for part in question.images)


@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_pope_splits(split, real_data):
    path = str(real_data / "pope_coco_subset" / f"{split}.jsonl")
    found = load_questions(Registry().task("pope"), DataSettings(path=path))
    assert len(found) == 636 and len({q.images for q in found}) == 106
    scored = replied("pope", found, [q.references[0] for q in found])
    assert mean(scored, "accuracy") == 1.0 and Counter(s.answer for s in scored) == {"yes": 318, "no": 318}


@pytest.mark.parametrize("name", ["alpaca_eval", "evol_instruct", "ultrafeedback", "self_instruct"])
def test_the_reference_is_the_best_instruction_reply(name, real_data):
    found = [question for question in questions(name, real_data) if question.references]
    assert len(found) == FILES[name][1]
    scored = replied(name, found, [question.references[0] for question in found])
    without_tokens = sum(s.values["rouge_l"] == 0 for s in scored)  # answers in other scripts have none
    assert mean(scored, "rouge_l") == pytest.approx(1 - without_tokens / len(found))
    assert without_tokens <= 0.02 * len(found)
    others = replied(name, found, [question.references[0] for question in [*found[1:], found[0]]])
    assert mean(others, "rouge_l") < 0.3


def test_mt_bench_has_two_turns_and_some_references(real_data):
    found = questions("mt_bench", real_data)
    assert all(question.turns == 2 for question in found)
    answers = str(real_data / "mtbench_vicuna" / "mt_bench" / "reference_answer" / "gpt-4.jsonl")
    joined = questions("mt_bench", real_data, annotations=answers)
    assert sum(bool(question.references) for question in found) == 32
    assert sum(bool(question.references) for question in joined) == 36
    by_id = {question.id: question for question in joined}
    assert by_id["101"].references[0].startswith("If you have just overtaken the last person")
    chat = joined[0].sample("instruction", ["first reply"])
    assert [message.role for message in chat.messages] == ["user", "assistant", "user"]
    assert chat.messages[2].text.startswith("Rewrite your previous response")


def test_gsm8k_solutions_are_right_and_their_neighbours_wrong(real_data):
    found = questions("gsm8k", real_data)
    solutions = [question.references[0] for question in found]
    scored = replied("gsm8k", found, solutions)
    assert mean(scored, "accuracy") == 1.0
    assert scored[0].answer == "18"
    assert mean(replied("gsm8k", found, [*solutions[1:], solutions[0]]), "accuracy") < 0.05


@pytest.mark.parametrize("name", ["humaneval", "mbpp", "mbpp_full"])
def test_reference_programs_pass_as_chat_replies(name, real_data):
    try:
        find_isolation()
    except SandboxError as error:
        pytest.skip(str(error))
    found = questions(name, real_data, limit=8)
    replies = [f"Here it is:\n\n```python\n{question.references[0]}\n```\nDone." for question in found]
    broken = ["```python\ndef nothing():\n    pass\n```"] * 2
    scored = replied(name, [*found, *found[:2]], [*replies, *broken])
    assert [s.values["passed"] for s in scored] == [1.0] * 8 + [0.0] * 2
    assert "nothing" in scored[-1].answer


def test_vqav2_majority_answers_score_what_the_annotators_give_each_other(real_data):
    folder = real_data / "vqav2_10ann"
    settings = DataSettings(
        path=str(folder / "vqa_questions_test.gzip"), annotations=str(folder / "vqa_annotatons_test.gzip")
    )
    found = load_questions(Registry().task("vqav2"), settings, find_images=False)
    assert len(found) == 2962 and all(len(question.references) == 10 for question in found)
    assert found[0].images[0].image == "COCO_val2014_000000540769.jpg"
    majority = [Counter(q.references).most_common(1)[0][0] for q in found]
    assert mean(replied("vqav2", found, [f"{text.capitalize()}." for text in majority]), "vqa_accuracy") > 0.9
    assert mean(replied("vqav2", found, ["unanswerable!"] * len(found)), "vqa_accuracy") < 0.02


def test_daquar_answers_are_sets(real_data):
    found = questions("daquar", real_data)
    several = next(q for q in found if len(q.references) > 1)
    turned = ", ".join(reversed(several.references)).capitalize() + "."
    first = several.references[0]
    whole, part = replied("daquar", [several, several], [turned, first])
    assert whole.values == {"accuracy": 1.0, "overlap": 1.0}
    assert part.values["accuracy"] == 0.0 and 0 < part.values["overlap"] < 1
    assert mean(replied("daquar", found, [", ".join(q.references) for q in found]), "accuracy") == 1.0


def test_captions_of_people_are_captions(real_data):
    found = questions("caption", real_data)
    assert mean(replied("caption", found, [q.references[-1] for q in found]), "rouge_l") == 1.0


def test_pope_figures_are_those_of_the_metric(real_data):
    found = questions("pope", real_data)[:60]
    replies = ["Yes.", "no", "No, there is not.", "I cannot say", "yes"] * 12
    task = Registry().task("pope")
    records = [
        Record(
            q.id,
            0,
            "",
            (),
            q.references,
            (text,),
            ("stop",),
            s.answer,
            s.values,
            "",
            q.images[0].image,
            1,
            1,
            1.0,
        )
        for q, text, s in zip(found, replies, replied("pope", found, replies), strict=True)
    ]
    ours = scores(task, records)
    reference = pope(replies, [list(q.references) for q in found])
    for key in ("accuracy", "precision", "recall", "f1", "yes_ratio", "unparseable"):
        assert ours[key]["value"] == pytest.approx(reference[key]), key
    assert all(score["stderr"] > 0 for score in ours.values())
    assert ours["yes_ratio"]["higher_is_better"] is None


def test_the_package_of_easy_vqa_is_read_as_it_is(tmp_path):
    (tmp_path / "questions.json").write_text(
        '[["what color is the shape?", "red", 3], ["is it a circle?", "no", 3]]'
    )
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "3.png").write_bytes(png(0))
    found = load_questions(Registry().task("easy_vqa"), DataSettings(path=str(tmp_path / "questions.json")))
    assert [q.references for q in found] == [("red",), ("no",)]
    assert {q.images[0].image for q in found} == {str(tmp_path / "images" / "3.png")}
    assert [s.values["accuracy"] for s in replied("easy_vqa", found, ["Red.", "yes"])] == [1.0, 0.0]


def test_read_rows_of_the_csv_of_daquar(real_data):
    rows = list(read_rows(real_data / "daquar" / "data_eval.csv"))
    assert rows[0] == {
        "question": "what is the colour of the bag on the chair",
        "answer": "pink",
        "image_id": "image399",
    }
