"""Tasks of the real lm_eval, from YAML files of our own; skipped where that harness is not installed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from builders import save_tiny_model
from eval.compare import compare
from eval.evaluation import score_again
from eval.records import read_records
from eval.suites import Registry
from evaluations import QUIET, ToldEngine, run_tasks, told_model, write_rows
from shared.errors import ConfigError, StoreError, UserError

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install lm-eval")

ROWS = [
    {"q": "Paris lies in", "choices": ["France", "Spain"], "label": 0, "answer": "France"},
    {"q": "Madrid lies in", "choices": ["France", "Spain"], "label": 1, "answer": "Spain"},
    {"q": "Rome lies in", "choices": ["Italy", "Peru"], "label": 0, "answer": "Italy"},
]
HEAD = """
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
metadata: {version: 2.0}
"""
TASKS = {
    "chosen": """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "said": """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
- {name: loose, filter: [{function: regex, regex_pattern: "(France|Spain|Italy)"}, {function: take_first}]}
- {name: strict, filter: [{function: take_first}]}
""",
    "likely": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}} {{answer}}."
metric_list: [{metric: bits_per_byte}]
""",
    "unsafe": """
output_type: generate_until
unsafe_code: true
doc_to_text: "{{q}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> str:
    """A folder of that harness's task files."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    rows = write_rows(folder / "rows.jsonl", ROWS)
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}" + HEAD.replace("ROWS", str(rows)) + text)
    (folder / "both.yaml").write_text("group: both\ntask: [said, said_again]")
    again = (folder / "said.yaml").read_text().replace("task: said", "task: said_again")
    (folder / "said_again.yaml").write_text(again)
    return f"data.path={folder}"


def test_replies_go_through_our_engine_and_are_scored_by_each_filter(tasks, tmp_path, monkeypatch):
    answers = {"Paris": "France. And", "Madrid": "It is Spain", "Rome": "Peru"}
    engine = ToldEngine(lambda r: answers[r.sample.messages[0].text.split()[0]])
    told_model(monkeypatch, engine)
    out = tmp_path / "out"
    results = run_tasks("told", "lm_eval:said", tasks, output=out)
    found = {name: (one["value"], one["n"]) for name, one in results["lm_eval:said"]["scores"].items()}
    assert found == {
        "exact_match,loose": (pytest.approx(2 / 3), 3),
        "exact_match,strict": (pytest.approx(1 / 3), 3),
    }
    assert results["lm_eval:said"]["scores"]["exact_match,strict"]["stderr"] == pytest.approx(1 / 3)
    first, second, _ = read_records(out / "lm_eval:said")
    assert (first.prompt, first.replies, first.references) == ("Paris lies in", ("France",), ("France",))
    assert (second.answer, second.values) == ("Spain", {"exact_match,loose": 1.0, "exact_match,strict": 0.0})
    assert len(engine.asked) == 3
    told_model(monkeypatch, again := ToldEngine(lambda _: "nothing"))
    assert run_tasks("told", "lm_eval:said", tasks, output=out) == results and not again.asked
    with pytest.raises(StoreError, match="max_new_tokens"):
        run_tasks("told", "lm_eval:said", tasks, "max_new_tokens=3", output=out)
    assert score_again(out, includes=[], allow_unsafe_execution=False, speaker=QUIET) == {}


def test_a_group_is_one_task_of_all_its_documents(tasks, tmp_path, monkeypatch):
    told_model(monkeypatch, ToldEngine(lambda _: "Spain"))
    results = run_tasks("told", "lm_eval:both", tasks, "limit=2", output=tmp_path / "out")
    assert results["lm_eval:both"]["scores"]["exact_match,strict"]["value"] == 0.5
    ids = [record.sample_id for record in read_records(tmp_path / "out" / "lm_eval:both")]
    assert ids == ["said/0", "said/1", "said_again/0", "said_again/1"]


def test_likelihoods_of_a_local_model(tasks, tmp_path, monkeypatch):
    model = str(save_tiny_model(tmp_path / "model", positions=512))
    words = (
        "lm_eval:chosen",
        "lm_eval:likely",
        *(f"{n}.{tasks}" for n in ("lm_eval:chosen", "lm_eval:likely")),
    )
    results = run_tasks(model, *words, output=tmp_path / "out")
    records = read_records(tmp_path / "out" / "lm_eval:chosen")
    for record, row in zip(records, ROWS, strict=True):
        values = [likelihood(model, row["q"], f" {choice}") for choice in row["choices"]]
        best = max(range(2), key=values.__getitem__)
        assert record.replies == (f" {row['choices'][best]}",)
        assert record.values["acc"] == float(best == row["label"])
        assert f"{row['choices'][0]}: {values[0]:.2f} nats" in record.note
    assert results["lm_eval:chosen"]["scores"]["acc"]["n"] == 3
    # bits per byte are no mean over documents: that harness's own figure stands, without a bootstrap
    figure = results["lm_eval:likely"]["scores"]["bits_per_byte"]
    texts = [f"{row['q']} {row['answer']}." for row in ROWS]
    nats = sum(likelihood(model, "", text) for text in texts)
    assert figure["value"] == pytest.approx(
        -nats / math.log(2) / sum(len(t.encode()) for t in texts), rel=1e-4
    )
    assert figure["higher_is_better"] is False
    monkeypatch.setattr("eval.bridges.lm_model.AskedModel._theirs", None)  # nothing is computed again
    assert run_tasks(model, *words, output=tmp_path / "out") == results


def likelihood(folder: str, context: str, text: str) -> float:
    """log p(text | context) by the definition: ids of both together, less those of the context; after BOS."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = tokenizer(context, add_special_tokens=False)["input_ids"] or [tokenizer.bos_token_id]
    ids = tokenizer(context + text, add_special_tokens=False)["input_ids"]
    whole = ids if context else [*before, *ids]
    with torch.no_grad():
        log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return float(sum(log_p[at - 1, whole[at]] for at in range(len(before), len(whole))))


def test_students_are_compared_as_on_any_task(tasks, tmp_path, monkeypatch):
    folders = []
    for name, says in (("teacher", "Spain France Italy"), ("start", "none"), ("student", "Spain")):
        told_model(monkeypatch, ToldEngine(lambda _, says=says: says, name=name))
        folders.append(tmp_path / name)
        run_tasks(name, "lm_eval:said", tasks, output=folders[-1])
    evaluation = compare(folders, Registry()).evaluations["student"]
    assert evaluation.scores["student"]["lm_eval:said/exact_match,loose"]["value"] == pytest.approx(1 / 3)
    assert "lm_eval:said/exact_match,loose" in evaluation.retention


def test_what_cannot_be_run_is_refused_before_a_model_is_opened(tasks, tmp_path):
    def refused(*words, match, kind=UserError):
        with pytest.raises(kind, match=match):
            run_tasks("nowhere", *words, output=tmp_path / "out")

    refused(
        "lm_eval:sayd", tasks, match=r"lm_eval has no task 'sayd' among its 6\. Did you mean lm_eval:said\?"
    )
    refused("lm_eval:unsafe", tasks, match="does not isolate them. Take humaneval")
    refused(
        "lm_eval:said", tasks, "samples=2", "temperature=1", match="no effect of samples", kind=ConfigError
    )
    refused("lm_eval:said", tasks, "judge.model=m", match="no effect of judge", kind=ConfigError)
    refused("gsm8k", "num_fewshot=2", match="no effect of num_fewshot", kind=ConfigError)
    (Path(tasks.partition("=")[2]) / "rows.jsonl").unlink()
    refused("lm_eval:said", tasks, match="lm_eval:said cannot be loaded")


def test_a_server_gives_no_likelihoods(tasks, tmp_path, monkeypatch):
    told_model(monkeypatch, ToldEngine(lambda _: ""))
    with pytest.raises(UserError, match="Take a local model"):
        run_tasks("told", "lm_eval:chosen", tasks, output=tmp_path / "out")


def test_the_folder_says_which_harness_it_was(tasks, tmp_path, monkeypatch):
    told_model(monkeypatch, ToldEngine(lambda _: "Spain"))
    run_tasks("told", "lm_eval:said", tasks, output=tmp_path / "out")
    pinned = json.loads((tmp_path / "out" / "lm_eval:said" / "task.json").read_text())
    assert pinned["version"].startswith("lm-eval ") and pinned["harness_versions"] == {"said": 2.0}
