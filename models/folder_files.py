"""Files of a folder that may come from a stranger: plain names, regular files, and nothing outside the folder.

A link to a FIFO or a device would keep a reader waiting, and a link to a private file would copy that file into an
export. Links are followed within the folder, and from a snapshot of the Hugging Face cache to its repository's blobs.
"""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

from .errors import BadInput

LONGEST_NAME = 255  # bytes; the limit of most file systems
# Devices of Windows, in every folder and with any ending; superscript digits count as digits
DEVICES = frozenset(
    (
        "CON",
        "PRN",
        "AUX",
        "NUL",
        "CONIN$",
        "CONOUT$",
        *(f"{kind}{n}" for kind in ("COM", "LPT") for n in "123456789¹²³"),
    )
)
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
READ_BY_EXPORTS = frozenset((".json", ".safetensors", ".jinja", ".txt", ".model"))  # by this package and transformers
SHIPPED = Path(__file__).parent / "demo"  # installers may make links of a package's files
# Without O_NONBLOCK, a FIFO that replaces the file after the check would keep `open` waiting
FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def is_plain_name(name: str) -> bool:
    """Whether `name` is, on every system, the name of a file beside another one: no path, stream or device."""
    if any(character in '/\\:"<>|?*' or character < " " or "\ud800" <= character <= "\udfff" for character in name):
        return False
    fits = 0 < len(name.encode()) <= LONGEST_NAME and name[-1] not in " ."
    return fits and name.partition(".")[0].rstrip(" ").upper() not in DEVICES


def file_facts(path: Path, error: type[BadInput]) -> os.stat_result:
    """What the system knows of a file in a folder, which is not opened; links are followed.

    Raises `error` where nothing is there, for anything but a regular file, and for a link that leaves the folder.
    """
    try:
        facts = path.stat()
        is_link = path.is_symlink()
    except FileNotFoundError:
        dangling = os.path.lexists(path)
        raise error(f"{path}: is a link to nothing" if dangling else f"{path.parent}: no {path.name}") from None
    except (OSError, ValueError) as problem:  # ValueError: a name that no file can have
        raise error(f"{path}: cannot be read: {getattr(problem, 'strerror', None) or problem}") from None
    if not stat.S_ISREG(facts.st_mode):
        kind = next((name for is_kind, name in KINDS if is_kind(facts.st_mode)), "something else")
        raise error(f"{path}: is {kind} where a file should be; remove it, or fetch the folder again")
    if is_link and not _stays_inside(path):
        raise error(
            f"{path}: is a link to {path.resolve()}, outside its folder; put the file itself in its place (cp -L)"
        )
    return facts


def has_file(path: Path, error: type[BadInput]) -> bool:
    """Whether the file is there. Raises `error` where something else is there, as `file_facts`."""
    return os.path.lexists(path) and bool(file_facts(path, error))


def open_file(path: Path, error: type[BadInput]) -> BufferedReader:
    """A file of a folder, opened for reading. Raises `error` as `file_facts`, or if it cannot be opened."""
    checked = file_facts(path, error)
    try:
        stream = os.fdopen(os.open(path, FLAGS), "rb")
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from problem
    if not os.path.samestat(checked, os.fstat(stream.fileno())):
        stream.close()
        raise error(f"{path}: was replaced by another file while it was read; try again")
    return stream


def read_file(path: Path, most: int, error: type[BadInput]) -> bytes:
    """All bytes of a file of a folder. Raises `error` as `open_file`, and for a file of more than `most` bytes."""
    with open_file(path, error) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise error(f"{path}: has {size} bytes; at most {most} are read: it is damaged, fetch it again")
        try:
            return stream.read(size)
        except OSError as problem:
            raise error(f"{path}: cannot be read: {problem.strerror}") from problem


def require_files(folder: Path, error: type[BadInput]) -> None:
    """Raise `error` unless all that an export may read in a checkpoint's folder are files, as `file_facts` says."""
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in READ_BY_EXPORTS:
            file_facts(path, error)


def _stays_inside(path: Path) -> bool:
    """Whether what a link leads to lies in the link's folder, or in the blobs of the same repository in the cache."""
    folder, found = path.parent.resolve(), path.resolve()
    roots = [folder]
    snapshots = next((parent for parent in (*folder.parents,)[:2] if parent.name == "snapshots"), None)
    if snapshots:  # of a folder in a snapshot, too
        blobs = snapshots.parent / "blobs"  # the folder itself: a link there could lead anywhere
        roots += [] if blobs.is_symlink() else [blobs]
    return any(found.is_relative_to(root) for root in roots) or path.parent.is_relative_to(SHIPPED)
