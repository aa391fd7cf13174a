from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest

from shared.training import memory

HOLES = """
from pathlib import Path
from shared.training.memory import return_freed_memory
import ctypes
def resident():
    lines = Path('/proc/self/status').read_text().splitlines()
    return int(next(line for line in lines if line.startswith('RssAnon')).split()[1])
ctypes.CDLL(None).mallopt(-3, 1 << 25)  # large blocks from the heap, as after a while of training
blocks = [bytearray(b'x') * (4 << 20) for _ in range(64)]
kept, blocks = blocks[-1:], None
before = resident()
return_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(memory._malloc_trim() is None, reason="the C library has no malloc_trim")
def test_holes_go_back_to_the_system():
    result = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(result.stdout) > 100 * 1024  # KiB, of 252 MiB that are free


def test_another_c_library_changes_nothing(monkeypatch):
    monkeypatch.setattr(memory, "_malloc_trim", lambda: None)
    assert memory.return_freed_memory() is None


def test_cycles_of_the_last_steps_are_found_at_once_those_of_old_objects_when_asked(monkeypatch):
    monkeypatch.setattr(memory, "_malloc_trim", lambda: lambda _: 1)
    gc.disable()
    try:
        old = _cycle()
        alive = weakref.ref(old)
        gc.collect(0), gc.collect(1)  # it grows old
        del old
        young = weakref.ref(_cycle())
        memory.return_freed_memory(everything=False)
        assert young() is None and alive() is not None
        memory.return_freed_memory()
        assert alive() is None
    finally:
        gc.enable()


class _Node:
    itself: _Node


def _cycle() -> _Node:
    node = _Node()
    node.itself = node
    return node
