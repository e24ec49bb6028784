"""Output folders: what is refused, what is replaced, and what a failed export leaves behind."""

import errno
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pard_onnx.export.exporter import Job, export
from pard_onnx.export.output import checked_output_folder, replacing
from pard_onnx.models import atomic
from pard_onnx.models.errors import BadInput, Failure

Tiny = Callable[..., Path]
Left = Callable[[Job], list[str]]


def test_an_export_is_replaced_only_by_force(job: Job, left: Left) -> None:
    export(job)
    before = (job.output / "pard_onnx.json").read_bytes()
    with pytest.raises(BadInput, match="exists already"):
        export(job)
    export(replace(job, force=True, precision="fp32"))
    assert (job.output / "pard_onnx.json").read_bytes() != before
    assert left(job) == [job.output.name]


@pytest.mark.parametrize(
    "files", (["mine.txt"], ["config.json"], ["pard_onnx.json", "mine.txt"], ["pard_onnx.json", "a/b"])
)
def test_force_replaces_nothing_but_exports(job: Job, files: list[str], left: Left) -> None:
    for name in files:
        (job.output / name).parent.mkdir(parents=True, exist_ok=True)
        (job.output / name).write_text("mine")
    with pytest.raises(BadInput, match=f"holds {Path(files[-1]).parts[0]}, which is not an export's"):
        export(replace(job, force=True))
    assert [(job.output / name).read_text() for name in files] == ["mine"] * len(files)
    assert left(job) == [job.output.name]


@pytest.mark.parametrize("output", (".", "..", "nested/.."))
@pytest.mark.parametrize("force", (True, False))
def test_the_checkpoint_is_never_replaced(job: Job, output: str, force: bool) -> None:
    folder = job.checkpoint.folder
    before = sorted(folder.iterdir())
    with pytest.raises(BadInput, match="holds the checkpoint itself"):
        export(replace(job, output=folder / output, force=force))
    assert sorted(folder.iterdir()) == before


def test_a_file_is_not_replaced(job: Job, left: Left) -> None:
    job.output.write_text("mine")
    with pytest.raises(BadInput, match="is a file"):
        export(replace(job, force=True))
    assert job.output.read_text() == "mine" and left(job) == [job.output.name]


def test_an_output_that_cannot_be_made_is_bad_input(job: Job, left: Left) -> None:
    job.output.write_text("a file, so no folder to put anything in")
    with pytest.raises(BadInput, match="choose another --output"):
        export(replace(job, output=job.output / "deep" / "out"))
    with pytest.raises(BadInput, match="choose another --output"):
        export(replace(job, output=job.output.with_name("x" * 5000)))
    assert left(job) == [job.output.name]


def test_the_longest_name_there_is(job: Job, left: Left) -> None:
    output = job.output.with_name("o" * 255)
    with replacing(output, force=False) as folder:
        (folder / "made").touch()
    assert left(job) == [output.name]


def test_a_home_folder_is_understood(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    assert checked_output_folder(Path("~/out"), job.checkpoint.folder, force=False) == (tmp_path / "out").resolve()


def test_a_folder_made_meanwhile_is_kept(job: Job, left: Left) -> None:
    """Two exports to one place: the second to finish fails, and neither is mixed with the other."""
    with pytest.raises(Failure, match="was made by someone else"), replacing(job.output, force=False):
        job.output.mkdir()
        (job.output / "theirs").touch()
    assert [path.name for path in job.output.iterdir()] == ["theirs"] and left(job) == [job.output.name]


def test_a_swap_that_fails_puts_the_old_folder_back(job: Job, monkeypatch: pytest.MonkeyPatch, left: Left) -> None:
    job.output.mkdir()
    (job.output / "old").touch()
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise PermissionError(errno.EACCES, "a virus scanner has a file of it open", str(path))
        return rename(path, target)

    monkeypatch.setattr(atomic, "exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", fail)
    problem = f"{re.escape(str(job.output))}: cannot be written: a virus scanner has a file of it open; choose another"
    with pytest.raises(BadInput, match=problem), replacing(job.output, force=True):
        pass
    assert [path.name for path in job.output.iterdir()] == ["old"] and left(job) == [job.output.name]


def test_a_folder_whose_replacement_was_killed_is_there_already(job: Job) -> None:
    (job.output.parent / ".pard-0123456789abcdef.lock").write_bytes(os.fsencode(job.output.name) + b"\0")
    (job.output.parent / ".pard-0123456789abcdef.old").mkdir()
    with pytest.raises(BadInput, match="exists already"):
        checked_output_folder(job.output, job.checkpoint.folder, force=False)
    assert job.output.is_dir()


def test_errors_say_whether_the_output_or_something_else_is_the_matter(job: Job, left: Left) -> None:
    """A file of the output by its name, a disk that is full wherever it shows; what is read keeps its own error."""
    full = OSError(errno.ENOSPC, "full")
    with (
        pytest.raises(Failure, match="out put ü: cannot be written: full; free some"),
        replacing(job.output, force=True),
    ):
        raise full
    with pytest.raises(BadInput, match=r"ü/a/b: cannot be written"), replacing(job.output, force=True) as folder:
        (folder / "a" / "b").touch()
    with pytest.raises(FileNotFoundError), replacing(job.output, force=True):
        (job.checkpoint.folder / "a" / "b").touch()
    assert left(job) == []


def test_parents_made_for_an_export_that_fails_go_with_it(job: Job, left: Left) -> None:
    with pytest.raises(KeyboardInterrupt), replacing(job.output / "a" / "b", force=False):
        raise KeyboardInterrupt
    assert left(job) == []


@pytest.mark.parametrize("stage", ("trace", "weights", "verify"))
def test_an_interrupted_export_leaves_nothing(job: Job, stage: str, left: Left) -> None:
    def interrupt(name: str, done: int, total: int) -> None:
        if name == stage and (done > 0 or name == "verify"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(replace(job, verify=True), interrupt)
    assert left(job) == []


def test_a_forced_export_that_fails_keeps_the_old_folder(job: Job, left: Left) -> None:
    export(job)
    before = {p.name: p.read_bytes() for p in job.output.iterdir()}

    def interrupt(name: str, done: int, total: int) -> None:
        if name == "weights" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(replace(job, force=True, precision="fp32"), interrupt)
    assert {p.name: p.read_bytes() for p in job.output.iterdir()} == before
    assert left(job) == [job.output.name]
