"""The standard streams of a command: UTF-8 on every system, and nothing left in them that fails at the end."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from pathlib import Path

TYPE_CHECKING = False  # as typing's, whose import takes milliseconds
if TYPE_CHECKING:
    from typing import Any

STANDARD_OUTPUT = "standard output"  # as which errors name it
# Names are the user's own bytes on stdout, and readable whatever they hold on stderr.
STREAMS = {"stdin": ("r", "strict"), "stdout": ("w", "surrogateescape"), "stderr": ("w", "backslashreplace")}


class StandardOutput:
    """stdout, whose errors name it as their file. Has all other attributes of the stream."""

    def __init__(self, stream: TextIOWrapper) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            error.filename = STANDARD_OUTPUT
            raise

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            error.filename = STANDARD_OUTPUT
            raise


def utf8_streams() -> None:
    """Make stdin, stdout and stderr UTF-8, which they are not on Windows; replace closed ones by the null device."""
    for name, (mode, errors) in STREAMS.items():
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 until the process ends
        reconfigure = getattr(getattr(sys, name), "reconfigure", None)  # tests and notebooks put other objects there
        if reconfigure:
            reconfigure(encoding="utf-8", errors=errors)
    if type(sys.stdout) is TextIOWrapper:
        sys.stdout = StandardOutput(sys.stdout)


def flushed(name: str) -> int:
    """Write what the stream still holds: 0, or 1 if that fails. The stream's file is then the null device."""
    stream = getattr(sys, name)
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError) as error:
        to_null_device(stream)
        if name == "stdout" and isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            from pard_onnx.models.system_errors import os_error_line

            error.filename = STANDARD_OUTPUT
            print(f"error: {os_error_line(error)}", file=sys.stderr)
        return 1
    return 0


def to_null_device(stream: object) -> None:
    """Let the stream's file be the null device, so that Python's last flush does not fail once more."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):  # no stream, or one without a file
        return
