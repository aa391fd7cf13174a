"""What a run's models tell before it starts: each finding, on tiny models."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch

from builders import CHAT_TEMPLATE, save_tiny_model, tiny_llama, tiny_tokenizer
from runs import HELDOUT, TRAIN, tiny_config
from shared.models.vocabulary import SharedVocabulary
from shared.preflight import check as check_module
from shared.preflight.check import check_models
from shared.preflight.page import Findings, duration, size
from shared.preflight.self_distance import Distance, distances_to_itself
from shared.progress import Speaker
from shared.training.layout import made_up_group
from shared.types import Message, Sample, TextPart
from text_distill.adapter import TextAdapter, TextAdapterKind


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_config(folder)  # writes model and prompts
    save_tiny_model(folder / "student", layers=1, seed=1)
    return folder


def look(folder: Path, *overrides: str, estimate: bool = True) -> Findings:
    config = tiny_config(folder, *overrides)
    found = check_models(config, TextAdapterKind(), prompts=TRAIN, heldout=HELDOUT, estimate=estimate)
    assert not (folder / "run").exists()
    json.dumps(found.facts)
    return found


def page(found: Findings) -> str:
    return "\n".join(
        "\n".join([topic.title, *topic.columns.values(), *topic.lines]) for topic in found.topics
    )


def own_student(folder: Path, name: str, **options) -> str:
    save_tiny_model(folder / name, layers=1, **options)
    return f"student={{model: {folder}/{name}}}"


# --- what the weights tell ---------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [[], ["training.pair_layout=separate"], ["student.method=lora"]])
def test_models_are_at_no_distance_from_themselves_and_are_timed(folder, overrides):
    found = look(folder, *overrides, estimate=False)
    assert not found.problems
    layout = "separate" if "training.pair_layout=separate" in overrides else "joint"
    distances = {key: value for key, value in found.facts.items() if key.startswith("distance to itself")}
    assert set(distances) == {
        f"distance to itself: {name}, {layout}, {backend}"
        for name in ("teacher", "student")
        for backend in ("fused", "plain")
    }
    assert all(nats < 1e-5 for nats in distances.values())
    seconds = found.facts["seconds of a round"]
    assert set(seconds) == {"sampling, teacher", "sampling, student", "training"}
    assert all(value > 0 for value in seconds.values())


def test_a_run_without_a_teacher_is_looked_at_too(folder):
    found = look(
        folder, "teacher=null", f"student={{model: {folder}/student}}", "objective.name=sft", estimate=False
    )
    assert not found.problems and set(found.facts["seconds of a round"]) == {"training"}
    assert "shared tokens" in found.facts and "template differs" not in found.facts


def test_a_mask_that_shows_a_response_the_other_one_is_found():
    adapter, model = TextAdapter(tiny_tokenizer()), tiny_llama()

    class Leaky(TextAdapter):
        def encode(self, groups, *, layout="separate"):
            encoded = super().encode(groups, layout=layout)
            if "segment_ids" not in encoded.inputs:
                return encoded
            one = encoded.inputs["segment_ids"].clamp(max=1)
            return encoded._replace(inputs={**encoded.inputs, "segment_ids": one})

    sample = Sample("a", (Message("user", (TextPart("some words to read"),)),))
    groups = [made_up_group(sample, adapter, 12), made_up_group(sample, adapter, 4)]

    def nats(reader: TextAdapter) -> list[bool]:
        distances = distances_to_itself(
            model, reader, SharedVocabulary(259, ()), groups, "joint",
            precision=contextlib.nullcontext(), dtype=torch.float32,
        )  # fmt: skip
        assert abs(distances[0].nats - distances[1].nats) < 1e-4
        return [distance.is_zero for distance in distances]

    assert nats(adapter) == [True, True]
    assert nats(Leaky(tiny_tokenizer())) == [False, False]


def test_a_distance_that_is_not_zero_is_a_problem(folder, monkeypatch):
    monkeypatch.setattr(
        check_module, "distances_to_itself", lambda *_, **__: [Distance("joint", "fused", 2.0, 1e-4)]
    )
    found = look(folder, estimate=False)
    assert "the teacher, joint, fused path is 2 nats a token away" in found.problems[0]


# --- what tokenizers tell ----------------------------------------------------------------------------------


def test_rows_stand_side_by_side(folder):
    found = look(folder)
    (alignment,) = [topic for topic in found.topics if topic.columns]
    assert set(alignment.columns) == {"teacher", "student"}
    assert all(text.startswith("<|im_start|>user") for text in alignment.columns.values())
    assert "6 rows predict the reference answer" in alignment.lines[0]  # cut to max_new_tokens
    assert alignment.lines[1].endswith("→ 'a'")
    found.show(Speaker(quiet=True))


def test_a_template_that_differs_is_shown_where_it_does(folder):
    other = CHAT_TEMPLATE.replace("<|im_start|>assistant", "<|im_start|>bot")
    found = look(folder, own_student(folder, "other-template", tokenizer_options={"chat_template": other}))
    assert not found.problems and found.facts["template differs"]
    assert "the templates differ" in page(found) and "'b o t" in page(found)
    assert not look(folder).facts["template differs"]


def test_a_turn_that_ends_otherwise_is_told(folder):
    other = CHAT_TEMPLATE.replace("<|im_end|>", "<|endoftext|>")
    found = look(folder, own_student(folder, "other-end", tokenizer_options={"chat_template": other}))
    assert found.facts["turn end differs"]
    assert "answers end with '<|im_end|>' (2), which the student learns in the place" in page(found)


def test_no_end_in_common_is_a_problem(folder):
    text = own_student(folder, "no-end")
    path = folder / "no-end"
    for name in ("config.json", "generation_config.json"):
        values = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps({**values, "eos_token_id": 0}))
    values = json.loads((path / "tokenizer_config.json").read_text())
    values["eos_token"] = "<|endoftext|>"
    values["chat_template"] = CHAT_TEMPLATE.replace("<|im_end|>", "")
    (path / "tokenizer_config.json").write_text(json.dumps(values))
    (path / "chat_template.jinja").write_text(values["chat_template"])
    found = look(folder, text)
    assert "no stop token in common" in found.problems[0]
    assert not [topic for topic in found.topics if topic.title == "Memory"]


def test_other_tokens_are_a_problem_and_both_prompts_are_shown(folder, tmp_path):
    text = own_student(folder, "other-words")
    path = folder / "other-words" / "tokenizer.json"
    values = json.loads(path.read_text())
    tokens = values["model"]["vocab"]
    tokens["a"], tokens["b"] = tokens["b"], tokens["a"]
    path.write_text(json.dumps(values))
    found = look(folder, text)
    assert "different tokens at 2 ids" in found.problems[0]
    assert found.facts["differing tokens"] == 2
    assert [topic for topic in found.topics if topic.columns]


def test_a_prompt_that_does_not_fit_is_named(folder):
    small = own_student(folder, "small", positions=64)
    found = look(folder, small)
    assert "student: 3 prompts do not fit its context of 64 tokens beside an answer of 6" in found.problems[0]
    assert "train.jsonl" in found.problems[0] and "over_length: drop" in found.problems[0]
    kept = look(folder, small, "prompts.over_length=drop")
    assert not kept.problems and "they are left out" in page(kept)
    assert kept.facts["prompts over the student's limit"] == 3
    assert kept.facts["prompts over the teacher's limit"] == 0


# --- what configurations tell ------------------------------------------------------------------------------


def test_weights_that_are_not_here_make_an_estimate_that_says_so(folder, monkeypatch):
    monkeypatch.setattr(check_module, "weights_are_local", lambda ref: False)
    found = look(folder, estimate=False)
    assert "worked out, because the weights of" in page(found) and "H100" in page(found)
    assert "seconds of a round" not in found.facts


def test_models_that_do_not_fit_this_machine_are_not_loaded(folder, monkeypatch):
    monkeypatch.setattr(check_module.os, "sysconf", lambda name: 1)
    assert "because this machine has 1 B of memory" in page(look(folder, estimate=False))


def test_sizes_for_a_person():
    assert (size(999), size(1500), size(15.2e9)) == ("999 B", "1.5 kB", "15.2 GB")
    assert (duration(0.02), duration(42), duration(600), duration(7.2e3)) == (
        "20 ms",
        "42 s",
        "10 min",
        "2 h",
    )
