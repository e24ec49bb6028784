"""The folder of this package in the user's cache, and stamps in it: files whose hash was computed before.

With a stamp, gigabytes are not hashed again at every load. A stamp is an empty file, named by a digest of the stamped
file's path, size, time of change and hash. A changed file has no stamp, unless its path, size and time are as before.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

# Two changes within the clock's resolution have the same time, so files younger than this are not stamped
SETTLED_NS = 2_000_000_000


def cache_folder() -> Path:
    """The folder for files that can be made again: PARD_ONNX_CACHE, or `pard-onnx` in the user's cache."""
    if folder := os.environ.get("PARD_ONNX_CACHE"):
        return Path(folder).expanduser()
    variable, usual = ("LOCALAPPDATA", "AppData/Local") if sys.platform == "win32" else ("XDG_CACHE_HOME", ".cache")
    base = os.environ.get(variable)
    return (Path(base) if base else Path.home() / usual) / "pard-onnx"


def is_stamped(path: Path, sha256: str) -> bool:
    """Whether `path`, unchanged since, was found to have this hash before."""
    try:
        return _stamp(path, sha256).is_file()
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return False


def stamp(path: Path, sha256: str) -> None:
    """Remember that `path`, as it is now, has this hash. A cache that cannot be written is no error."""
    with suppress(OSError, RuntimeError):
        if time.time_ns() - path.stat().st_mtime_ns < SETTLED_NS:
            return
        mark = _stamp(path, sha256)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def is_remembered(kind: str, digest: str) -> bool:
    """Whether something of this kind and digest was found to be right before."""
    try:
        return (cache_folder() / kind / digest).is_file()
    except (OSError, RuntimeError):  # as in `is_stamped`
        return False


def remember(kind: str, digest: str) -> None:
    """Remember that something of this kind and digest is right. A cache that cannot be written is no error."""
    with suppress(OSError, RuntimeError):
        mark = cache_folder() / kind / digest
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _stamp(path: Path, sha256: str) -> Path:
    facts = path.stat()
    key = f"{path.resolve()}\n{facts.st_size}\n{facts.st_mtime_ns}\n{sha256}"
    # surrogateescape: a POSIX path may hold bytes that are not UTF-8
    return cache_folder() / "stamps" / hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
