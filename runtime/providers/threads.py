"""Threads of the sessions. Two sessions whose idle threads spin fight for the cores: 1.35 times slower.

By default each session has a pool whose threads stop spinning when a run ends. `share` makes one pool for the
whole process instead; ONNX Runtime then refuses every session with a pool of its own, other libraries' included,
so only an application that owns its process should ask for it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pard_onnx.models.checks import require_whole

from .table import onnxruntime

SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
LIMIT = 512  # more than any machine has cores; ONNX Runtime tries to start whatever it is told


@dataclass(frozen=True, slots=True)
class Threads:
    """count: of each run, None for the physical cores; shared: in the process's one pool."""

    count: int | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        if self.count is not None:
            require_whole("threads", self.count, 1, LIMIT)


def physical_cores() -> int:
    """Cores that this process may use; 0 (ONNX Runtime counts itself) where the system does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return 0
    cpus = os.sched_getaffinity(0)
    try:
        return len({Path(SIBLINGS.format(cpu)).read_text() for cpu in cpus})
    except OSError:
        return len(cpus)


_shared = False  # ONNX Runtime's global pool is made once a process and never unmade


def share(count: int) -> bool:
    """Make the process's one pool; False where something else already decided."""
    global _shared
    if not _shared:
        try:
            onnxruntime().set_global_thread_pool_sizes(count, 1)
            _shared = True
        except (RuntimeError, AttributeError):  # made by someone else, or an onnxruntime older than the call
            return False
    return True


def apply(threads: Threads, options: Any) -> None:
    """Set up SessionOptions so that the session's threads leave the cores to its partner when idle."""
    count = threads.count or physical_cores()
    if threads.shared:
        share(count)
    if _shared:
        options.use_per_session_threads = False
        return
    options.intra_op_num_threads = count
    options.add_session_config_entry("session.force_spinning_stop", "1")
