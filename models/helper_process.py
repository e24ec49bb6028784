"""Helper processes: work on a stranger's data that may hang, or take all memory, runs in another Python with limits.

A helper is a script of this package, which reads a JSON request from its standard input and writes a JSON answer. It
imports nothing of this package and starts in about 20 ms.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PYTHON = re.compile(r"(python|pypy)[\d.]*(d|t|w)?(\.exe)?", re.IGNORECASE)  # names of interpreters
NO_WINDOW = 0x08000000  # Windows: no console appears
SINGLE_THREADED = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}


class NoHelper(Exception):
    """No helper process can be started here, such as in a frozen application."""


class HelperStopped(Exception):
    """The helper ran past its deadline, or died. The message is a part of a sentence that says so."""


def run_helper(script: Path, request: object, seconds: float) -> Any:
    """The script's answer. Raises HelperStopped after `seconds`, or if it dies; NoHelper where none can be started."""
    if not can_start(sys.executable) or not script.is_file():
        raise NoHelper
    try:
        done = subprocess.run(
            # -I: neither the user's environment nor the current folder has a say in what it imports
            [sys.executable, "-I", "-S", str(script)],
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


def can_start(executable: str | None) -> bool:
    """Whether `executable` is an interpreter that runs scripts. In frozen and embedding applications it is theirs."""
    frozen = getattr(sys, "frozen", False)
    return not frozen and executable is not None and PYTHON.fullmatch(Path(executable).name) is not None
