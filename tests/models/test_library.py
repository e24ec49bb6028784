"""The user's library: names, what is found by which name, drafts of targets, removal, and who may write there."""

from __future__ import annotations

import json
import ntpath
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pard_onnx import load
from pard_onnx.models import library as module
from pard_onnx.models.atomic import exclusive, put_folder, remove_folder
from pard_onnx.models.errors import BadArtifact, BadInput, Failure, PardWarning
from pard_onnx.models.folder_files import DEVICES, is_plain_name
from pard_onnx.models.hub import own_draft, resolve_artifact
from pard_onnx.models.library import Entry, Library, Record, is_name, require_name
from pard_onnx.models.manifest import FILE_NAME, RECORD

TEXT = "the quick brown"
posix = pytest.mark.skipif(os.name != "posix", reason="owners, modes and links of POSIX")


@pytest.fixture
def library(pair_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """The toy pair in a library: `big` with the draft `small`, pulled from org/big and org/small."""
    folder = tmp_path / "models é"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("PARD_ONNX_MODELS", str(folder))
    for name, source in zip(("big", "small"), pair_folders, strict=True):
        shutil.copytree(source, folder / name)
        (folder / name).chmod(0o700)
        Entry(name, folder / name).write_record(Record(f"org/{name}", draft="small" if name == "big" else None))
    return Library.of_user()


@pytest.mark.parametrize(
    ("platform", "variable", "folder"),
    [
        ("linux", "XDG_DATA_HOME", ".local/share"),
        ("win32", "LOCALAPPDATA", "AppData/Local"),
        ("darwin", "XDG_DATA_HOME", "Library/Application Support"),
    ],
)
def test_where_it_is(
    platform: str, variable: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PARD_ONNX_MODELS")
    monkeypatch.setattr(module.sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv(variable, raising=False)
    usual = tmp_path / folder / "pard-onnx" / "models"
    assert Library.of_user().folder == usual
    monkeypatch.setenv(variable, "relative")
    assert Library.of_user().folder == usual
    monkeypatch.setenv(variable, str(tmp_path / "data"))
    base = tmp_path / (folder if platform == "darwin" else "data")
    assert Library.of_user().folder == base / "pard-onnx" / "models"
    monkeypatch.setenv("PARD_ONNX_MODELS", "~/mine")
    assert Library.of_user().folder == Path("~/mine").expanduser()


BAD_NAMES = ["", ".", "..", "../x", "a/b", "a\\b", "C:x", ".hidden", "-x", "nul", "COM1.txt", "a\0b", "a\nb", "a ",
             "a.", "x" * 161, "é" * 81, "\ud800", "a\u202eb", "a*"]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_what_no_model_is_called(name: str, library: Library) -> None:
    assert not is_name(name) and library.get(name) is None
    for refuse in (require_name, library.require, library.remove):
        with pytest.raises(BadInput, match="is no name of a model in the library") as caught:
            refuse(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput), library.writing(name):
        pass
    assert [entry.name for entry in library.entries()] == ["big", "small"]


@given(st.text(max_size=200))
def test_a_name_is_one_part_of_a_path_on_every_system(name: str) -> None:
    if is_name(name):
        assert Path(name).name == name and not set(name) & set('/\\:<>|?*"\0\n') and len(name.encode()) <= 160
        assert name[0] not in ".-"
        assert name.partition(".")[0].upper() not in DEVICES


@pytest.mark.parametrize("name", ["big", "org/big"])
def test_a_model_is_loaded_by_its_name_and_by_what_was_pulled(name: str, library: Library) -> None:
    assert resolve_artifact(name) == library.folder / "big"
    assert own_draft(name) == library.folder / "small"
    with load(name, threads=1) as pair, load(name, None, threads=1) as plain:
        assert (pair.target_name, pair.draft_name) == (name, str(library.folder / "small"))
        assert plain.draft_name is None
        expected = plain.generate(TEXT, max_new_tokens=8)
        assert pair.generate(TEXT, max_new_tokens=8, draft_length=3, lookup=False).tokens == expected.tokens
    with load(library.folder / "big", "small", threads=1) as pair:
        assert pair.draft_name == "small"
    with load(library.folder / "big", threads=1) as pair:
        assert pair.draft_name is None  # a path has no name in the library


def test_a_local_folder_wins(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "big").mkdir()
    assert resolve_artifact("big") == Path("big")
    assert own_draft("big") is None
    assert resolve_artifact("small") == library.folder / "small"


def test_unknown_names(library: Library) -> None:
    with pytest.raises(
        BadInput, match=r"'bigg': neither an exported folder nor .*the nearest is big.*pard-models list"
    ):
        resolve_artifact("bigg")
    with pytest.raises(BadInput, match=r"'bigg': no such model .*the nearest is big\); pard-models list"):
        library.require("bigg")


def test_several_exports_of_one_model(library: Library) -> None:
    shutil.copytree(library.folder / "big", library.folder / "big-2")
    with pytest.raises(BadInput, match=r"org/big: the library has several exports of it \(big, big-2\)"):
        library.find("org/big")
    found = library.find("big")
    assert found is not None and found.name == "big"


def test_a_stranger_s_manifest_gives_a_model_no_other_name(library: Library) -> None:
    """The sources of both are toy-target and toy-draft; what was pulled is what counts."""
    assert library.find("toy-target") is None
    (library.folder / "big" / RECORD).unlink()
    found = library.find("toy-target")  # a folder that the user put there
    assert found is not None and found.name == "big"


def test_an_adapted_model_does_not_pass_for_its_base(library: Library) -> None:
    Entry("big", library.folder / "big").write_record(Record("org/base", options=("adapter=org/lora",)))
    assert library.find("org/base") is None


def test_a_draft_that_is_gone(library: Library) -> None:
    library.remove("small")
    with pytest.warns(PardWarning, match=r"big: its draft, small, is not in the library any more.*pull org/big"):
        assert own_draft("big") is None


@pytest.mark.parametrize(
    "record", ["[]", "{", '{"pulled": 1}', '{"pulled": "x", "drafts": "y"}', '{"pulled": "x", "draft": "../small"}']
)
def test_records_that_say_nonsense(record: str, library: Library) -> None:
    (library.folder / "big" / RECORD).write_text(record)
    with pytest.raises(BadInput):
        own_draft("big")
    assert [entry.name for entry in library.entries()] == ["big", "small"]


def test_damaged_models_are_listed_and_found_by_their_names(library: Library) -> None:
    (library.folder / "big" / FILE_NAME).write_text("{")
    (library.folder / "empty").mkdir()
    (library.folder / "file").write_text("")
    assert [entry.name for entry in library.entries()] == ["big", "small"]
    assert library.find("org/big") is not None  # its record is whole
    with pytest.raises(BadArtifact):
        load("big")


@posix
@pytest.mark.parametrize("part", [".", "big"])
def test_models_that_others_could_have_put_there_are_refused(part: str, library: Library) -> None:
    (library.folder / part).chmod(0o777)
    with pytest.raises(BadInput, match=r"can be written by other users.*PARD_ONNX_MODELS"):
        resolve_artifact("big")


# --- removal


def test_removing(library: Library) -> None:
    assert [entry.name for entry in library.targets_of(library.require("small"))] == ["big"]
    library.staging("big").mkdir()
    library.remove("big")
    assert [path.name for path in library.folder.iterdir()] == ["small"]


@posix
def test_of_links_only_the_links_are_removed(library: Library, pair_folders: tuple[Path, Path], tmp_path: Path) -> None:
    outside = shutil.copytree(pair_folders[0], tmp_path / "outside")
    before = sorted(path.name for path in outside.iterdir())
    (library.folder / "link").symlink_to(outside)
    (library.folder / "big" / "inside").symlink_to(outside)
    assert library.require("link").manifest().role == "target"
    library.remove("link")
    library.remove("big")
    assert sorted(path.name for path in outside.iterdir()) == before
    assert [path.name for path in library.folder.iterdir()] == ["small"]


def test_what_a_killed_removal_left_is_swept(library: Library) -> None:
    script = (
        "import os, shutil, sys\nfrom pathlib import Path\nfrom pard_onnx.models import atomic\n"
        "atomic.shutil.rmtree = lambda *_, **__: os._exit(9)\natomic.remove_folder(Path(sys.argv[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(library.folder / "big")], check=False)
    assert done.returncode == 9
    assert [entry.name for entry in library.entries()] == ["small"]
    (library.folder / "other").mkdir()
    remove_folder(library.folder / "other")
    assert [path.name for path in library.folder.iterdir()] == ["small"]


def test_one_process_at_a_time(library: Library) -> None:
    with library.writing("big"):
        for call in (lambda: library.remove("big"), lambda: library.writing("big").__enter__()):
            with pytest.raises(Failure, match="big: another pard-models command is writing it now"):
                call()
        with library.writing("small"):
            pass
    assert [path.name for path in sorted(library.folder.iterdir())] == ["big", "small"]


def test_a_lock_is_held_by_one_thread(tmp_path: Path) -> None:
    held, most = 0, 0
    done = threading.Barrier(8)

    def work() -> None:
        nonlocal held, most
        done.wait()
        for _ in range(40):
            try:
                with exclusive(tmp_path / "lock"):
                    held += 1
                    most = max(most, held)
                    held -= 1
            except BlockingIOError:
                pass

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (held, most) == (0, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_takes_the_place_of_another(exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchanges:
        monkeypatch.setattr("pard_onnx.models.atomic.exchange", lambda first, second: False)
    for content in ("old", "new"):
        (tmp_path / "complete").mkdir()
        (tmp_path / "complete" / "file").write_text(content)
        put_folder(tmp_path / "complete", tmp_path / "folder")
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]
        assert (tmp_path / "folder" / "file").read_text() == content


def test_a_record_is_json(library: Library) -> None:
    written = json.loads((library.folder / "big" / RECORD).read_text())
    assert written == {"pulled": "org/big", "revision": None, "options": [], "draft": "small", "no_draft": False}


RESERVED = (
    "CON",
    "PRN",
    "aux",
    "Nul",
    "CONIN$",
    "CONOUT$",
    "COM1",
    "com9",
    "LPT1",
    "lpt9",
    "COM²",
    "LPT³",
    "COM0",
    "model",
)


@pytest.mark.parametrize("ending", ["", ".txt", " ", ".", " .txt", ".a.b", ":x"])
@pytest.mark.parametrize("device", RESERVED)
def test_names_that_windows_reserves_are_not_plain(device: str, ending: str) -> None:
    reserved = getattr(ntpath, "isreserved", None) or (lambda name: PureWindowsPath(name).is_reserved())  # Python 3.13
    if reserved(device + ending):
        assert not is_plain_name(device + ending)
    elif not ending:
        assert is_plain_name(device)
