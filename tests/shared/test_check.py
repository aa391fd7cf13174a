"""What can be known without loading a model is known before anything is loaded."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from runs import HELDOUT, TRAIN, tiny_config
from shared.check import check_config, smoke_config
from shared.errors import UserError
from shared.workspace import HELDOUT as HELDOUT_STORE
from shared.workspace import Workspace


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_config(tmp_path)  # writes model and prompts
    return tmp_path


def complaint(folder: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        check_config(tiny_config(folder, *overrides))
    assert not (folder / "run").exists()
    return str(caught.value)


def edit_model_config(folder: Path, **changes: object) -> None:
    path = folder / "teacher" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**values, **changes}.items() if v is not None}))


def test_a_run_that_can_start_is_described_and_nothing_is_written(folder):
    facts = check_config(tiny_config(folder))
    assert facts["training prompts"] == TRAIN and facts["held-out prompts"] == HELDOUT
    assert facts["optimiser steps"] == 6  # two rounds of 4 + 4 + 2 pairs
    assert facts["responses by"] == "teacher, student"
    json.dumps(facts)
    assert not (folder / "run").exists()


# --- prompts -----------------------------------------------------------------------------------------------


def test_a_missing_prompt_file_is_named(folder):
    text = complaint(folder, "prompts.train.0.path=absent.jsonl")
    assert "'absent.jsonl' does not exist" in text


def test_an_empty_prompt_set_is_refused(folder):
    (folder / "heldout.jsonl").write_text("\n\n")
    assert "no prompts in" in (text := complaint(folder)) and "heldout.jsonl" in text


def test_bad_rows_are_named_by_file_and_line_all_at_once(folder):
    with (folder / "train.jsonl").open("ab") as file:
        file.write(b'{"promt": "x"}\n{"prompt": 5}\nnot json\n{"prompt": "\xff"}\n')
    head, *lines, advice = complaint(folder).splitlines()
    assert "on_bad_row: skip" in advice
    assert head.startswith("4 unusable row(s)")
    assert [re.search(r"train\.jsonl:(\d+): ", line)[1] for line in lines] == ["11", "12", "13", "14"]
    assert "has promt" in lines[0] and "not JSON" in lines[2] and "not UTF-8" in lines[3]


def test_a_prompt_in_both_sets_is_refused(folder):
    text = complaint(folder, f"prompts.heldout.0.path={folder}/train.jsonl")
    assert f"{TRAIN} prompts are in prompts.train and prompts.heldout" in text


def test_an_objective_on_references_needs_them(folder):
    check_config(tiny_config(folder, "objective.name=sft"))
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"prompt": "without"}\n')
    assert "'sft' trains on reference answers, and 1 prompts have none (train.jsonl:11)" in complaint(
        folder, "objective.name=sft"
    )
    check_config(tiny_config(folder))  # no other objective asks for them


# --- models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", r"no config\.json in .*Give a model folder"),
        ("model.safetensors", r"no weights in .*model\.safetensors.*Copy the weights"),
        ("tokenizer.json", r"no tokenizer in .*Copy the tokenizer files"),
    ],
)
def test_a_model_folder_that_lacks_a_file_is_named(folder, file, message):
    (folder / "teacher" / file).unlink()
    if file == "tokenizer.json":
        (folder / "teacher" / "tokenizer_config.json").unlink()
    assert re.search(message, complaint(folder))


def test_a_misspelt_folder_shows_as_a_model_of_the_hub(folder):
    facts = check_config(tiny_config(folder, "teacher.model=techer"))
    assert facts["teacher"] == "techer, from the hub" and facts["student"] == "teacher (full)"


def test_a_file_that_is_no_model_is_refused(folder):
    text = complaint(folder, "student.prune=null", f"student.model={folder}/train.jsonl")
    assert "train.jsonl' is a file that is not GGUF. Give a model folder" in text


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("lora: {folder}/teacher", "no adapter_config.json and no adapter_model.safetensors in"),
        ("chat_template: absent.jinja", "'absent.jinja': no such file. Give a path to a .jinja file"),
    ],
)
def test_what_a_reference_adds_to_a_model_is_looked_at(folder, added, message):
    model = f"teacher.model={{name: {folder}/teacher, {added.format(folder=folder)}}}"
    assert message in complaint(folder, model)


def test_the_student_s_own_folder_is_looked_at_too(folder):
    shutil.copytree(folder / "teacher", folder / "other")
    overrides = [f"student.model={folder}/other"]
    check_config(tiny_config(folder, *overrides))
    (folder / "other" / "model.safetensors").unlink()
    assert "other': no weights in" in complaint(folder, *overrides)


@pytest.mark.parametrize("name", ["./absent", "/absent", "absent.gguf", "pkg://absent/model.gguf"])
def test_a_model_that_is_not_there_is_named(folder, name):
    assert repr(name) in complaint(folder, f"teacher.model={name}")


def test_a_hub_id_is_left_to_the_run(folder):
    check_config(tiny_config(folder, "teacher.model=org/model"))


def test_a_revision_of_a_local_model_has_no_effect(folder):
    text = complaint(folder, f"teacher.model={{name: {folder}/teacher, revision: v2}}")
    assert text.startswith("no effect of teacher.model.revision:")


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ("{drop_layers: [1, 4]}", r"drop_layers: \[4\] are not blocks of this model; it has 0 to 3"),
        ("{drop_layers: [1, 1]}", "names a block twice"),
        ("{drop_layers: [0, 1, 2, 3]}", "drops all 4 blocks"),
        ("{block_influence: 4}", "drops all 4 blocks"),
        ("{keep_every: 5}", "5 is more than this model's 4 blocks"),
    ],
)
def test_blocks_that_the_model_does_not_have_are_known_without_loading_it(folder, prune, message):
    assert re.search(message, complaint(folder, f"student.prune={prune}"))
    check_config(tiny_config(folder, "student.prune={block_influence: 3}"))


def test_blocks_and_context_of_a_model_with_several_parts_are_its_text_decoder_s(folder):
    edit_model_config(
        folder,
        text_config={"num_hidden_layers": 3, "max_position_embeddings": 64},
        num_hidden_layers=None,
        max_position_embeddings=None,
    )
    check_config(tiny_config(folder))
    assert "it has 0 to 2" in complaint(folder, "student.prune={drop_layers: [3]}")
    assert "context of 64" in complaint(folder, "generation.max_new_tokens=64")


def test_answers_as_long_as_the_context_leave_no_room_for_a_prompt(folder):
    assert "max_new_tokens: 256 leaves no room for a prompt in the context of 256" in complaint(
        folder, "generation.max_new_tokens=256"
    )
    check_config(tiny_config(folder, "generation.max_new_tokens=255"))


# --- the run -----------------------------------------------------------------------------------------------


def test_measuring_more_rarely_than_the_run_is_long_has_no_effect(folder):
    assert "no effect of training.evaluate_steps: 6 in a run of 6 steps" in complaint(
        folder, "training.evaluate_steps=6"
    )
    check_config(tiny_config(folder, "training.evaluate_steps=5"))


def test_a_folder_of_another_configuration_is_known_before_the_run(folder):
    workspace = Workspace(folder / "run")
    workspace.open(tiny_config(folder))
    (folder / "run" / HELDOUT_STORE).mkdir()
    check_config(tiny_config(folder))
    with pytest.raises(UserError, match=r"another configuration:\n  seed: 0 there, 7 now"):
        check_config(tiny_config(folder, "seed=7"))
    workspace.close()


def test_a_smoke_run_is_small_elsewhere_and_passes_the_same_check(folder):
    overrides = ["student.prune={block_influence: 1}", "training.rounds=9", "training.evaluate_steps=5"]
    config = tiny_config(folder, *overrides, "generation.max_new_tokens=100")
    smoke = smoke_config(config)
    facts = check_config(smoke)
    assert smoke.folder != config.folder and smoke.name == "tiny-smoke"
    assert facts["training prompts"] == 8 and facts["held-out prompts"] == 3
    assert smoke.generation.max_new_tokens == 16 and smoke.training.rounds == 2
    assert smoke.student.prune is not None and smoke.student.prune.calibration_prompts == 2
    assert config.training.rounds == 9
