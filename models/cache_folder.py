"""The folder of this package in the user's cache, and stamps in it: files whose hash was computed before.

What is kept there is believed when it is read again, so only the user's own files count: a folder or a file that
belongs to another user, or that others can write, is ignored (not on Windows, where the cache lies in the user's
profile). Folders are made with mode 0700, files with 0600.

With a stamp, gigabytes are not hashed again at every load. A stamp is an empty file, named by a digest of the stamped
file's path, size, inode, times of change and hash, so that a changed file has no stamp.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from .atomic import atomic_file
from .errors import PardWarning

# Two changes within the clock's resolution have the same time, so files younger than this are not stamped
SETTLED_NS = 2_000_000_000
STAMPS = "stamps"


def cache_folder() -> Path:
    """The folder for files that can be made again: PARD_ONNX_CACHE, or `pard-onnx` in the user's cache."""
    if folder := os.environ.get("PARD_ONNX_CACHE"):
        return Path(folder).expanduser()
    variable, usual = ("LOCALAPPDATA", "AppData/Local") if sys.platform == "win32" else ("XDG_CACHE_HOME", ".cache")
    base = os.environ.get(variable)
    return (Path(base) if base else Path.home() / usual) / "pard-onnx"


def made_cache_folder() -> Path:
    """As `cache_folder`; made now, for this user alone, if it is missing and can be made."""
    folder = cache_folder()
    with suppress(OSError, ValueError):  # ValueError: a null character
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@contextmanager
def made_private() -> Iterator[None]:
    """If the body, another library's code, makes the cache folder, it is for this user alone afterwards."""
    folder = cache_folder()
    missing = not folder.exists()
    try:
        yield
    finally:
        if missing:
            with suppress(OSError):  # nor made now
                folder.chmod(0o700)


def private_folder(name: str) -> Path | None:
    """The folder `name` in the cache folder, made if it is missing; None if it cannot be made or is not to be trusted.

    PardWarning, once in a process, where it is not to be trusted.
    """
    try:
        folder = made_cache_folder() / name
        folder.mkdir(mode=0o700, exist_ok=True)
        for one in (folder.parent, folder):
            if problem := distrust(one.stat()):
                _warn_once(one, problem)
                return None
    except (OSError, RuntimeError, ValueError):  # RuntimeError: no home folder; ValueError: a null character
        return None
    return folder


def distrust(facts: os.stat_result, *, of_root: bool = False) -> str | None:
    """Why a folder or file with these facts may hold what others wrote; None where only this user can write it.

    of_root: whether it may also belong to root, who can write everything in any case.
    """
    if sys.platform == "win32":  # where folders of a user are the user's own by their access lists
        return None
    if facts.st_uid != os.geteuid() and not (of_root and facts.st_uid == 0):
        return f"belongs to another user (id {facts.st_uid})"
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written by other users"
    return None


@cache
def _warn_once(folder: Path, problem: str) -> None:
    warnings.warn(
        f"{folder} {problem}, so what is kept there is ignored, and models load slower; run chmod 700 on a folder of "
        "your own, or name another one in PARD_ONNX_CACHE",
        PardWarning,
        stacklevel=2,
    )


def read_private(path: Path, most: int) -> bytes:
    """The content of a plain file of at most `most` bytes that only this user can write; OSError for any other file."""
    # O_NONBLOCK: a FIFO would block until somebody writes to it
    number = os.open(path, os.O_RDONLY | sum(getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_NOFOLLOW", "O_BINARY")))
    try:
        facts = os.fstat(number)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > most or distrust(facts):
            raise OSError(f"{path}: is no file of this package's cache")
        with open(number, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(number)


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only this user can read, as a whole: readers see the old content or the new one."""
    with atomic_file(path, mode=0o600) as file:
        file.write(content)


def is_stamped(path: Path, sha256: str) -> bool:
    """Whether `path`, unchanged since, was found to have this hash before."""
    try:
        return is_remembered(STAMPS, _stamp(path, sha256))
    except (OSError, RuntimeError):  # RuntimeError: a loop of links
        return False


def stamp(path: Path, sha256: str) -> None:
    """Remember that `path`, as it is now, has this hash. A cache that cannot be written is no error."""
    with suppress(OSError, RuntimeError):
        if time.time_ns() - path.stat().st_mtime_ns < SETTLED_NS:
            return
        remember(STAMPS, _stamp(path, sha256))


def is_remembered(kind: str, digest: str) -> bool:
    """Whether something of this kind and digest was found to be right before."""
    folder = private_folder(kind)
    try:
        mark = folder and (folder / digest).lstat()
    except OSError:
        return False
    return bool(mark and stat.S_ISREG(mark.st_mode) and not distrust(mark))


def remember(kind: str, digest: str) -> None:
    """Remember that something of this kind and digest is right. A cache that cannot be written is no error."""
    with suppress(OSError):
        if folder := private_folder(kind):
            write_private(folder / digest, b"")


def _stamp(path: Path, sha256: str) -> str:
    """The name of the stamp."""
    facts = path.stat()
    # Another file with the same size and time of change has another inode, or was changed in its status
    marks = facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino, sha256
    key = "\n".join(map(str, (path.resolve(), *marks)))
    # surrogateescape: a POSIX path may hold bytes that are not UTF-8
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
