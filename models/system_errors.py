"""Errors of the operating system in one line: full disks, limits, memory; what to do about each, in a table."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

from .errors import BadInput, Failure, PardError

# What stops the writing of a correct name. The exit code is 1; other errors are errors of the name, with exit code 2
STOPS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space or ask for a larger quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) or take a file system that has larger files",
    errno.EIO: "check the disk",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs",
}
# The same by Windows' own numbers, of errors that have no errno of their own
WINDOWS_ADVICE = {
    32: "close the programs that use it",  # ERROR_SHARING_VIOLATION
    33: "close the programs that use it",  # ERROR_LOCK_VIOLATION
    206: "take a shorter path, or enable long paths in Windows",  # ERROR_FILENAME_EXCED_RANGE
    1224: "close the programs that use it",  # ERROR_USER_MAPPED_FILE
}
NO_COMMIT = 1455  # ERROR_COMMITMENT_LIMIT: Windows' paging file is too small
DETAIL = 160  # characters of a library's own words
# What torch, ONNX Runtime, numpy, Python's threads, the loader of libraries, CUDA, HIP, Direct3D and Dawn report
MEMORY = re.compile(
    r"out of memory|outofmemory|failed to allocate|unable to allocate|can't allocate|cannot allocate memory"
    r"|bad[_ ]alloc|not enough memory|can't start new thread|failed to map segment|8007000e",
    re.IGNORECASE,
)


def write_error(path: str | os.PathLike[str], error: Exception, elsewhere: str) -> PardError:
    """The error for a file or folder that cannot be written: Failure where the disk stops it, else BadInput.

    elsewhere: how the user names another place, such as "choose another --output".
    """
    kind = Failure if isinstance(error, OSError) and error.errno in STOPS else BadInput
    return kind(write_problem(path, error, elsewhere))


def write_problem(path: str | os.PathLike[str], error: Exception, elsewhere: str) -> str:
    """What could not be written, why, and what to do."""
    advice = _advice(error)
    return f"{os.fspath(path)}: cannot be written: {reason(error)}; " + (f"{advice}, or " if advice else "") + elsewhere


def os_error_line(error: OSError) -> str:
    """The error with its file and, if it is a known one, what to do."""
    advice = _advice(error)
    place = f"{Path(os.fsdecode(error.filename))}: " if isinstance(error.filename, (str, bytes)) else ""
    return f"{place}{reason(error)}" + (f"; {advice}" if advice else "")


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the body that name no file, as those of `write`, name this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


def reason(error: Exception) -> str:
    """The error in words, without its number and file."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory left, of this machine or of a device, by the error or by one that led to it."""
    return _memory_error(error) is not None


def out_of_memory(error: BaseException) -> Failure:
    """The error for a user whose machine, or whose limit, has no memory left."""
    detail = " ".join(str(_memory_error(error) or "").split())
    found = f" ({shorten(detail, DETAIL, placeholder=' ...')})" if detail else ""
    return Failure(
        f"not enough memory{found}; close other programs, raise the limit (ulimit -v), or take a smaller model"
    )


def _advice(error: Exception) -> str | None:
    """What to do about a known error of the system."""
    if not isinstance(error, OSError):
        return None
    return STOPS.get(error.errno or 0) or WINDOWS_ADVICE.get(getattr(error, "winerror", None) or 0)


def _memory_error(error: BaseException | None) -> BaseException | None:
    """The error, or the nearest of those that it was raised for, that says that memory ran out."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "winerror", None) == NO_COMMIT:
            return error
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return error
        if MEMORY.search(str(error)):
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None
