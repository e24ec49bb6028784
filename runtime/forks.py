"""What happens to sessions in a forked child process: nothing.

A fork copies memory, but only the thread that called it. A session whose threads are missing never ends a step, and it
waits for them when it is freed. So in a child, objects of the parent are neither used nor freed.
"""

from __future__ import annotations

import ctypes
import os
from weakref import WeakSet

from pard_onnx.models.errors import Failure

_KEPT: WeakSet[object] = WeakSet()


class Process:
    """The process in which an object was made."""

    __slots__ = ("_pid",)

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_current(self) -> bool:
        """False in a child that was forked afterwards."""
        return self._pid == os.getpid()

    def require(self) -> None:
        """Raise Failure in a forked child."""
        if not self.is_current:
            raise Failure(
                f"this pair was loaded in process {self._pid}, of which this process is a fork; load it here, or start "
                "processes by spawn"
            )


def never_free_in_children(thing: object) -> None:
    """Let a forked child leave this object as it is until the child ends."""
    _KEPT.add(thing)


def _keep() -> None:
    for thing in list(_KEPT):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))  # one reference that nobody gives back


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_keep)
