"""Prompts that a run's teacher writes: through a whole run, killed, no two alike; and their misuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builders import CHAT_TEMPLATE, save_tiny_model, tiny_tokenizer
from runs import tiny_config, tiny_run
from shared.check import check_config
from shared.errors import ConfigError, UserError
from shared.generation import transformers_engine
from shared.preflight.check import check_models
from shared.prompt_writing import UserTurnReader
from shared.run import Run
from shared.types import Message, Sample, TextPart
from text_distill import distill
from text_distill.adapter import TextAdapter, TextAdapterKind

# a tiny model draws bytes at random, and one turn in five ends by itself within 60 of them
WRITTEN = "{written: {count: 5, max_new_tokens: 60, min_words: 1, temperature: 50.0}}"
TRAIN = f"prompts.train=[{WRITTEN}]"
HELDOUT = f"prompts.heldout=[{WRITTEN}]".replace("count: 5", "count: 2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    save_tiny_model(folder / "teacher", layers=2)
    return folder


def writing_run(folder: Path, name: str, *overrides: str) -> Run:
    return tiny_run(
        folder, TRAIN, HELDOUT, "student.prune={drop_layers: [1]}", f"output={folder}/{name}", *overrides
    )


def prompts(run: Run) -> dict[str, str]:
    files = sorted((run.config.folder / "prompts").glob("*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {row["id"]: row["prompt"] for row in rows}


@pytest.fixture(scope="module")
def finished(folder) -> tuple[Run, list[str]]:
    run, said = writing_run(folder, "whole"), list[str]()
    run.speaker.say = said.append  # type: ignore[method-assign]
    run.execute()
    return run, said


def test_a_whole_run_without_a_data_set(finished) -> None:
    run, said = finished
    written = prompts(run)
    assert [place.partition(":")[0] for place in written] == ["written-heldout.0"] * 2 + [
        "written-train.0"
    ] * 5
    assert len(set(written.values())) == 7
    assert {s.id: s.messages[0].text for s in run.session.train_samples} == {
        place: text for place, text in written.items() if "train" in place
    }
    assert (run.config.folder / "student" / "model.safetensors").exists()
    assert sum("prompts written by the teacher; left out: " in line for line in said) == 2


def test_killed_while_it_writes_it_draws_nothing_twice(folder, finished, monkeypatch) -> None:
    asked: list[tuple[str, int]] = []
    generate = transformers_engine.TransformersEngine._generate_ids

    def counted(self, requests, sampling):
        if len(asked) == 12:
            asked.append(("killed", 0))
            raise KeyboardInterrupt
        asked.extend(
            (request.sample.id, request.draw) for request in requests if "written" in request.sample.id
        )
        return generate(self, requests, sampling)

    small = "generation.batch_tokens=280"  # four draws a batch
    monkeypatch.setattr(transformers_engine.TransformersEngine, "_generate_ids", counted)
    with pytest.raises(KeyboardInterrupt):
        writing_run(folder, "killed", small).execute("generate")
    run = writing_run(folder, "killed", small)
    run.execute("generate")
    draws = [of for of in asked if of[0] in ("written-train.0", "written-heldout.0")]
    assert len(draws) == len(set(draws)) > 12
    assert prompts(run) == prompts(finished[0])


def test_settings_that_are_mended_draw_anew(folder) -> None:
    with pytest.raises(UserError, match=r"after 40 tries; 5 were wanted\. Ask for fewer, raise"):
        writing_run(folder, "mended", "prompts.train.0.written.max_new_tokens=1").execute("generate")
    writing_run(folder, "mended").execute("generate")


def test_a_smoke_run_writes_few_and_goes_through_every_stage(folder) -> None:
    many = (TRAIN.replace("count: 5", "count: 50"), HELDOUT, "student.prune={drop_layers: [1]}")
    result = distill(tiny_config(folder, *many, f"output={folder}/few"), smoke=True, quiet=True)
    assert result.folder == folder / "few-smoke"
    written = {
        file.stem: len(file.read_text().splitlines()) for file in result.folder.glob("prompts/*.jsonl")
    }
    assert written == {"train.0": 8, "heldout.0": 2}
    assert result.student.is_dir() and (result.folder / "report.html").is_file()
    assert result.scores["student"]["kl_teacher_model"]["n"] == 2


def test_check_says_what_is_to_be_written_and_what_it_assumes(folder) -> None:
    config = writing_run(folder, "checked", "prompts.decontamination={heldout: true, ngram: 4}").config
    facts = check_config(config)
    assert (facts["training prompts"], facts["held-out prompts"]) == (5, 2)
    assert facts["written by the teacher"] == "5 of train.0, 2 of heldout.0, when the run starts"
    found = check_models(config, TextAdapterKind(), prompts=5, heldout=2, estimate=False)
    assert found.problems == [] and "distance to itself: student, joint, plain" in found.facts
    topics = {topic.title: list(topic.lines) for topic in found.topics}
    assert topics["Prompts that the teacher writes"] == ["not there yet; taken to be 24 words long"]
    assert not config.folder.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher=null", "objective.name=sft", "student={model: x}"], "this run has none. Give a teacher"),
        (["objective.name=sft"], "without reference answers, and objective 'sft' trains on them"),
        ([f"prompts.train=[{WRITTEN[:-1]}, path: x}}]"], "give path, hub or written; got path and written"),
        ([f"prompts.train=[{WRITTEN[:-1]}, limit: 3}}]"], "no effect of limit with written"),
        ([f"prompts.train=[{WRITTEN[:-1]}, turns: all}}]"], "no effect of turns with written"),
        (["prompts.train=[{written: {count: 3, temperature: 0}}]"], "greater than 0"),
        (["prompts.train=[{written: {count: 3, max_words: 2}}]"], "min_words <= max_words; got 3 and 2"),
    ],
)
def test_what_cannot_be_written(folder, overrides, message) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_config(folder, TRAIN, *overrides)
    assert message in str(caught.value)


def reader(template: str, *messages: Message) -> UserTurnReader:
    adapter = TextAdapter(tiny_tokenizer(chat_template=template))
    return UserTurnReader(adapter, Sample("written", messages, source="prompts.train.0"))


def test_what_the_teacher_goes_on_from() -> None:
    system = Message("system", (TextPart("Ask about trees."),))
    alone, steered = reader(CHAT_TEMPLATE), reader(CHAT_TEMPLATE, system)
    decode = tiny_tokenizer().decode
    assert decode(alone.prompt_ids) == "<|im_start|>user\n"
    assert decode(steered.prompt_ids) == (
        "<|im_start|>system\nAsk about trees.<|im_end|>\n<|im_start|>user\n"
    )
    assert alone.fingerprint != steered.fingerprint
    assert alone.encode_prompts([Sample("a", ()), Sample("b", ())])["input_ids"].shape[0] == 2
    # a token that ends user turns alone ends a prompt as well
    ends = reader(CHAT_TEMPLATE.replace("<|im_end|>", "<|endoftext|>"))
    assert set(ends.vocabulary.stop_ids) == {0, 2}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] }}", "has no user turn that begins with something of its own"),
        ("{% for m in messages %}USER: {{ m['content'] }} {% endfor %}", "which has no special token"),
        ("{{ raise_exception('no chats') }}", "prompts.train.0.*chat template refuses it: no chats"),
    ],
)
def test_a_template_that_no_teacher_can_go_on_from(template, message) -> None:
    with pytest.raises(UserError, match=message):
        reader(template)
