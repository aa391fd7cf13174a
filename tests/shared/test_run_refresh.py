"""`generation.refresh`: the student answers anew within a round; a run killed there ends as if it was not."""

import pytest
import torch
from safetensors.torch import load_file

from runs import TRAIN, tiny_config, tiny_run
from shared.check import check_config
from shared.errors import ConfigError
from shared.training import loop


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("refresh")


def fingerprints(folder):
    """Of the students that wrote each part's responses, and how many responses there are."""
    import pyarrow.parquet as pq

    rows = [row for part in sorted(folder.glob("*.parquet")) for row in pq.read_table(part).to_pylist()]
    return {row["fingerprint"] for row in rows}, len(rows)


def test_parts_are_answered_by_the_student_of_their_time_and_a_killed_run_ends_the_same(folder, monkeypatch):
    whole = tiny_run(folder, "generation.refresh=2", f"output={folder}/whole")
    whole.execute("export")
    responses = whole.workspace.folder / "round-01" / "responses"
    (first, several), (second, few) = (fingerprints(responses / f"student-{n:03d}") for n in (1, 2))
    assert (several, few) == (8, 2) and several + few == TRAIN and first.isdisjoint(second)
    assert fingerprints(responses / "teacher")[1] == TRAIN
    rows = [row for row in whole.workspace.metrics() if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    # the curriculum still takes the whole first round to measure
    assert [row["train/alpha_student"] for row in rows[:3]] == pytest.approx([0.1] * 3)

    step = loop._optimiser_step
    for at in (2, 3, 5):  # within a part, at the begin of the second, in the next round

        def dies(trainee, *arguments, at=at):
            if trainee.step == at:
                raise Killed
            return step(trainee, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "_optimiser_step", dies)
            with pytest.raises(Killed):
                tiny_run(folder, "generation.refresh=2", f"output={folder}/killed").execute("export")
    tiny_run(folder, "generation.refresh=2", f"output={folder}/killed").execute("export")
    left, right = (load_file(folder / n / "student" / "model.safetensors") for n in ("whole", "killed"))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_refresh_that_cannot_take_effect_is_refused(folder):
    with pytest.raises(ConfigError, match=r"no effect of generation\.refresh: 3 in rounds of 3 steps"):
        check_config(tiny_config(folder, "generation.refresh=3", f"output={folder}/none"))
    for setting, said in (
        ("objective.name=kd", "'kd', which trains on no student response"),
        ("generation.offline={student: x.jsonl}", "refresh with offline.student"),
    ):
        with pytest.raises(ConfigError, match=said):
            tiny_config(folder, "generation.refresh=2", setting)
