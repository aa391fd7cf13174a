from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from builders import save_tiny_model
from eval.evaluation import score_again, slug
from eval.records import read_records
from eval.suites import Registry
from eval.tasks import gsm8k
from evaluations import QUIET, ToldEngine, png, run_tasks, sums, told_model, write_rows
from faulty_server import Fault, FaultyServer, completion, serving
from shared.errors import ConfigError, DataError, StoreError, UserError
from shared.types import Request


def right(request: Request) -> str:
    number = int(request.sample.messages[0].text.split()[2])
    return f"It is #### {number + 1}"


def even_right(request: Request) -> str:
    number = int(request.sample.messages[0].text.split()[2])
    return f"#### {number + 1 + number % 2}"


def test_scores_are_means_with_standard_errors(tmp_path, monkeypatch):
    told_model(monkeypatch, ToldEngine(even_right))
    results = run_tasks("told", "gsm8k", f"data.path={sums(tmp_path)}", output=tmp_path / "out")
    found = results["gsm8k"]["scores"]["accuracy"]
    assert found == {
        "value": 0.6,
        "stderr": pytest.approx(math.sqrt(0.6 * 0.4 / 4)),
        "n": 5,
        "higher_is_better": True,
    }
    assert json.loads((tmp_path / "out" / "gsm8k" / "scores.json").read_text()) == results["gsm8k"]
    record = read_records(tmp_path / "out" / "gsm8k")[1]
    assert record.prompt.startswith("What is 1 plus 1?")
    assert (record.replies, record.answer, record.values) == (("#### 3",), "3", {"accuracy": 0.0})
    assert record.references == ("Count.\n#### 2",) and record.finish_reasons == ("stop",)


def test_a_local_model_from_words_to_records(tmp_path):
    model = save_tiny_model(tmp_path / "model", positions=1024)
    words = ("gsm8k", f"data.path={sums(tmp_path)}", "max_new_tokens=5", "limit=3")
    first = run_tasks(str(model), *words, output=tmp_path / "out", batch_tokens=400)
    assert first["gsm8k"]["scores"]["accuracy"]["n"] == 3
    assert first["gsm8k"]["reply_tokens"] <= 15 and first["gsm8k"]["seconds"] > 0
    record = read_records(tmp_path / "out" / "gsm8k")[0]
    assert record.reply_tokens is not None and record.prompt_tokens > 100
    again = run_tasks(str(model), *words, output=tmp_path / "out", batch_tokens=400)
    assert again == first
    other = save_tiny_model(tmp_path / "other", positions=1024, seed=1)
    with pytest.raises(StoreError, match="another model"):
        run_tasks(str(other), *words, output=tmp_path / "out", batch_tokens=400)


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    words = ("gsm8k", f"data.path={sums(tmp_path, 6)}")
    dying = ToldEngine(right, dies_at=4)
    told_model(monkeypatch, dying)
    with pytest.raises(KeyboardInterrupt):
        run_tasks("told", *words, output=tmp_path / "out", batch_tokens=1200)  # two requests a batch
    second = ToldEngine(right)
    told_model(monkeypatch, second)
    results = run_tasks("told", *words, output=tmp_path / "out", batch_tokens=1200)
    assert len(dying.asked) == 4 and len(second.asked) == 2
    assert {r.sample.id for r in dying.asked} | {r.sample.id for r in second.asked} == set("012345")
    assert results["gsm8k"]["scores"]["accuracy"]["value"] == 1.0
    third = ToldEngine(right)
    told_model(monkeypatch, third)
    assert run_tasks("told", *words, output=tmp_path / "out", batch_tokens=1200) == results
    assert not third.asked


def test_scoring_again_asks_no_model_and_needs_no_data(tmp_path, monkeypatch):
    told_model(monkeypatch, ToldEngine(even_right))
    path = sums(tmp_path)
    before = run_tasks("told", "gsm8k", f"data.path={path}", output=tmp_path / "out")
    Path(path).unlink()
    told_model(monkeypatch, None)
    # as if scoring had had a mistake: all replies are right now
    monkeypatch.setattr(
        gsm8k,
        "TASK",
        replace(gsm8k.TASK, score=lambda replies, _: [gsm8k.Scored("x", {"accuracy": 1.0})] * 5),
    )
    after = score_again(tmp_path / "out", includes=[], allow_unsafe_execution=False, speaker=QUIET)
    assert before["gsm8k"]["scores"]["accuracy"]["value"] == 0.6
    assert after["gsm8k"]["scores"]["accuracy"]["value"] == 1.0
    assert read_records(tmp_path / "out" / "gsm8k")[1].answer == "x"
    monkeypatch.setattr(gsm8k, "TASK", replace(gsm8k.TASK, version=2))
    with pytest.raises(StoreError, match="version 1 of gsm8k, which is at version 2"):
        score_again(tmp_path / "out", includes=[], allow_unsafe_execution=False, speaker=QUIET)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("temperature=0.5",), "sampling.temperature: 0.0 there, 0.5 now"),
        (("limit=2",), "questions: 5 there, 2 now"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(tmp_path, monkeypatch, words, named):
    told_model(monkeypatch, ToldEngine(right))
    data = f"data.path={sums(tmp_path)}"
    run_tasks("told", "gsm8k", data, output=tmp_path / "out")
    with pytest.raises(StoreError, match=named):
        run_tasks("told", "gsm8k", data, *words, output=tmp_path / "out")


def test_a_start_that_asked_nothing_binds_nothing(tmp_path, monkeypatch):
    data = f"data.path={sums(tmp_path)}"
    with pytest.raises(UserError):
        run_tasks(str(tmp_path / "nowhere"), "gsm8k", data, output=tmp_path / "out")
    told_model(monkeypatch, ToldEngine(right))
    results = run_tasks("told", "gsm8k", data, "limit=2", output=tmp_path / "out")
    assert results["gsm8k"]["replies"] == 2


def test_a_judge_that_is_not_there_is_refused_before_anything_is_asked(tmp_path, monkeypatch):
    asked: list[Request] = []
    told_model(monkeypatch, ToldEngine(lambda request: asked.append(request) or "so"))
    data = f"data.path={write_rows(tmp_path / 'rows.jsonl', [{'instruction': 'Do.', 'output': 'Done.'}])}"
    for judge, message in ((str(tmp_path / "nowhere"), "nowhere"), ("server:none", "a server is written")):
        with pytest.raises(UserError, match=message):
            run_tasks("told", "alpaca_eval", data, f"judge.model={judge}", output=tmp_path / "out")
    assert not asked


def test_a_question_of_two_turns_is_asked_with_the_first_reply_in_it(tmp_path, monkeypatch):
    rows = [
        {"question_id": 7, "turns": ["Count to two.", "And on."], "reference": ["one two", "three four"]},
        {"question_id": 8, "turns": ["Say a."]},
    ]
    engine = ToldEngine(lambda request: "three" if request.round else "one two")
    told_model(monkeypatch, engine)
    path = write_rows(tmp_path / "questions.jsonl", rows)
    results = run_tasks("told", "mt_bench", f"data.path={path}", output=tmp_path / "out")
    assert [message.text for message in engine.asked[-1].sample.messages] == [
        "Count to two.",
        "one two",
        "And on.",
    ]
    assert len(engine.asked) == 3
    # the last reply against the last reference: one of one token common, of two there
    assert results["mt_bench"]["scores"]["rouge_l"]["value"] == pytest.approx(2 / 3)
    assert results["mt_bench"]["scores"]["rouge_l"]["n"] == 1
    two, one = read_records(tmp_path / "out" / "mt_bench")
    assert two.replies == ("one two", "three") and one.replies == ("one two",)
    assert two.prompt == "Count to two.\n\nAssistant:\none two\n\nUser:\nAnd on."


def test_pass_at_k_over_draws(tmp_path, monkeypatch):
    row = {
        "task_id": 1,
        "prompt": "Add one.",
        "code": "def add(n):\n    return n + 1",
        "test_list": ["assert add(1) == 2"],
        "test_imports": [],
    }
    told_model(
        monkeypatch, ToldEngine(lambda r: f"```python\ndef add(n):\n    return n + {1 + (r.draw > 0)}\n```")
    )
    words = ("mbpp", f"data.path={write_rows(tmp_path / 'm.jsonl', [row, row | {'task_id': 2}])}")
    with pytest.raises(ConfigError, match="samples at temperature 0"):
        run_tasks("told", *words, "samples=5", output=tmp_path / "out")
    results = run_tasks(
        "told", *words, "samples=5", "temperature=0.8", output=tmp_path / "out", allow_unsafe_execution=True
    )
    values = {name: found["value"] for name, found in results["mbpp"]["scores"].items()}
    # one of five is right: pass@k is k / 5
    assert values == pytest.approx({"pass@1": 0.2, "pass@2": 0.4, "pass@5": 1.0})
    assert results["mbpp"]["scores"]["pass@1"]["n"] == 2  # questions, not draws


def images(folder: Path) -> str:
    (folder / "images").mkdir(parents=True)
    rows = []
    for image in range(3):
        (folder / "images" / f"{image}.png").write_bytes(png(image))
        for question in range(4):
            rows.append(
                {
                    "id": f"{image}-{question}",
                    "image": f"images/{image}.png",
                    "question": "Is it?",
                    "answer": "yes",
                }
            )
    return str(write_rows(folder / "pope.jsonl", rows))


def test_standard_errors_are_clustered_by_image(tmp_path, monkeypatch):
    # all questions on one image are wrong: three clusters, not twelve independent answers
    told_model(monkeypatch, ToldEngine(lambda r: "no" if r.sample.id.startswith("2") else "yes"))
    results = run_tasks("told", "pope", f"data.path={images(tmp_path / 'data')}", output=tmp_path / "out")
    found = results["pope"]["scores"]["accuracy"]
    assert found["value"] == pytest.approx(2 / 3)
    assert found["stderr"] == pytest.approx(1 / 3)  # of the image means 1, 1, 0: sd 0.577 / sqrt(3)
    assert results["pope"]["scores"]["recall"]["stderr"] == pytest.approx(1 / 3)
    assert len({record.cluster for record in read_records(tmp_path / "out" / "pope")}) == 3


def test_images_count_by_content_not_by_place(tmp_path, monkeypatch):
    told_model(monkeypatch, ToldEngine(lambda _: "yes"))
    run_tasks("told", "pope", f"data.path={images(tmp_path / 'here')}", output=tmp_path / "out")
    elsewhere = images(tmp_path / "there")
    second = ToldEngine(lambda _: "yes")
    told_model(monkeypatch, second)
    run_tasks("told", "pope", f"data.path={elsewhere}", output=tmp_path / "out")
    assert not second.asked
    (tmp_path / "there" / "images" / "1.png").write_bytes(png(99))
    with pytest.raises(StoreError, match="sample_set"):
        run_tasks("told", "pope", f"data.path={elsewhere}", output=tmp_path / "out")


def test_the_control_shows_no_image(tmp_path, monkeypatch):
    engine = ToldEngine(lambda _: "yes")
    told_model(monkeypatch, engine)
    path = images(tmp_path / "data")
    for image in (tmp_path / "data" / "images").iterdir():
        image.unlink()  # nobody looks at them
    results = run_tasks("told", "pope", f"data.path={path}", "images=removed", output=tmp_path / "out")
    assert not any(request.sample.images for request in engine.asked)
    assert results["pope"]["images"] == "removed"
    assert len({record.cluster for record in read_records(tmp_path / "out" / "pope")}) == 3


def test_a_text_model_is_refused_images_before_anything_is_read(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"is a text model.*images=removed"):
        run_tasks(str(model), "pope", "data.path=/nowhere.jsonl", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"model\.accepts_images=true"):
        run_tasks("server:http://localhost:1/v1#m", "pope", "data.path=/nowhere", output=tmp_path / "out")


def test_prompts_that_do_not_fit_fail_or_are_dropped(tmp_path):
    model = save_tiny_model(tmp_path / "model", positions=200)
    rows = [{"question": "What? " * n, "answer": "#### 1"} for n in (1, 30)]
    data = f"data.path={write_rows(tmp_path / 'rows.jsonl', rows)}"
    words = ("gsm8k", data, "max_new_tokens=4")
    with pytest.raises(DataError, match="over_length=drop"):
        run_tasks(str(model), *words, output=tmp_path / "out")
    results = run_tasks(str(model), *words, "over_length=drop", output=tmp_path / "dropped")
    assert results["gsm8k"]["replies"] == 1 and results["gsm8k"]["questions"] == 2


def test_a_judge_compares_with_the_reference(tmp_path, monkeypatch):
    def say(request: Request) -> str:
        if request.role != "judge":
            return "good" if request.sample.id == "0" else "bad"
        answers = request.sample.messages[0].text
        first = answers.index("[answer A")
        better = "A" if "good" in answers[first : answers.index("[answer B")] else "B"
        return f"Because.\nVerdict: {better}"

    told_model(monkeypatch, ToldEngine(say))
    rows = [{"instruction": f"Do {i}.", "output": "a reference"} for i in range(2)]
    data = f"data.path={write_rows(tmp_path / 'rows.jsonl', rows)}"
    results = run_tasks("told", "alpaca_eval", data, "judge.model=judge", output=tmp_path / "out")
    # "good" beats its reference from both sides; of two that are not good, this judge takes the second
    assert results["alpaca_eval"]["scores"]["win_rate"]["value"] == pytest.approx((1 + 0.5) / 2)
    assert results["alpaca_eval"]["judge"]["n"] == 2
    assert results["alpaca_eval"]["judge"]["places"]["second_wins"] == 1
    assert results["alpaca_eval"]["judge"]["controls"].keys() == {"constant", "reference"}
    assert [record.values["win_rate"] for record in read_records(tmp_path / "out" / "alpaca_eval")] == [
        1.0,
        0.5,
    ]


def test_a_judge_without_references_must_grade(tmp_path, monkeypatch):
    told_model(monkeypatch, ToldEngine(lambda r: "Rating: 8" if r.role == "judge" else "an answer"))
    data = f"data.path={write_rows(tmp_path / 'rows.jsonl', [{'turns': ['Why?']}, {'turns': ['How?']}])}"
    with pytest.raises(UserError, match=r"judge\.mode=single"):
        run_tasks("told", "vicuna", data, "judge.model=judge", output=tmp_path / "out")
    words = (data, "judge.model=judge", "judge.mode=single")
    results = run_tasks("told", "vicuna", *words, output=tmp_path / "out")
    assert results["vicuna"]["scores"]["rating"]["value"] == 8.0
    assert "rouge_l" not in results["vicuna"]["scores"]


def two_turns(folder: Path) -> str:
    rows = [
        {"question_id": 7, "turns": ["Count to two.", "And on."], "reference": ["one two", "three four"]},
        {"question_id": 8, "turns": ["Say a.", "Say b."], "reference": ["a", "b"]},
    ]
    return f"data.path={write_rows(folder / 'two.jsonl', rows)}"


def test_a_judge_sees_every_turn_with_the_models_own_replies_before_it(tmp_path, monkeypatch):
    def say(request: Request) -> str:
        if request.role != "judge":
            return f"reply {request.round + 1} to {request.sample.id}"
        text = request.sample.messages[0].text
        return f"Rating: {2 if 'reply 2' in text else 9 if 'reply 1 to 8' in text else 6}"

    engine = ToldEngine(say)
    told_model(monkeypatch, engine)
    words = (two_turns(tmp_path), "judge.model=judge", "judge.mode=single")
    results = run_tasks("told", "mt_bench", *words, output=tmp_path / "out")["mt_bench"]
    # 6 and 2 for the one, 9 and 2 for the other
    assert results["scores"]["rating"]["value"] == pytest.approx((4 + 5.5) / 2)
    assert results["scores"]["rating"]["n"] == 2
    assert results["scores"]["rating_turn_1"]["value"] == 7.5
    assert results["scores"]["rating_turn_2"]["value"] == 2.0
    assert results["judge"]["n"] == 4
    assert results["judge"]["stderr"] == pytest.approx(0.75)  # of two questions, not of four turns
    asked_of_judge = [r for r in engine.asked if r.role == "judge"][:4]  # the controls come after
    prompts = {r.sample.id: r.sample.messages[0].text for r in asked_of_judge}
    second = prompts["7#0/turn-2"]
    asked, answer = second.index("[request"), second.index("[answer")
    assert "Assistant:\nreply 1 to 7\n\nUser:\nAnd on." in second[asked:answer]
    assert "three four" in second[asked:answer] and "one two" not in second  # the hint is of this turn
    assert "reply 2 to 7" in second[answer:] and "reply 2" not in prompts["7#0/turn-1"]
    assert "one two" in prompts["7#0/turn-1"] and "And on." not in prompts["7#0/turn-1"]


def test_turns_are_compared_with_their_own_references(tmp_path, monkeypatch):
    def say(request: Request) -> str:
        if request.role != "judge":
            return "mine"
        text = request.sample.messages[0].text
        first = text[text.index("[answer A") : text.index("[answer B")]
        mine_first = "mine" in first
        wins = "three four" in text or "\nb\n" in text  # the second turn is won
        return f"Verdict: {'A' if mine_first == wins else 'B'}"

    told_model(monkeypatch, ToldEngine(say))
    results = run_tasks("told", "mt_bench", two_turns(tmp_path), "judge.model=j", output=tmp_path / "out")
    scores = {name: one["value"] for name, one in results["mt_bench"]["scores"].items()}
    assert (scores["win_rate_turn_1"], scores["win_rate_turn_2"], scores["win_rate"]) == (0.0, 1.0, 0.5)


OWN = """
from eval.scores import Metric
from eval.task import Question, Reply, Row, Scored, Task, each
from shared.types import Sampling


def read(row: Row) -> Question:
    word = row.text("word")
    return Question(id=row.id("id"), prompt=f"Shout: {word}", references=(word.upper(),))


def score(reply: Reply) -> Scored:
    return Scored(reply.text, {"shouted": float(reply.text == reply.question.references[0])})


TASK = Task(
    name="shout",
    version=1,
    family="instruction",
    summary="words in capitals",
    data=None,
    columns="word",
    read=read,
    metrics={"shouted": Metric("Shouted", "share", True)},
    score=each(score),
    sampling=Sampling(max_new_tokens=8, temperature=0.0),
)
"""


def test_a_task_of_the_users_own(tmp_path, monkeypatch):
    own = tmp_path / "my_task.py"
    own.write_text(OWN)
    told_model(monkeypatch, ToldEngine(lambda r: "HEY" if "hey" in r.sample.messages[0].text else "no"))
    data = f"data.path={write_rows(tmp_path / 'words.jsonl', [{'word': 'hey'}, {'word': 'you'}])}"
    results = run_tasks("told", "shout", data, output=tmp_path / "out", includes=[own])
    assert results["shout"]["scores"]["shouted"]["value"] == 0.5
    again = score_again(tmp_path / "out", includes=[own], allow_unsafe_execution=False, speaker=QUIET)
    assert again == results
    with pytest.raises(UserError, match="--include FILE"):
        score_again(tmp_path / "out", includes=[], allow_unsafe_execution=False, speaker=QUIET)
    own.write_text(OWN.replace('"word"', '"wrd"'))
    with pytest.raises(UserError, match=r"row 0: (needs a column wrd|reading it raised)"):
        run_tasks("told", "shout", data, output=tmp_path / "other", includes=[own])
    own.write_text("TASK = 3")
    with pytest.raises(UserError, match="needs TASK = Task"):
        Registry([own])


def test_folders_of_models():
    assert slug("pkg://llm/Some-1.0.gguf") == "llm-Some-1.0.gguf"
    assert slug("server:http://localhost:8000/v1#m") == "server-http-localhost-8000-v1-m"


def test_scoring_that_was_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    told_model(monkeypatch, ToldEngine(right))
    monkeypatch.setattr("eval.scoring.PART", 2)
    scored: list[str] = []

    def score(replies, tools):
        scored.extend(reply.question.id for reply in replies)
        if dies and len(scored) > 4:
            raise KeyboardInterrupt
        return gsm8k.TASK.score(replies, tools)

    task = replace(gsm8k.TASK, name="dying", score=score)
    monkeypatch.setattr("eval.suites.Registry.task", lambda *_: task)
    words = ("dying", f"data.path={sums(tmp_path, 6)}")
    dies = True
    with pytest.raises(KeyboardInterrupt):
        run_tasks("told", *words, output=tmp_path / "out")
    dies = False
    results = run_tasks("told", *words, output=tmp_path / "out")
    assert scored == list("012345") + list("45")
    assert results["dying"]["scores"]["accuracy"] == {
        "value": 1.0,
        "stderr": 0.0,
        "n": 6,
        "higher_is_better": True,
    }


def test_one_process_in_a_folder(tmp_path, monkeypatch):
    words = ("gsm8k", f"data.path={sums(tmp_path)}")

    def meanwhile(request: Request) -> str:
        with pytest.raises(StoreError, match="another process evaluates into"):
            score_again(tmp_path / "out", includes=[], allow_unsafe_execution=False, speaker=QUIET)
        return right(request)

    told_model(monkeypatch, ToldEngine(meanwhile))
    run_tasks("told", *words, output=tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        run_tasks("told", *words, output=tmp_path / "file" / "out")


def test_a_model_behind_a_server(tmp_path):
    server = FaultyServer()
    server.faults = [Fault(status=503)]
    server.answer = lambda body: completion(f"#### {int(body['messages'][-1]['content'].split()[2]) + 1}")
    words = ("gsm8k", f"data.path={sums(tmp_path)}", "model.system_prompt=Be brief.", "model.backoff_s=0.01")
    with serving(server):
        results = run_tasks(f"server:{server.url}#org/name", *words, output=tmp_path / "out")
    assert results["gsm8k"]["scores"]["accuracy"]["value"] == 1.0
    assert results["gsm8k"]["reply_tokens"] == 15 and results["gsm8k"]["prompt_tokens"] == 35
    assert len(server.requests) == 6 and server.requests[0]["temperature"] == 0.0
    assert server.requests[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    with pytest.raises(ConfigError, match=r"model\.lora.*Known for this model: api_key_env"):
        run_tasks("server:http://localhost:1/v1#m", *words, "model.lora=x", output=tmp_path / "b")
