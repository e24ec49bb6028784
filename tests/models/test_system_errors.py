"""Errors of the system in one line: full disks and limits name the file, memory is no bug to report."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pard_onnx import BadInput, Failure, load
from pard_onnx.cli import exit_code
from pard_onnx.export.exporter import export
from pard_onnx.export.job import Job
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.manifest import Source
from pard_onnx.models.system_errors import is_out_of_memory, naming, write_error

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limits")


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """In the body this process writes no file of more bytes."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("number", "kind", "advice"),
    [
        (errno.ENOSPC, Failure, "free some space, or choose another place"),
        (errno.EDQUOT, Failure, "ask for a larger quota, or choose another place"),
        (errno.EFBIG, Failure, r"\(ulimit -f\) or take a file system that has larger files, or choose another place"),
        (errno.EIO, Failure, "check the disk, or choose another place"),
        (errno.EROFS, BadInput, "Read-only file system; choose another place"),
        (errno.EACCES, BadInput, "Permission denied; choose another place"),
        (errno.ENAMETOOLONG, BadInput, "File name too long; choose another place"),
    ],
)
def test_what_cannot_be_written(number: int, kind: type[Exception], advice: str) -> None:
    error = write_error("a/file", OSError(number, os.strerror(number)), "choose another place")
    assert type(error) is kind
    with pytest.raises(kind, match=f"^a/file: cannot be written: .*{advice}$"):
        raise error


@pytest.mark.parametrize("number", [32, 33, 1224])
def test_what_a_program_uses_on_windows(number: int) -> None:
    error = OSError(errno.EACCES, "used by another process")
    error.winerror = number  # type: ignore[attr-defined,unused-ignore]
    with pytest.raises(BadInput, match=r"close the programs that use it, or choose another place$"):
        raise write_error("a/file", error, "choose another place")


def test_a_small_paging_file_on_windows_is_a_lack_of_memory() -> None:
    error = OSError(errno.EINVAL, "The paging file is too small for this operation to complete")
    error.winerror = 1455  # type: ignore[attr-defined,unused-ignore]
    assert is_out_of_memory(error)


def test_errors_of_writing_get_the_name_of_the_file() -> None:
    with pytest.raises(OSError) as found, naming("here"):
        raise OSError(errno.ENOSPC, "full")
    assert found.value.filename == "here"
    with pytest.raises(FileNotFoundError) as known, naming("here"):
        Path("absent").read_bytes()
    assert known.value.filename == "absent"


@posix
def test_a_limit_on_the_size_of_files_names_the_file(tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny(tmp_path / "model", layers=1))
    job = Job(checkpoint, Source("tiny"), tmp_path / "out", "fp32", verify=False)
    problem = r"out/model\.onnx\.data: cannot be written: File too large; raise the limit .*\(ulimit -f\)"
    export(job)
    before = {path.name: path.read_bytes() for path in job.output.iterdir()}
    with pytest.raises(Failure, match=problem), small_files(60_000):
        export(replace(job, force=True))
    assert {path.name: path.read_bytes() for path in job.output.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


@posix
def test_a_chat_that_is_too_large_names_the_file(pair_folders: tuple[Path, Path], tmp_path: Path) -> None:
    with load(pair_folders[0], threads=1) as pair:
        chat = pair.chat("be brief")
        chat.send("the quick fox", max_new_tokens=4)
        chat.save(tmp_path / "chat")
        before = (tmp_path / "chat").read_bytes()
        problem = "chat: cannot be written: File too large; raise the limit"
        with pytest.raises(BadInput, match=problem), small_files(500):
            chat.save(tmp_path / "chat")
    assert (tmp_path / "chat").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def no_array() -> None:
    np.ones(1 << 50)


def no_tensor() -> None:
    import torch

    torch.empty(1 << 50)


def no_bytes() -> None:
    bytes(1 << 60)


def no_trace() -> None:
    try:
        no_bytes()
    except MemoryError as error:
        raise ValueError("the model cannot be traced; please report this model") from error


def no_mapping() -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory", "model.safetensors")


def no_more() -> None:
    raise RuntimeError("onnxruntime/core/framework: std::bad_alloc\nmore")


@pytest.mark.parametrize("take", (no_array, no_tensor, no_bytes, no_trace, no_mapping, no_more))
def test_memory_that_there_is_not_is_one_line(take: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> None:
    """The libraries' own errors."""
    assert exit_code(take) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: not enough memory") and err.count("\n") == 1 and len(err) < 300
    assert "please report" not in err and "take a smaller model" in err


@pytest.mark.parametrize("text", ("out of range", "a memory of Rome", ""))
def test_other_errors_are_not_about_memory(text: str) -> None:
    assert not is_out_of_memory(RuntimeError(text))


def test_errors_of_files_say_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "the/file")

    assert exit_code(fail) == 1
    assert capsys.readouterr().err == f"error: {Path('the/file')}: No space left on device; free some space\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "code",
    [
        "from pard_onnx.cli import exit_code; sys.exit(exit_code(lambda: print('text')))",
        "from pard_onnx.cli import exit_code; sys.exit(exit_code(lambda: print('text' * 100_000)))",
        "from rich.console import Console; from pard_onnx.cli import exit_code\n"
        "sys.exit(exit_code(lambda: Console().print('text')))",
        "sys.argv[1:] = ['--help']; from pard_onnx.entry_points import generate; generate()",
    ],
    ids=["short", "long", "rich", "help"],
)
def test_an_output_that_is_full(code: str, unbuffered: str) -> None:
    code = f"import sys\n{code}"
    with Path("/dev/full").open("w") as full:
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, env=environment
        )
    assert (done.returncode, done.stderr) == (
        1,
        "error: standard output: No space left on device; free some space\n",
    )
