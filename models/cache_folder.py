"""The folder of this package in the user's cache, and stamps in it: files whose hash was computed before.

With a stamp, gigabytes are not hashed again at every load. A stamp is an empty file, named by a digest of the stamped
file's path, size, inode, times of change and hash, so that a changed file has no stamp.
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


def _stamp(path: Path, sha256: str) -> Path:
    facts = path.stat()
    # Another file with the same size and time of change has another inode, or was changed in its status
    marks = facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino, sha256
    key = "\n".join(map(str, (path.resolve(), *marks)))
    # surrogateescape: a POSIX path may hold bytes that are not UTF-8
    return cache_folder() / "stamps" / hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
