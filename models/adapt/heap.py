"""The heap of a training on a CPU, which keeps what torch frees.

glibc returns large blocks to the system when they are freed, and a training wants blocks of the same sizes in every
step. The system clears each page anew, which took a third of a step's time. The largest blocks are still returned:
a heap of all sizes would fragment.
"""

from __future__ import annotations

import ctypes
import sys

# Of mallopt (malloc.h)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 32 << 20  # bytes of a block that stays; the most that glibc allows


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, until it ends. Nothing happens without glibc."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((M_MMAP_THRESHOLD, LARGEST), (M_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(option, value)
