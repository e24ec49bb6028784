"""Signals that end a command: Ctrl-C, SIGTERM, SIGHUP, and Ctrl-Break on Windows.

A command ends with 128 plus the signal's number and prints no traceback, whenever the signal comes:

1. While the command's modules are imported there is nothing to clean up: `exit_at_once`.
2. While the command works, `Interrupts` raises the signal once, as `Ended`, so that temporary files are removed.
3. While a module is imported in the midst of the work, the signal is raised when the import has ended: C extensions
   turn an exception into errors of their own, or print it.
4. While the command cleans up, more signals are ignored for GRACE seconds; after that they end the process at once.

This module imports nothing that takes time: `entry_points` imports it before everything else.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time

TYPE_CHECKING = False  # as typing's, whose import takes milliseconds
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

# Sent by Ctrl-C, process managers, closed terminals, and on Windows by Ctrl-Break and closed consoles
ENDS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
GRACE = 2.0  # seconds that cleaning up may take after the first signal before another one ends the process
PATIENCE = 10.0  # seconds after which a signal is raised inside an import too
POLL = 0.02  # seconds between two attempts to raise a signal that came during an import
NO_THREAD = b"error: not enough memory for another thread; close other programs, or raise the limits (ulimit -v, -u)\n"
SHOW_CURSOR = b"\x1b[?25h"
IMPORT_SYSTEM = "<frozen importlib._bootstrap>"  # the file name of the import system's own frames


class Ended(KeyboardInterrupt):
    """A signal that ends the command, raised like Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


def exit_at_once(number: int, _: FrameType | None) -> None:
    """A signal handler for times when nothing needs to be cleaned up.

    OpenBLAS, which numpy loads, sends its own process a SIGINT where it cannot start a thread.
    """
    if number == signal.SIGINT and not can_start_thread():
        os.write(2, NO_THREAD)
        os._exit(1)
    os._exit(128 + number)


def can_start_thread() -> bool:
    """Whether memory and limits allow one more thread."""
    try:
        _thread.start_new_thread(int, ())
    except (RuntimeError, MemoryError):
        return False
    return True


def handle(handler: Any) -> dict[int, Any]:
    """Set the handler of the signals that end a command; returns the handlers that were replaced.

    Signals that are ignored (nohup), or that the calling program handles, are left as they are. So are all signals
    outside of the main thread, where Python has none.
    """
    replaced: dict[int, Any] = {}
    for number in (getattr(signal, name) for name in ENDS if hasattr(signal, name)):
        before = signal.getsignal(number)
        if before in (signal.SIG_DFL, signal.default_int_handler, exit_at_once):
            try:
                signal.signal(number, handler)
            except ValueError:
                return {}
            replaced[number] = before
    return replaced


class Interrupts:
    """A context in which the first signal is raised as `Ended`, and no later one is raised."""

    def __init__(self) -> None:
        self.number: int | None = None  # of the first signal that came
        self._came = 0.0  # monotonic seconds of the first signal
        self._raised: float | None = None  # monotonic seconds when it was raised
        self._over = False  # whether the body has ended: nothing is raised any more
        self._replaced: dict[int, Any] = {}
        self._thread = _thread.get_ident()

    @property
    def exit_code(self) -> int:
        """What a command returns that a signal has ended; 0 if none came."""
        return 0 if self.number is None else 128 + self.number

    def __enter__(self) -> Interrupts:
        self._usual_hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        self._replaced = handle(self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Set the handlers again that were there before. May be called again: a signal may interrupt `__exit__`."""
        self._over = True
        for number, before in self._replaced.items():
            signal.signal(number, before)
        if sys.unraisablehook == self._unraisable:
            sys.unraisablehook = self._usual_hook

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._raised is not None:
            if now > self._raised + GRACE:
                if sys.stderr.isatty():
                    os.write(2, SHOW_CURSOR)  # progress bars hide it
                os._exit(self.exit_code)
            return
        first = self.number is None
        if first:
            self.number, self._came = number, now
        if self._over:
            return
        if is_importing(frame) and now < self._came + PATIENCE:
            if first:
                _thread.start_new_thread(self._remind, ())
            return
        self._raised = now
        raise Ended(self.number or number)

    def _remind(self) -> None:
        """Send the signal to the main thread again and again, until it was raised there."""
        while self._raised is None and not self._over:
            time.sleep(POLL)
            if self._raised is None and not self._over and self.number is not None:
                if hasattr(signal, "pthread_kill"):
                    signal.pthread_kill(self._thread, self.number)  # also ends a wait of the main thread
                else:
                    _thread.interrupt_main(signal.Signals(self.number))

    def _unraisable(self, problem: Any) -> None:
        """Python drops what is raised in a destructor or a callback of the garbage collector: raise `Ended` again."""
        if not issubclass(problem.exc_type, Ended):
            self._usual_hook(problem)
            return
        self._raised = None
        _thread.start_new_thread(self._remind, ())


def is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported in this frame or in one that has called it."""
    while frame:
        if frame.f_code.co_filename == IMPORT_SYSTEM:
            return True
        frame = frame.f_back
    return False
