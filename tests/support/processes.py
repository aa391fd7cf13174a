"""Two processes on this machine, for tests of what is spread over several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

SUPPORT = Path(__file__).resolve().parent


def in_two_processes(statements: str, *arguments: str) -> None:
    """Run statements under `torch.distributed.run` with gloo, with the arguments in `sys.argv`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads())),
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }
    result = subprocess.run(
        [*command, str(SUPPORT / "launched.py"), f"import sys, pathlib; {statements}", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stderr[-3000:]
