"""Our side of a bridge, with a stand-in for the harness: it asks as lm_eval does, and answers in its form."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest

from builders import save_tiny_model
from eval.bridges import HARNESSES, is_bridged
from eval.bridges.asking import _cut
from eval.records import read_records
from eval.run_tasks import check_tasks
from eval.suites import Registry
from evaluations import ToldEngine, run_tasks, told_model
from shared.config import EvaluationConfig
from shared.errors import DataError, StoreError, UserError

QUESTIONS = ("one", "two", "three")


class Task(SimpleNamespace):
    """A task of the stand-in."""

    OUTPUT_TYPE = "generate_until"

    def get_config(self, key: str) -> None:
        return None


def evaluate(*, model, tasks, task_manager, num_fewshot, limit, apply_chat_template, log_samples):
    """Each question once; the reply is right where it repeats the question."""
    requests = []
    for number, word in enumerate(QUESTIONS[:limit]):
        chat = model.apply_chat_template([{"role": "user", "content": word * 10}])
        settings = {"until": ["!", "\n"], "max_gen_toks": 4, **task_manager.generation}
        requests.append(SimpleNamespace(task_name=tasks[0], doc_id=number, idx=0, args=(chat, settings)))
    replies = model.generate_until(requests)
    samples = [
        {
            "doc_id": number,
            "filter": "none",
            "target": word,
            "filtered_resps": [reply.strip()],
            "right": float(reply.strip() == word),
            "length": (len(reply), 1),
        }
        for number, (word, reply) in enumerate(zip(QUESTIONS, replies, strict=False))
    ]
    mean = sum(sample["right"] for sample in samples) / len(samples)
    found = {
        "alias": tasks[0],
        "right,none": mean,
        "right_stderr,none": math.nan,
        "length,none": 7.5,
        "length_stderr,none": "N/A",
    }
    return {
        "results": {tasks[0]: found},
        "samples": {tasks[0]: samples},
        "versions": {tasks[0]: 1.0},
        "higher_is_better": {tasks[0]: {"right": True, "length": False}},
    }


@pytest.fixture
def harness(monkeypatch) -> SimpleNamespace:
    """lm_eval as if it were installed; `generation` is what its tasks say of sampling."""
    manager = SimpleNamespace(all_tasks=["words"], generation={})
    manager.load = lambda names: {"tasks": {name: Task() for name in names}}
    modules = {
        name: ModuleType(name) for name in ("lm_eval", "lm_eval.tasks", "lm_eval.api", "lm_eval.api.model")
    }
    modules["lm_eval"].simple_evaluate = evaluate
    modules["lm_eval.tasks"].TaskManager = lambda **_: manager
    modules["lm_eval.api.model"].LM = object
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "eval.bridges.lm_model", raising=False)
    monkeypatch.delitem(sys.modules, "eval.bridges.lm_harness", raising=False)
    monkeypatch.setattr("eval.bridges.version", lambda _: "9.9")
    yield manager
    sys.modules.pop("eval.bridges.lm_model", None)
    sys.modules.pop("eval.bridges.lm_harness", None)


def test_names_of_other_harnesses():
    assert is_bridged("lm_eval:mmlu") and is_bridged("lmms_eval:mme")
    assert not is_bridged("gsm8k") and not is_bridged("suite:math") and not is_bridged("lm_eval:")


@pytest.mark.parametrize("harness", HARNESSES)
def test_a_harness_that_is_not_installed_is_named_with_the_command_that_installs_it(harness, monkeypatch):
    monkeypatch.setitem(HARNESSES, harness, HARNESSES[harness]._replace(package=f"no-such-{harness}"))
    with pytest.raises(UserError, match=f"not installed: pip install no-such-{harness}"):
        Registry().task(f"{harness}:some")
    with pytest.raises(UserError, match="pip install"):
        check_tasks(EvaluationConfig(tasks=[f"{harness}:some"]), accepts_images=True)


def test_replies_scores_and_records(harness, tmp_path, monkeypatch):
    engine = ToldEngine(
        lambda r: {"one": "one! And", "two": "two\nmore"}.get(r.sample.messages[0].text[:3], "no")
    )
    told_model(monkeypatch, engine)
    results = run_tasks("told", "lm_eval:words", output=tmp_path / "out")["lm_eval:words"]
    assert results["version"] == "lm-eval 9.9" and results["harness_versions"] == {"words": 1.0}
    right = results["scores"]["right"]
    assert right["value"] == pytest.approx(2 / 3) and right["stderr"] == pytest.approx(1 / 3)
    # no mean of numbers: that harness's own figure, of which nobody knows the error
    assert results["scores"]["length"] == {"value": 7.5, "stderr": None, "n": 3, "higher_is_better": False}
    records = read_records(tmp_path / "out" / "lm_eval:words")
    assert [record.replies for record in records] == [("one",), ("two",), ("no",)]
    assert records[0].prompt == "one" * 10 and records[2].references == ("three",)
    task = Registry().task_in(tmp_path / "out" / "lm_eval:words")
    assert list(task.metrics) == ["right"] and list(task.quotients) == ["length"]


def test_a_folder_is_read_where_the_harness_is_gone(harness, tmp_path, monkeypatch):
    told_model(monkeypatch, ToldEngine(lambda _: "one"))
    run_tasks("told", "lm_eval:words", output=tmp_path / "out")
    monkeypatch.undo()
    assert Registry().task_in(tmp_path / "out" / "lm_eval:words").version == "lm-eval 9.9"


def test_killed_it_goes_on_where_it_was(harness, tmp_path, monkeypatch):
    dying = ToldEngine(lambda _: "one", dies_at=2)
    told_model(monkeypatch, dying)
    with pytest.raises(KeyboardInterrupt):
        run_tasks("told", "lm_eval:words", output=tmp_path / "out", batch_tokens=1)
    second = ToldEngine(lambda _: "one")
    told_model(monkeypatch, second)
    run_tasks("told", "lm_eval:words", output=tmp_path / "out", batch_tokens=1)
    assert len(second.asked) == 1
    with pytest.raises(StoreError, match="limit: None there, 2 now"):
        run_tasks("told", "lm_eval:words", "limit=2", output=tmp_path / "out", batch_tokens=1)


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        ({}, (), (4, 0.0, 1.0, 0)),
        ({"do_sample": True}, (), (4, 1.0, 1.0, 0)),
        ({"do_sample": False, "temperature": 0.7}, (), (4, 0.0, 1.0, 0)),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 5}, (), (4, 0.7, 0.9, 5)),
        ({"temperature": 0.7}, ("temperature=0", "max_new_tokens=9"), (9, 0.0, 1.0, 0)),
    ],
)
def test_sampling_is_theirs_unless_set_here(harness, tmp_path, monkeypatch, theirs, ours, expected):
    harness.generation = theirs
    seen = []
    engine = ToldEngine(lambda _: "one")
    told_model(monkeypatch, engine)
    original = engine.generate
    engine.generate = lambda requests, sampling: (seen.append(sampling), original(requests, sampling))[1]
    run_tasks("told", "lm_eval:words", *ours, output=tmp_path / "out")
    (sampling,) = set(seen)
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == expected


def test_prompts_that_do_not_fit_are_refused(harness, tmp_path):
    model = save_tiny_model(tmp_path / "model", positions=40)
    with pytest.raises(
        DataError, match=r"words/0 has a prompt of \d+ tokens; a context of 40 with 4 .*max_new_tokens"
    ):
        run_tasks(str(model), "lm_eval:words", output=tmp_path / "out")


def test_a_reply_ends_before_the_first_stop_string():
    assert _cut("a.b!c", [".", "!"]) == "a" and _cut("a.b", None) == "a.b" and _cut("a b", " ") == "a"
    assert _cut("ab", [""]) == "ab"
