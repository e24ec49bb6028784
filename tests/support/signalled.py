"""Commands that get a signal at a chosen moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

# Tells the parent when the package's own code begins, after the interpreter's start. Shells give background processes
# an ignored SIGINT, and nohup an ignored SIGHUP, so they are set to Python's defaults.
LAUNCH = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "signal.signal(signal.SIGHUP, signal.SIG_DFL);"
    "from pard_onnx.entry_points import {name} as command; os.write({fd}, b'.'); sys.exit(command())"
)
PATIENCE = 120.0
SIGNS = ("Traceback", "KeyboardInterrupt", "Exception ignored", "Error", "error", "please report")


@dataclass(frozen=True)
class Outcome:
    """How a command ended. late: it had ended before the signal came."""

    code: int
    stderr: str
    late: bool

    @property
    def quiet(self) -> bool:
        """Whether stderr has no traceback, no message of Python's own, and no error of ours."""
        return not any(sign in self.stderr for sign in SIGNS)


def signalled(
    name: str,
    arguments: Sequence[str],
    seconds: float,
    *,
    number: int = signal.SIGINT,
    again: float | None = None,
    typed: str = "",
) -> Outcome:
    """Run a command; send the signal after so many seconds, and once more `again` seconds later.

    typed: what the command finds on stdin, which stays open.
    """
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH.format(name=name, fd=writer), *arguments],
        pass_fds=[writer],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stdin
    os.close(writer)
    process.stdin.write(typed.encode())
    process.stdin.flush()
    os.read(reader, 1)
    os.close(reader)
    time.sleep(seconds)
    late = process.poll() is not None
    process.send_signal(number)
    if again is not None:
        time.sleep(again)
        process.send_signal(number)
    return Outcome(process.wait(PATIENCE), process.communicate()[1].decode(errors="replace"), late)
