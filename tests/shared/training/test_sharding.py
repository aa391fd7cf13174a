from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from processes import in_two_processes
from shared.training.setup import SUPPORTED_WRAPPING

ROOT = Path(__file__).resolve().parents[3]
LAUNCHES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_every_launch_that_is_shipped_is_one_that_a_run_accepts(path: Path) -> None:
    launch = load_config_from_file(str(path))
    assert launch.distributed_type in SUPPORTED_WRAPPING
    assert launch.mixed_precision == "no"  # the run's own setting decides
    assert str(path.relative_to(ROOT)) in path.read_text(encoding="utf-8")


def test_gradients_under_fsdp2_are_those_of_one_process() -> None:
    """Over two processes, the head in the root unit, two micro-batches accumulated in each."""
    in_two_processes("import sharded; sharded.compare_with_one_process()")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_gradients_under_zero3_are_those_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    in_two_processes("import sharded; sharded.compare_zero3_with_one_process()")
