"""A program on a pseudo-terminal of its own, for tests of what Ctrl-C and Ctrl-D do there."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence

# Makes the terminal the program's own, which Ctrl-C needs, and becomes the program.
LAUNCH = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
CTRL_C, CTRL_D = "\x03", "\x04"
PATIENCE = 120.0  # seconds; machines that run tests may be busy


class Terminal:
    """What the program wrote so far is `seen`; stdout: another place for it than the terminal."""

    def __init__(self, command: Sequence[str], stdout: int | None = None) -> None:
        import pty  # not on Windows

        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *command],
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def expect(self, pattern: str) -> str:
        """Wait until what was not asked for yet matches; returns it up to the match's end."""
        end = time.monotonic() + PATIENCE
        while not (match := re.search(pattern, self.seen, re.DOTALL)):
            assert time.monotonic() < end and self._read(), f"no {pattern!r} in {self.seen[-2000:]!r}"
        found, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return found

    def ended(self, keys: str = "") -> int:
        """Read to the end; the exit code. keys: typed now, and again while nothing happens: Python's input() does
        not notice a Ctrl-C between its prompt and its wait for keys before the next key."""
        end = time.monotonic() + PATIENCE
        self.type(keys)
        while self._process.poll() is None and time.monotonic() < end:
            if not self._read(patience=1.0) and self._process.poll() is None:
                self.type(keys)
        while self._read(patience=0.1):
            pass
        return self._process.wait(PATIENCE)

    def _read(self, patience: float = PATIENCE) -> bool:
        ready, _, _ = select.select([self._master], [], [], patience)
        try:
            data = os.read(self._master, 65536) if ready else b""
        except OSError:  # Linux's way to say that nobody has the other side open
            data = b""
        self.seen += data.decode(errors="replace")
        return bool(data)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)
