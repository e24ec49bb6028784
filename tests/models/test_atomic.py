"""Files and folders that are written whole or not at all; what is swept, and what never is."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from pard_onnx.models import atomic
from pard_onnx.models.atomic import atomic_file, atomic_folder, exchange, recover, sweep

ID = "0123456789abcdef"
linux = pytest.mark.skipif(sys.platform != "linux", reason="what the file systems of other systems can do differs")
# A process that is in the middle of the writing when it is stopped
WRITER = """
import sys
from pathlib import Path
from pard_onnx.models import atomic
kind, place, aside = sys.argv[1:]
def wait(*_):
    print("waiting", flush=True)
    sys.stdin.read()
if aside == "aside":
    atomic.exchange = lambda first, second: False
    rename = Path.rename
    Path.rename = lambda path, target: wait() if path.suffix == ".partial" else rename(path, target)
place = Path(place)
if kind == "file":
    with atomic.atomic_file(place) as file:
        file.write(b"half")
        file.flush()
        wait()
else:
    with atomic.atomic_folder(place, replace=True) as folder:
        (folder / "new").write_text("new")
        aside == "aside" or wait()
"""


@pytest.fixture
def writer() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """writer("file" | "folder", path, aside=False): a process that writes there and waits before it has finished."""
    started: list[subprocess.Popen[str]] = []

    def start(kind: str, place: Path, *, aside: bool = False) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WRITER, kind, str(place), "aside" if aside else "exchange"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout and process.stdout.readline() == "waiting\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def folder_with(place: Path, *files: str) -> Path:
    place.mkdir()
    for name in files:
        (place / name).write_text(name)
    return place


def test_a_file_is_the_old_one_until_it_is_whole(tmp_path: Path) -> None:
    place = tmp_path / "ä file"
    place.write_text("old")
    with atomic_file(place) as file:
        file.write(b"new")
        file.flush()
        assert place.read_text() == "old" and len(names(tmp_path)) == 2
    assert place.read_text() == "new" and names(tmp_path) == ["ä file"]


def test_a_folder_is_the_old_one_until_it_is_whole(tmp_path: Path) -> None:
    place = folder_with(tmp_path / "out", "old")
    with atomic_folder(place, replace=True) as partial:
        (partial / "new").write_text("new")
        assert names(place) == ["old"]
    assert names(place) == ["new"] and names(tmp_path) == ["out"]


@pytest.mark.parametrize("write", [atomic_file, lambda place: atomic_folder(place, replace=True)])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), MemoryError()])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, write: Callable[[Path], AbstractContextManager[Any]], error: BaseException
) -> None:
    place = folder_with(tmp_path / "out", "old") / "old" if write is atomic_file else folder_with(tmp_path / "out")
    before = names(place.parent)
    with pytest.raises(type(error)), write(place):
        raise error
    assert names(place.parent) == before


def test_a_folder_that_is_not_to_be_replaced(tmp_path: Path) -> None:
    place = tmp_path / "a" / "out"
    with pytest.raises(FileExistsError), atomic_folder(place) as partial:
        (partial / "mine").touch()
        folder_with(place, "theirs")
    assert names(place) == ["theirs"] and names(place.parent) == ["out"]
    place.joinpath("theirs").unlink()
    with pytest.raises(FileExistsError), atomic_folder(place):
        pass


@linux
def test_folders_are_exchanged_in_one_step(tmp_path: Path) -> None:
    first, second = folder_with(tmp_path / "first", "1"), folder_with(tmp_path / "second", "2")
    assert exchange(first, second)
    assert names(first) == ["2"] and names(second) == ["1"]
    assert not exchange(first, tmp_path / "absent") and names(first) == ["2"]


@linux
@pytest.mark.parametrize("kind", ("file", "folder"))
def test_what_is_renamed_is_on_the_disk_before_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The order of calls: a power cut may come at any time."""
    calls: list[tuple[str, str]] = []
    sync, swap, replace = os.fsync, atomic.exchange, os.replace

    def name(descriptor: int) -> str:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        return "parent" if path == str(tmp_path) else Path(path).suffix or Path(path).name

    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(("sync", name(fd))), sync(fd))[1])
    monkeypatch.setattr(atomic, "exchange", lambda *both: (calls.append(("put", "")), swap(*both))[1])
    monkeypatch.setattr(Path, "replace", lambda *both: (calls.append(("put", "")), replace(*both))[1])
    if kind == "file":
        with atomic_file(tmp_path / "out") as file:
            file.write(b"new")
        assert calls == [("sync", ".partial"), ("put", ""), ("sync", "parent")]
        return
    with atomic_folder(folder_with(tmp_path / "out"), replace=True) as partial:
        folder_with(partial / "inner", "deep")
        (partial / "flat").touch()
    synced = [what for call, what in calls[: calls.index(("put", ""))]]
    assert sorted(synced[:-1]) == ["deep", "flat", "inner"] and synced[-1] == ".partial"
    assert synced.index("deep") < synced.index("inner")
    assert calls[-2:] == [("put", ""), ("sync", "parent")]


@pytest.mark.parametrize("kind", ("file", "folder"))
@pytest.mark.parametrize("next_kind", ("file", "folder"))
def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(
    tmp_path: Path, writer: Callable[..., subprocess.Popen[str]], kind: str, next_kind: str
) -> None:
    living = writer(kind, tmp_path / "living")
    with_living = names(tmp_path)
    dead = writer(kind, tmp_path / "dead")
    dead.kill()
    dead.wait()
    assert len(names(tmp_path)) == 2 * len(with_living)
    if next_kind == "file":
        with atomic_file(tmp_path / "next"):
            pass
    else:
        with atomic_folder(tmp_path / "next"):
            pass
    if atomic.WINDOWS and kind == "file":  # a file of less than a minute is left
        return
    assert names(tmp_path) == sorted([*with_living, "next"])
    living.communicate("go on")
    assert names(tmp_path) == ["living", "next"]


def test_the_sweep_of_the_writing_process_itself(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "one"), atomic_folder(tmp_path / "two"), atomic_folder(tmp_path / "three"):
        sweep(tmp_path)
    assert names(tmp_path) == ["one", "three", "two"]


@pytest.mark.parametrize("recovered_by", ("recover", "sweep", "atomic_folder"))
def test_a_folder_whose_replacement_was_killed_gets_its_name_back(
    tmp_path: Path, writer: Callable[..., subprocess.Popen[str]], recovered_by: str
) -> None:
    """On a file system that cannot exchange names, a kill between the two renames."""
    place = folder_with(tmp_path / ("out ü" if atomic.WINDOWS else "out\n ü\udcff"), "old")
    process = writer("folder", place, aside=True)
    assert not place.exists()
    recover(place)
    assert not place.exists()  # the process lives and is about to rename the new one
    process.kill()
    process.wait()
    if recovered_by == "recover":
        recover(place)
    elif recovered_by == "sweep":
        sweep(tmp_path)
    else:
        with atomic_folder(tmp_path / "next"):
            pass
        (tmp_path / "next").rmdir()
    assert names(place) == ["old"] and names(tmp_path) == [place.name]


@linux
@pytest.mark.parametrize("content", (b"", b"ou", b"../out\0", b"..\0", b"/etc\0", b"a\0b\0", b"out/\0", b"\0", b"a\0b"))
def test_a_lock_file_without_a_whole_name_moves_nothing(tmp_path: Path, content: bytes) -> None:
    """The replaced folder is what is valuable: it stays where the lock file does not say whose it is."""
    inner = folder_with(tmp_path / "inner")
    (inner / f".pard-{ID}.lock").write_bytes(content)
    folder_with(inner / f".pard-{ID}.old", "old")
    before = names(inner)
    sweep(inner)
    assert names(inner) == before and names(tmp_path) == ["inner"]


@linux
def test_strangers_are_never_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of other forms, of other kinds of files, and a user's own links."""
    elsewhere = folder_with(tmp_path / "elsewhere", "precious")
    room = folder_with(tmp_path / "room")
    for name in (".pard-1a2b3c4d.partial", f".pard-{ID}.tmp", f"pard-{ID}.partial", f".pard-{ID}.partial.txt", "x.tmp"):
        (room / name).write_text("mine")
    folder_with(room / ".pard-aaaaaaaaaaaaaaaa.partial", "mine")  # without a lock file
    folder_with(room / ".pard-bbbbbbbbbbbbbbbb.old", "mine")
    folder_with(room / ".pard-cccccccccccccccc.lock", "mine")
    (room / ".pard-dddddddddddddddd.partial").symlink_to(elsewhere / "precious")
    (room / ".pard-eeeeeeeeeeeeeeee.lock").symlink_to(elsewhere / "precious")
    os.mkfifo(room / ".pard-ffffffffffffffff.lock")
    before = names(room)
    sweep(room)
    assert names(room) == before and (elsewhere / "precious").read_text() == "precious"
    (room / ".pard-1111111111111111.partial").write_text("another user's")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    sweep(room)
    assert (room / ".pard-1111111111111111.partial").exists()
    monkeypatch.undo()
    sweep(room)
    assert names(room) == before


@linux
def test_links_to_other_folders_are_not_followed(tmp_path: Path) -> None:
    elsewhere = folder_with(tmp_path / "elsewhere", "precious")
    room = folder_with(tmp_path / "room", f".pard-{ID}.lock")
    (room / f".pard-{ID}.partial").symlink_to(elsewhere)
    sweep(room)
    assert names(elsewhere) == ["precious"]
    folder_with(room / ".pard-1111111111111111.partial")
    (room / ".pard-1111111111111111.partial" / "link").symlink_to(elsewhere)
    (room / ".pard-1111111111111111.lock").touch()
    sweep(room)
    assert names(elsewhere) == ["precious"] and ".pard-1111111111111111.lock" not in names(room)


@linux
def test_a_file_system_without_locks_is_written_and_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(atomic, "_take_lock", none)
    (tmp_path / f".pard-{ID}.partial").touch()
    with atomic_file(tmp_path / "file") as file, atomic_folder(tmp_path / "folder"):
        file.write(b"new")
    assert names(tmp_path) == [f".pard-{ID}.partial", "file", "folder"]


@linux
def test_a_sweep_between_the_making_and_the_locking_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take, taken = atomic._take_lock, []

    def swept_first(descriptor: int) -> None:
        taken.append(descriptor)
        if len(taken) == 1:
            monkeypatch.setattr(atomic, "_take_lock", take)
            sweep(tmp_path)
            monkeypatch.setattr(atomic, "_take_lock", swept_first)
        take(descriptor)

    monkeypatch.setattr(atomic, "_take_lock", swept_first)
    with atomic_file(tmp_path / "file") as file:
        file.write(b"new")
    assert len(taken) == 2 and names(tmp_path) == ["file"]


def test_errors_name_the_place_and_never_a_scratch_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as missing, atomic_folder(tmp_path / "out") as partial:
        (partial / "inner" / "file").write_text("no such folder")
    assert missing.value.filename == str(tmp_path / "out" / "inner" / "file")
    (tmp_path / "plain").touch()
    with pytest.raises(OSError) as blocked, atomic_file(tmp_path / "plain" / "file"):
        pass
    assert blocked.value.filename == str(tmp_path / "plain" / "file")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as unnamed, atomic_file(tmp_path / "file"):
        pass
    assert unnamed.value.filename == str(tmp_path / "file")
    with pytest.raises(OSError) as synced, atomic_folder(tmp_path / "out") as partial:
        (partial / "file").touch()
    assert synced.value.filename == str(tmp_path / "out" / "file")
    monkeypatch.undo()

    def fail(path: Path, target: Path) -> None:
        raise OSError(errno.EIO, "bad", str(path), None, str(target))

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError) as nested, atomic_folder(tmp_path / "out") as partial, atomic_file(partial / "file"):
        pass
    assert nested.value.filename == str(tmp_path / "out" / "file")
    assert names(tmp_path) == ["plain"]


def test_a_folder_that_cannot_be_removed_is_swept_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder_with(tmp_path / "out", "old")
    with monkeypatch.context() as patch:
        patch.setattr(atomic.shutil, "rmtree", lambda *_, **__: None)
        with atomic_folder(place, replace=True) as partial:
            (partial / "new").touch()
    assert names(place) == ["new"] and len(names(tmp_path)) == 3
    with atomic_file(tmp_path / "file"):
        pass
    assert names(tmp_path) == ["file", "out"]


@pytest.fixture
def as_on_windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Files that this process has open are neither removed nor renamed, nor is what holds them. Yields what was."""
    refused: list[str] = []

    def guard(name: str) -> None:
        call = getattr(Path, name)

        def guarded(path: Path, *arguments: Any, **named: Any) -> Any:
            opened = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if os.path.lexists(link)]
            if any(Path(one).is_relative_to(path.resolve()) for one in opened if one.startswith("/")):
                refused.append(f"{name} {path.name}")
                raise sharing_violation()
            return call(path, *arguments, **named)

        monkeypatch.setattr(Path, name, guarded)

    for name in ("unlink", "rename", "replace", "rmdir"):
        guard(name)
    monkeypatch.setattr(atomic, "WINDOWS", True)
    return refused


def sharing_violation() -> PermissionError:
    error = PermissionError(errno.EACCES, "The process cannot access the file because it is being used")
    error.winerror = 32  # type: ignore[attr-defined,unused-ignore]
    return error


@linux
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder", "exclusive", "removed"])
def test_windows_removes_and_renames_no_open_file(
    tmp_path: Path, as_on_windows: list[str], kind: str, fails: bool
) -> None:
    place = tmp_path / "out"
    old = folder_with(place, "old") if kind in ("folder", "removed") else place
    contexts: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "file": lambda: atomic_file(place),
        "folder": lambda: atomic_folder(place, replace=True),
        "exclusive": lambda: atomic.exclusive(place),
        "removed": nullcontext,
    }
    with suppress(ZeroDivisionError), contexts[kind]():
        if kind == "removed":
            atomic.remove_folder(old)
        if fails:
            raise ZeroDivisionError
    assert not as_on_windows
    assert names(tmp_path) == (["out"] if kind == "folder" or (kind == "file" and not fails) else [])


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_windows_renames_what_is_in_use_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    refusals = iter([sharing_violation(), sharing_violation()])

    def busy(call: Callable[..., Path]) -> Callable[..., Path]:
        def renamed(path: Path, target: Path) -> Path:
            if path.suffix == ".partial" and (error := next(refusals, None)):
                raise error
            return call(path, target)

        return renamed

    monkeypatch.setattr(Path, "rename", busy(Path.rename))
    monkeypatch.setattr(Path, "replace", busy(Path.replace))
    monkeypatch.setattr(atomic, "WINDOWS", True)
    if kind == "file":
        with atomic_file(tmp_path / "out") as file:
            file.write(b"new")
    else:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "new").touch()
    assert names(tmp_path) == ["out"] and next(refusals, None) is None


@pytest.mark.parametrize("windows", sorted({True, atomic.WINDOWS}))
def test_what_stays_in_use_is_an_error_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, windows: bool
) -> None:
    def refuse(path: Path, target: Path) -> Path:
        raise sharing_violation()

    (tmp_path / "out").write_text("old")
    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(atomic, "WINDOWS", windows)
    monkeypatch.setattr(atomic, "BUSY_SECONDS", 0.05)
    with pytest.raises(PermissionError), atomic_file(tmp_path / "out") as file:
        file.write(b"new")
    assert (tmp_path / "out").read_text() == "old" and names(tmp_path) == ["out"]
