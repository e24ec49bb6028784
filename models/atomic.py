"""Files and folders that are written whole or not at all, also where the process is killed or the power fails.

What is written has a scratch name beside its place until it is complete and on the disk. Then one rename puts it there,
and its parent folder is written to the disk too. Scratch names, which `sweep` removes once their process has ended:

.pard-ID.partial  a file or folder that is not complete, or the folder that was replaced
.pard-ID.old      a folder whose place is being given to another, where the file system cannot exchange two names
.pard-ID.lock     a file that is locked while its process writes the folders of this ID; a partial file is locked itself

A lock ends with its process, however that ends. Names of other forms, names that are locked and names of other users
are never touched.

Linux and macOS exchange two folders in one step (ext4, xfs, btrfs, tmpfs, overlayfs, APFS). Windows and most network
file systems cannot: the old folder is renamed to `.old` and then the new one to its place. If the process is killed in
between, `recover` renames the old one back. The lock file holds its name.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from .system_errors import naming

SCRATCH = re.compile(r"\.pard-[0-9a-f]{16}\.(partial|old|lock)")
OLD = ".old"
END = b"\0"  # of the name in a lock file, which no name contains
WINDOWS = sys.platform == "win32"
OPEN = os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # of file systems without it
HELD = (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK, 0)  # by another process; 0 is Wine's number for it
BUSY = (5, 32)  # Windows' numbers of errors for what a process has open: access denied, sharing violation
BUSY_SECONDS, BUSY_PAUSE = 2.0, 0.02  # how long such a renaming is tried again, and the time between two attempts
SETTLING = 60.0  # seconds: on Windows a complete file is unlocked for a moment before it is renamed

if sys.platform == "win32":
    import msvcrt

    def _take_lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _take_lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def atomic_file(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A file to write, which replaces the file `path` if the body succeeds and is removed if it fails.

    mode: of the file, from which the process's umask is taken. Raises OSError, with `path` as its file.
    """
    with naming(path), _in_place(path):
        sweep(path.parent)
        descriptor, scratch = _locked_file(path.parent, ".partial", mode)
        file = os.fdopen(descriptor, "w+b")
        try:
            yield file
            file.flush()
            _sync(descriptor)
            if WINDOWS:  # which renames no open file
                file.close()
            _rename(scratch, path)
        except BaseException:
            with suppress(OSError):
                if WINDOWS:  # which removes no open file
                    file.close()
            with suppress(OSError):
                scratch.unlink()
            raise
        finally:
            with suppress(OSError):  # what could not be written is tried again here, and fails again
                file.close()
        sync_folder(path.parent)


@contextmanager
def atomic_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` if the body succeeds and is removed if it fails.

    Missing parents are made, and are removed if the body fails. replace: a folder that is there already is removed.
    Raises OSError, which names files by their later place; FileExistsError for a folder that is not to be replaced.
    """
    missing = [parent for parent in folder.parents if not parent.exists()]  # innermost first
    try:
        with _in_place(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            sweep(folder.parent)
            descriptor, lock = _locked_file(folder.parent, ".lock")
            partial = lock.with_suffix(".partial")
            try:
                partial.mkdir()
                yield partial
                _sync_tree(partial)
                with naming(folder):
                    _put(partial, folder, descriptor, replace=replace)
                for parent in (folder.parent, *(made.parent for made in missing)):
                    sync_folder(parent)
            finally:
                _settle(descriptor, lock)
    finally:
        for parent in missing:  # rmdir removes empty folders only
            with suppress(OSError):
                parent.rmdir()


def remove_folder(folder: Path) -> None:
    """Remove a folder with its files. It loses its name in one step; if the process is killed later, `sweep` deletes
    the rest. Links in it are removed, and what they lead to is not. Raises OSError."""
    with naming(folder), _in_place(folder):
        sweep(folder.parent)
        descriptor, lock = _locked_file(folder.parent, ".lock")
        try:
            _rename(folder, lock.with_suffix(".partial"))
            sync_folder(folder.parent)
        finally:
            _settle(descriptor, lock)


def put_folder(complete: Path, folder: Path) -> None:
    """Give the folder `complete`, which lies beside `folder`, the name of `folder`. A folder that has it is removed.

    All files of `complete` are written to the disk first. Raises OSError.
    """
    _sync_tree(complete)
    with naming(folder):
        if not os.path.lexists(folder):
            _rename(complete, folder)
        elif exchange(complete, folder):
            remove_folder(complete)
        else:
            remove_folder(folder)
            _rename(complete, folder)
        sync_folder(folder.parent)


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """The body runs while this process, and no other one, has the file `lock` locked; the file is removed afterwards.

    Raises BlockingIOError if another process or thread has it. On file systems without locks nothing is excluded.
    """
    while True:
        descriptor = os.open(lock, OPEN | os.O_CREAT, 0o600)
        if _lock(descriptor) is False:
            os.close(descriptor)
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), str(lock))
        if _has_name(descriptor, lock):
            break
        os.close(descriptor)  # who had it has removed the file, between the opening and the locking here
    try:
        yield
    finally:
        with suppress(OSError):  # on Windows, another process that tries to lock it
            _remove(descriptor, lock)


def recover(folder: Path) -> None:
    """Give `folder` its name back, where a process was killed while it replaced the folder."""
    if not os.path.lexists(folder):
        sweep(folder.parent)


def sweep(parent: Path) -> None:
    """Remove what ended processes have left in a folder; folders that they were replacing get their names back."""
    try:
        found = [path for path in parent.iterdir() if SCRATCH.fullmatch(path.name) and path.suffix != OLD]
    except (OSError, ValueError):  # no such folder; a null character
        return
    for path in found:
        with suppress(OSError):
            _sweep_one(path)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step. False where the system or the file system cannot do it: nothing has changed."""
    call = _exchange_call()
    return call is not None and call(os.fsencode(first), os.fsencode(second)) == 0


def sync_folder(folder: Path) -> None:
    """Write a folder's names to the disk. Windows has no such call: NTFS keeps a log of its names."""
    if not WINDOWS:
        _sync_path(folder)


def _exchange_call() -> Callable[[bytes, bytes], int] | None:
    if WINDOWS:
        return None
    libc: Any = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        here, flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return lambda first, second: int(libc.renameat2(here, first, here, second, flag))
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return lambda first, second: int(libc.renamex_np(first, second, 2))  # RENAME_SWAP
    return None


def _locked_file(parent: Path, suffix: str, mode: int = 0o666) -> tuple[int, Path]:
    """A new scratch file that this process has locked: its descriptor and its path."""
    while True:
        path = parent / f".pard-{uuid4().hex[:16]}{suffix}"
        descriptor = os.open(path, OPEN | os.O_CREAT | os.O_EXCL, mode)
        try:
            if _lock(descriptor) is not False and _has_name(descriptor, path):
                return descriptor, path
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # another process's sweep removed the file before it was locked


def _lock(descriptor: int) -> bool | None:
    """Whether this process has the file locked; None on a file system without locks, where nothing is swept."""
    try:
        _take_lock(descriptor)
    except OSError as error:
        return False if error.errno in HELD else None
    return True


def _has_name(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sweep_one(path: Path) -> None:
    """Remove one scratch file, and the folders of a lock file, if no process has it locked."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or (hasattr(os, "geteuid") and found.st_uid != os.geteuid()):
        return
    partial = path.suffix == ".partial"
    if WINDOWS and partial and time.time() - found.st_mtime < SETTLING:
        return
    descriptor = os.open(path, OPEN)
    if not (_lock(descriptor) and _has_name(descriptor, path)):
        os.close(descriptor)
    elif partial:
        _remove(descriptor, path)
    else:
        _settle(descriptor, path)


def _settle(descriptor: int, lock: Path) -> None:
    """End the writing of a folder, complete or not: a replaced folder without a successor gets its name back, and all
    scratch names go. The lock file stays while one of them cannot be removed, for a later sweep."""
    partial, old = lock.with_suffix(".partial"), lock.with_suffix(OLD)
    try:
        if old.is_dir():
            folder = lock.with_name(_read_name(descriptor))
            if not os.path.lexists(folder):
                _rename(old, folder)
                sync_folder(lock.parent)
        for path in (old, partial):
            shutil.rmtree(path, ignore_errors=True)
        if any(os.path.lexists(path) for path in (old, partial)):
            os.close(descriptor)
        else:
            _remove(descriptor, lock)
    except (OSError, ValueError):  # the replaced folder keeps its scratch name, and the lock file names it
        with suppress(OSError):
            os.close(descriptor)


def _read_name(lock: int) -> str:
    """The name of a folder, which `_put` wrote to a lock file; ValueError for anything else."""
    os.lseek(lock, 0, os.SEEK_SET)
    name, end, rest = os.read(lock, 4096).partition(END)
    if not end or rest or name in (b".", b".."):
        raise ValueError(name)
    return os.fsdecode(name)


def _remove(descriptor: int, path: Path) -> None:
    """Remove a locked file and unlock it; in this order, but for Windows, which removes no open file."""
    try:
        if not WINDOWS:
            path.unlink()
    finally:
        os.close(descriptor)
    if WINDOWS:
        path.unlink()


def _put(partial: Path, folder: Path, lock: int, *, replace: bool) -> None:
    """Rename a complete folder to its place. A folder that it replaces has a scratch name afterwards."""
    if not os.path.lexists(folder):
        try:
            _rename(partial, folder)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder)) from None
            raise
        return
    if not replace:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
    if exchange(partial, folder):
        return
    name = os.fsencode(folder.name) + END
    while name:
        name = name[os.write(lock, name) :]
    _sync(lock)
    sync_folder(folder.parent)  # the lock file's name too, before it is needed
    _rename(folder, partial.with_suffix(OLD))
    _rename(partial, folder)


def _rename(old: Path, new: Path) -> None:
    """Rename a file, which may replace another one, or a folder, which may not.

    Windows refuses this while a process has the file, or one in the folder, open. Virus scanners and indexers do so for
    a moment after a file was written, and readers of a file while they read: the renaming is tried again for a moment.
    """
    end = time.monotonic() + (BUSY_SECONDS if WINDOWS else 0.0)
    is_folder = old.is_dir()
    while True:
        try:
            old.rename(new) if is_folder else old.replace(new)
            return
        except OSError as error:
            if getattr(error, "winerror", None) not in BUSY or time.monotonic() > end:
                raise
        time.sleep(BUSY_PAUSE)


def _sync(descriptor: int) -> None:
    """Write a file to the disk itself, not only to the disk's own cache."""
    try:
        if sys.platform == "darwin":
            with suppress(OSError):
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
                return
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def _sync_path(path: Path) -> None:
    try:
        # Windows writes a file to the disk only for who may change it
        descriptor = os.open(path, OPEN if WINDOWS else os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except PermissionError:  # it cannot be read, so is none that was written here
        return
    try:
        with naming(path):
            _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    """Write all files and folders in a folder, and its own names, to the disk."""
    for path in folder.iterdir():
        if path.is_symlink():
            continue
        if path.is_dir():
            _sync_tree(path)
        elif path.is_file():
            _sync_path(path)
    sync_folder(folder)


@contextmanager
def _in_place(place: Path) -> Iterator[None]:
    """Errors of scratch files name the later places of these files: `place`, or files in it."""
    try:
        yield
    except OSError as error:
        for name in (error.filename, error.filename2):  # the second is what a file is copied or linked to
            parts = Path(os.fsdecode(name)).parts if isinstance(name, (str, bytes, os.PathLike)) else ()
            found = [number for number, part in enumerate(parts) if SCRATCH.fullmatch(part)]
            if found:
                error.filename, error.filename2 = str(place.joinpath(*parts[found[-1] + 1 :])), None
                break
        raise
