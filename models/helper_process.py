"""Helper processes: work on a stranger's data that may hang, or take all memory, runs in another Python with limits.

A helper is a script of this package, which reads a JSON request from its standard input and writes a JSON answer. It
imports nothing of this package and starts in about 20 ms.

In a frozen application there is no interpreter to run a script, and `sys.executable` is the application. There a helper
is the application itself, started with FLAG: `freeze_support`, which runs before the application's own code, then does
the helper's work and ends the process. Where nobody has called it, no helper is started: it would be a second window.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

PYTHON = re.compile(r"(python|pypy)[\d.]*(d|t|w)?(\.exe)?", re.IGNORECASE)  # names of interpreters
NO_WINDOW = 0x08000000  # Windows: no console appears
FLAG = "--pard-onnx-helper"
HELPERS = {  # modules by the names of their files: all that FLAG may name
    "tokenizer_check": "pard_onnx.models.checkpoints.tokenizer_check",
    "module_patterns": "pard_onnx.models.checkpoints.module_patterns",
}
SINGLE_THREADED = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}


_is_supported = False  # whether `freeze_support` was called in this frozen application


class NoHelper(Exception):
    """No helper process can be started here, such as in a frozen application without `freeze_support`."""


class HelperStopped(Exception):
    """The helper ran past its deadline, or died. The message is a part of a sentence that says so."""


def freeze_support() -> None:
    """Let a frozen application start helper processes; in such a process, do its work and end it.

    To be called before anything else in the application's main module. The PyInstaller hook of this package does that;
    other programs that freeze (cx_Freeze, Nuitka) need the call. In an ordinary interpreter it does nothing.
    """
    global _is_supported
    if is_interpreter(sys.executable):
        return
    if sys.argv[1:2] != [FLAG] or len(sys.argv) != 3:
        _is_supported = True
        return
    code = 1
    try:
        import_module(HELPERS[sys.argv[2]]).main()
        sys.stdout.flush()
        code = 0
    finally:
        os._exit(code)  # at once: nothing of the application, such as a window that shows an error, may follow


def helper_command(script: Path) -> list[str]:
    """The command that runs the script as a helper. Raises NoHelper where none can be started."""
    if is_interpreter(sys.executable):
        if not script.is_file():
            raise NoHelper
        # -I: neither the user's environment nor the current folder has a say in what it imports
        return [sys.executable, "-I", "-S", str(script)]
    if not _is_supported or not sys.executable or script.stem not in HELPERS:
        raise NoHelper
    return [sys.executable, FLAG, script.stem]


def run_helper(script: Path, request: object, seconds: float) -> Any:
    """The script's answer. Raises HelperStopped after `seconds`, or if it dies; NoHelper where none can be started."""
    command = helper_command(script)
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            start_new_session=os.name == "posix",  # a terminal's Ctrl-C is for this process, which ends the helper
            env=os.environ | SINGLE_THREADED,
            creationflags=NO_WINDOW if sys.platform == "win32" else 0,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise HelperStopped(f"takes more than {seconds:.0f} seconds") from None
    except (OSError, ValueError) as error:  # the system allows no other process
        raise NoHelper from error
    if done.returncode == 1:  # an exception of Python's, such as of an import that this system refuses to the helper
        raise NoHelper
    try:
        return json.loads(done.stdout)
    except ValueError:
        raise HelperStopped("takes more memory than is allowed, or crashes") from None


def is_interpreter(executable: str | None) -> bool:
    """Whether `executable` is an interpreter that runs scripts. In frozen and embedding applications it is theirs."""
    frozen = getattr(sys, "frozen", False)
    return not frozen and executable is not None and PYTHON.fullmatch(Path(executable).name) is not None
