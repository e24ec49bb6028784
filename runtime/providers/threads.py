"""The threads of the sessions.

The idle threads of a session spin: they wait in a busy loop. Two sessions whose threads spin compete for the cores, and
decoding takes 1.35 times as long. So by default the threads of each session's pool stop spinning when a run ends.

With `share_threads` there is one pool for the whole process instead. ONNX Runtime then refuses every session that has a
pool of its own, also the sessions of other libraries, so only an application that controls its process should use it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pard_onnx.models.checks import require_whole, true_or_false

from .table import onnxruntime

SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
LIMIT = 512  # more than any machine has cores; ONNX Runtime tries to start any number of threads


@dataclass(frozen=True, slots=True)
class Threads:
    """The threads of a session."""

    count: int | None = None  # None for one thread per physical core
    shared: bool = False  # whether the session uses the one pool of the process

    def __post_init__(self) -> None:
        if self.count is not None:
            object.__setattr__(self, "count", require_whole("threads", self.count, 1, LIMIT))
        object.__setattr__(self, "shared", true_or_false("share_threads", self.shared))


def physical_cores() -> int:
    """The number of physical cores that this process may use; 0 where the system does not say.

    With 0, ONNX Runtime counts the cores itself.
    """
    if not hasattr(os, "sched_getaffinity"):
        return 0
    cpus = os.sched_getaffinity(0)
    try:
        return len({Path(SIBLINGS.format(cpu)).read_text("utf-8") for cpu in cpus})
    except OSError:
        return len(cpus)


_pool_is_shared = False  # whether ONNX Runtime's global pool was made; it stays until the process ends


def make_shared_pool(count: int) -> bool:
    """Make the one pool of the process; False if ONNX Runtime does not allow it any more."""
    global _pool_is_shared
    if not _pool_is_shared:
        try:
            onnxruntime().set_global_thread_pool_sizes(count, 1)
            _pool_is_shared = True
        except (RuntimeError, AttributeError):  # sessions exist already, or this onnxruntime lacks the function
            return False
    return True


def set_threads(threads: Threads, options: Any) -> None:
    """Set the threads in SessionOptions, such that idle threads leave the cores to the other session."""
    count = threads.count or physical_cores()
    if threads.shared:
        make_shared_pool(count)
    if _pool_is_shared:
        options.use_per_session_threads = False
        return
    options.intra_op_num_threads = count
    options.add_session_config_entry("session.force_spinning_stop", "1")
