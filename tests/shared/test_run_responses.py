"""Where a run's responses come from: draws, the first round again, files; and which are trained on."""

from __future__ import annotations

import json

import pytest

from runs import TRAIN, tiny_config, tiny_run
from shared.check import check_config
from shared.errors import ConfigError, DataError
from shared.run import Run


@pytest.fixture
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("responses")


def sampled(run: Run, number: int = 1):
    """The groups of a round, after those before it."""
    run.execute("generate")
    for before in range(1, number):
        run._train(before, run._sample(before))
    return run._sample(number)


def write_pairs(folder):
    tiny_config(folder)  # writes models and prompts
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows = [{**row, "id": f"p{i}", "rejected": f"worse {i}"} for i, row in enumerate(lines)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_each_draw_is_a_pair_and_a_step_more(folder):
    run = tiny_run(folder, "generation.draws=2")
    groups = sampled(run)
    assert len(groups) == 2 * TRAIN
    assert len({(g.sample.id, g.responses[0].draw) for g in groups}) == 2 * TRAIN
    assert all(len({r.draw for r in g.responses}) == 1 for g in groups)
    first, second = groups[0].responses[0], groups[1].responses[0]
    assert first.sample_id == second.sample_id and first.token_ids != second.token_ids
    assert run.session.trainee.total_steps == 2 * 5
    assert (
        check_config(tiny_config(folder, "generation.draws=2", "name=other", f"output={folder}/o"))[
            "optimiser steps"
        ]
        == 10
    )


def test_teacher_responses_of_the_first_round_serve_every_round(folder):
    run = tiny_run(folder, "generation.reuse_teacher=true")
    run.execute("generate")
    first = run._sample(1)
    run._train(1, first)
    second = run._sample(2)
    teacher = [[g.responses[0] for g in groups] for groups in (first, second)]
    student = [[g.responses[1] for g in groups] for groups in (first, second)]
    assert teacher[0] == teacher[1]
    assert {r.round for r in student[1]} == {2} and student[0] != student[1]
    assert not (run.config.folder / "round-02" / "responses" / "teacher").exists()


def test_a_whole_run_on_chosen_and_rejected(folder):
    write_pairs(folder)
    offline = "generation.offline={teacher: columns, student: columns}"
    run = tiny_run(folder, offline, "generation.max_new_tokens=40")
    run.execute()
    groups = run._sample(2)
    assert [[r.text for r in g.responses] for g in groups] == [
        [f"answer {i}", f"worse {i}"] for i in range(TRAIN)
    ]
    assert not (run.config.folder / "round-01" / "responses").exists()
    assert (run.config.folder / "report.json").exists()


def test_responses_longer_than_the_limit_are_left_out(folder):
    write_pairs(folder)
    run = tiny_run(folder, "generation.offline.student=columns", "generation.max_new_tokens=7")
    with pytest.raises(DataError, match=rf"no group is left.*{TRAIN} × student response long"):
        run.execute("generate")


def test_another_runs_responses(folder):
    sampled(tiny_run(folder))
    store = folder / "run" / "round-01" / "responses" / "teacher"
    other = tiny_run(folder, f"generation.offline.teacher={store}", f"output={folder}/other", "seed=5")
    groups = sampled(other)
    before = sampled(tiny_run(folder))
    assert [g.responses[0].token_ids for g in groups] == [g.responses[0].token_ids for g in before]


def test_what_is_filtered_is_said(folder, capsys):
    run = tiny_run(folder, "generation.filters={roles: [student], max_tokens: 3}")
    said = []
    run.speaker.say = said.append
    try:
        groups = sampled(run)
    except DataError as nothing:
        said.append(str(nothing))
        groups = []
    assert len(groups) < TRAIN and any("student response long" in line for line in said)
    assert all(len(g.responses[1].token_ids) <= 3 for g in groups)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["generation.reuse_teacher=true", "training.rounds=1"],
            "without teacher responses in a second round",
        ),
        (["generation.reuse_teacher=true", "objective.name=imitkd"], "without teacher responses"),
        (["generation.reuse_teacher=true", "generation.offline.teacher=columns"], "with offline.teacher"),
        (["generation.draws=2", "generation.offline.student=columns"], "columns hold one answer a prompt"),
        (["generation.offline.student=columns", "objective.name=kd"], "trains on no student response"),
        (["generation.draws=2", "objective.name=sft"], "no effect of generation.draws"),
        (["generation.filters={min_tokens: 2}", "objective.name=sft"], "no effect of generation.filters"),
    ],
)
def test_settings_that_cannot_take_effect(folder, overrides, said):
    with pytest.raises(ConfigError, match=said):
        tiny_config(folder, *overrides)


def test_check_finds_what_files_lack_before_a_model_is_loaded(folder):
    config = tiny_config(folder, "generation.offline.student=columns")
    with pytest.raises(DataError, match=rf"needs the rejected of every prompt, and {TRAIN} have none"):
        check_config(config)
