"""How is memory given back that nobody uses any more?

Micro-batches differ in shape, so a long training leaves holes between the blocks in use. glibc keeps them:
the demo's process grew by a third within one round although nothing of it did.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import sys
from functools import cache

YOUNG, OLDEST = 1, 2  # generations of Python's collector


def return_freed_memory(*, everything: bool = True) -> None:
    """Give free pages of the heap back to the system, where the C library can (glibc); else does nothing.

    Args:
        everything: also what only cycles of long-lived objects hold, such as a model that has been dropped.
            Looking for it takes as long as there are prompts (half a second for 30,000); what a few steps
            leave behind is young, and found at once.
    """
    trim = _malloc_trim()
    if trim is not None:
        gc.collect(OLDEST if everything else YOUNG)
        trim(0)


@cache
def _malloc_trim() -> ctypes._NamedFuncPointer | None:
    name = ctypes.util.find_library("c") if sys.platform == "linux" else None
    return getattr(ctypes.CDLL(name), "malloc_trim", None) if name else None
