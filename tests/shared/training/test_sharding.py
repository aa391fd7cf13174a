from __future__ import annotations

import importlib.util

import pytest

from processes import in_two_processes


def test_gradients_under_fsdp2_are_those_of_one_process() -> None:
    """Over two processes, the head in the root unit, two micro-batches accumulated in each."""
    in_two_processes("import sharded; sharded.compare_with_one_process()")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_gradients_under_zero3_are_those_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    in_two_processes("import sharded; sharded.compare_zero3_with_one_process()")
