"""Names to folders: local ones, the shipped pair, the hub's cache, and a stand-in hub on this machine."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest
from stand_in_hub import Hub
from tiny import SHA, save_in_hub_cache

from pard_onnx import load
from pard_onnx.generate_command import main as generate_main
from pard_onnx.models import demo, hub
from pard_onnx.models.cache_folder import distrust
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadInput, Failure
from pard_onnx.models.hub import fetched_commit, resolve_adapter, resolve_artifact, resolve_checkpoint
from pard_onnx.models.manifest import FILE_NAME, Source


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    """Both caches in tmp_path, and no way out."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PARD_ONNX_CACHE", str(tmp_path / "pard onnx é"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


needs_links = pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")


# --- local


def test_a_local_checkpoint(tmp_path):
    folder = tmp_path / "mein Modell é"
    folder.mkdir()
    assert (folder, Source("mein Modell é")) == resolve_checkpoint(str(folder))
    assert folder == resolve_artifact(folder) == resolve_artifact(str(folder))


def test_a_relative_path_is_recorded_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert (Path("org/name"), Source("name")) == resolve_checkpoint("org/name")
    monkeypatch.chdir(tmp_path / "org" / "name")
    assert (Path(), Source("name")) == resolve_checkpoint(".")


def test_the_shipped_pair(monkeypatch, tmp_path):
    assert list(hub.DEMO) == ["demo-target", "demo-draft", "demo-pard2-draft", "demo-ar-draft"]
    assert all((folder / "config.json").is_file() for folder in hub.DEMO.values())
    assert {Path(demo.__file__).parent} == {folder.parent for folder in hub.DEMO.values()}
    monkeypatch.setitem(hub.DEMO, "demo-draft", tmp_path)
    assert (tmp_path, Source("demo-draft")) == resolve_checkpoint("demo-draft", None)
    monkeypatch.setitem(hub.DEMO, "demo-draft", tmp_path / "absent")
    fix = r"pip download --no-deps --no-binary pard-onnx pard-onnx, .* name the folder models/demo/absent in it"
    with pytest.raises(BadInput, match=f"demo-draft: wheels have no checkpoints of the demo pair, .*{fix}"):
        resolve_checkpoint("demo-draft")
    with pytest.raises(BadInput, match=r"demo-ar-draft: is a checkpoint; run pard-export --model demo-ar-draft first"):
        resolve_artifact("demo-ar-draft")
    assert (resolve_artifact("demo-target"), resolve_artifact("demo-draft")) == (
        demo.EXPORTED_TARGET,
        demo.EXPORTED_DRAFT,
    )


def test_local_folders_have_no_revisions(tmp_path):
    for resolve in (resolve_checkpoint, resolve_artifact):
        with pytest.raises(BadInput, match=r"revision 'v1': .* is a local path"):
            resolve(str(tmp_path), "v1")


@pytest.mark.parametrize(
    "name",
    ["", "gpt2", "./absent", "../absent", "/absent/model", "C:\\absent", "a/b/c", "org/", "a--b/c", "~nobody/x", "é/b"],
)
def test_neither_folder_nor_hub_id(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"neither a checkpoint folder nor a hub id \(org/name\)"):
        resolve_checkpoint(name)
    with pytest.raises(BadInput, match=r"neither an exported folder nor a hub id \(org/name\)"):
        resolve_artifact(name)


def test_a_name_too_long_for_a_path():
    with pytest.raises(BadInput, match="neither a checkpoint folder nor a hub id"):
        resolve_checkpoint("x" * 5000)


def test_a_folder_whose_replacement_was_killed_is_found(tmp_path):
    """As a process leaves it that is killed between two renames, where names cannot be exchanged."""
    for resolve in (resolve_artifact, lambda name: resolve_checkpoint(str(name))[0]):
        (tmp_path / ".pard-0123456789abcdef.lock").write_bytes(b"exported\0")
        for name in ("old", "partial"):
            (tmp_path / f".pard-0123456789abcdef.{name}").mkdir()
        assert resolve(tmp_path / "exported") == tmp_path / "exported"
        assert [path.name for path in tmp_path.iterdir()] == ["exported"]
        (tmp_path / "exported").rmdir()


# --- the hub's cache, offline


@needs_links
def test_a_cached_checkpoint(tiny, tmp_path):
    snapshot = save_in_hub_cache(tiny(tmp_path / "source", role="draft"), tmp_path / "hub", "amd/PARD-tiny")
    for revision in (None, "main", SHA):
        folder, source = resolve_checkpoint("amd/PARD-tiny", revision)
        assert snapshot.samefile(folder)
        assert Source("amd/PARD-tiny", SHA) == source
    assert Checkpoint.open(folder).spec.role == "draft"


def test_not_cached_and_offline(tmp_path):
    with pytest.raises(BadInput, match=r"org/name: neither a folder here nor .* cache, and HF_HUB_OFFLINE is set"):
        resolve_checkpoint("org/name")
    with pytest.raises(BadInput, match=r"org/name at revision v1: neither a folder"):
        resolve_artifact("org/name", "v1")
    assert not (tmp_path / "pard onnx é").exists()


@pytest.fixture
def snapshot(pair_folders, tmp_path):
    """An exported folder in the hub's cache, where every file is a link."""
    return save_in_hub_cache(pair_folders[0], tmp_path / "hub", "org/exported")


@needs_links
def test_folders_of_links_are_copied_once(snapshot, pair_folders, tmp_path):
    real = resolve_artifact(snapshot)
    assert real.is_relative_to(tmp_path / "pard onnx é")
    assert {path.name for path in pair_folders[0].iterdir()} == {path.name for path in real.iterdir()}
    for path in real.iterdir():
        assert not path.is_symlink()
        assert path.read_bytes() == (pair_folders[0] / path.name).read_bytes()
    assert real == resolve_artifact(snapshot)
    assert [real] == list(real.parent.iterdir())


@needs_links
def test_files_that_the_manifest_does_not_list_are_not_copied(snapshot, tmp_path):
    (tmp_path / "private").write_text("secret")
    (snapshot / "more.json").symlink_to(tmp_path / "private")
    (snapshot / "beside.json").write_text("{}")
    names = {path.name for path in resolve_artifact(snapshot).iterdir()}
    assert {path.name for path in snapshot.iterdir()} - {"more.json", "beside.json"} == names


@needs_links
def test_links_within_a_folder_stay(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").symlink_to("a")
    assert tmp_path == resolve_artifact(tmp_path)


def test_copies_where_hard_links_do_not_work(tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError("another disk")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    (tmp_path / "a").write_text("a")
    hub._clone(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "a"


# --- a hub


def test_fetching_a_checkpoint(online, tiny, tmp_path):
    Hub.files = {path.name: path.read_bytes() for path in tiny(tmp_path / "source").iterdir()}
    Hub.files |= {"pytorch_model.bin": b"pickle", "README.md": b"text", "chat_template.jinja": b"{{ 1 }}"}
    folder, source = resolve_checkpoint("org/name")
    assert Source("org/name", SHA) == source
    assert Checkpoint.open(folder).spec.chat_template == "{{ 1 }}"
    assert set(Hub.files) - {"pytorch_model.bin", "README.md"} == {path.name for path in folder.iterdir()}


def test_a_gguf_file_of_a_repository(online):
    Hub.files = {"model-Q4_0.gguf": b"GGUF", "model-Q8_0.gguf": b"GGUF", "README.md": b"text"}
    file, source = resolve_checkpoint("org/name/model-Q8_0.gguf")
    assert Source("org/name/model-Q8_0", SHA) == source
    assert file.read_bytes() == b"GGUF"
    assert [path.name for path in file.parent.iterdir()] == ["model-Q8_0.gguf"]
    with pytest.raises(BadInput, match=r"org/name/other\.gguf: the repository has no such file; look for the name"):
        resolve_checkpoint("org/name/other.gguf")
    with pytest.raises(BadInput, match=r"org/name: has no config\.json.*name one, org/name/FILE\.gguf"):
        resolve_checkpoint("org/name")


def test_a_gguf_file_that_a_folder_lacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    for name in ("org/name/model.gguf", "a/b/../model.gguf"):
        with pytest.raises(BadInput, match="there is no such file"):
            resolve_checkpoint(name)


def test_fetching_an_adapter(online):
    wanted = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", "tokenizer.json": b"{}"}
    Hub.files = wanted | {"adapter_model.bin": b"pickle", "trainer_state.json": b"{}", "README.md": b"text"}
    folder, source = resolve_adapter("org/name")
    assert Source("org/name", SHA) == source
    assert set(wanted) == {path.name for path in folder.iterdir()}


def test_fetching_an_artifact_into_a_real_folder(online, tmp_path, monkeypatch):
    Hub.files = {"model.onnx": b"graph", "model.onnx.data": b"weights", FILE_NAME: b"{}", "other.bin": b"pickle"}
    folder = resolve_artifact("org/name")
    assert folder.is_relative_to(tmp_path / "pard onnx é")
    for name in ("model.onnx", "model.onnx.data", FILE_NAME):
        assert not (folder / name).is_symlink()
        assert (folder / name).read_bytes() == Hub.files[name]
    assert not (folder / "other.bin").exists()
    assert fetched_commit(folder) == SHA
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert folder == resolve_artifact("org/name")


def test_a_pair_of_pinned_commits(online, write_artifact, tmp_path, capsys):
    target = write_artifact(tmp_path / "target", "target")
    Hub.files = {path.name: path.read_bytes() for path in target.iterdir()}
    with load("org/name", revision=SHA, threads=1) as pair:
        assert (pair.target_commit, pair.draft_commit) == (SHA, None)
    with load(target, threads=1) as pair:
        assert pair.target_commit is None
    arguments = ["--target", "org/name", "--revision", SHA, "--prompt", "the", "--max-new-tokens", "2", "--json"]
    assert generate_main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["target_commit"] == SHA
    with pytest.raises(BadInput, match="org/name at revision v9: the repository is there, that revision is not"):
        load("org/name", revision="v9")
    with pytest.raises(BadInput, match=r"a revision of the draft \('v9'\), but no draft"):
        load("org/name", draft_revision="v9")
    with pytest.raises(BadInput, match="revision must be a branch, tag or commit of a hub id, not 5"):
        load("org/name", revision=5)


@pytest.mark.parametrize("content", [b"", b"main\n", b"\xff" * 40, b"A" * 40])
def test_a_folder_without_a_commit(content, tmp_path):
    assert fetched_commit(tmp_path) is None
    path = tmp_path / hub.DOWNLOADS / f"{FILE_NAME}.metadata"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert fetched_commit(tmp_path) is None


def test_a_checkpoint_on_the_hub_is_no_artifact(online):
    Hub.files = {"config.json": b"{}"}
    with pytest.raises(BadInput, match=r"org/name: has no pard_onnx\.json.*pard-export --model org/name"):
        resolve_artifact("org/name")


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("org/gated", None, "org/gated: is gated; ask for access on its page and set HF_TOKEN"),
        ("org/absent", None, "org/absent: neither a folder here nor a repository on the hub; .* set HF_TOKEN"),
        ("org/name", "v9", "org/name at revision v9: the repository is there, that revision is not"),
        ("org/down", None, "org/down: neither a folder here nor .* cache, and the hub cannot be reached"),
    ],
)
def test_the_hub_says_no(online, name, revision, message):
    with pytest.raises(BadInput, match=message) as caught:
        resolve_checkpoint(name, revision)
    assert "\n" not in str(caught.value)


@needs_links
def test_the_cache_serves_when_the_hub_cannot_be_reached(online, monkeypatch, tiny, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BadInput, match="and the hub cannot be reached"):
        resolve_checkpoint("org/name")
    snapshot = save_in_hub_cache(tiny(tmp_path / "source"), tmp_path / "hub", "org/name")
    assert snapshot.samefile(resolve_checkpoint("org/name")[0])


def test_a_download_that_breaks_off(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("peer closed connection\nmore")

    monkeypatch.setattr(hub, "_download", broken)
    with pytest.raises(Failure, match=r"^org/name: the download broke off: RuntimeError: peer closed connection$"):
        resolve_checkpoint("org/name")


@pytest.mark.parametrize("resolve", [resolve_checkpoint, resolve_artifact])
def test_a_full_disk_is_no_broken_connection(monkeypatch, tmp_path, resolve):
    """What was fetched before is not taken in its place."""

    def full(*args, local_files_only=False, **options):
        if local_files_only:
            return tmp_path
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "_download", full)
    with pytest.raises(Failure, match=r"^.*(hub|main): cannot be written: No space left .*; free some space, or name"):
        resolve("org/name")


@pytest.mark.skipif(os.name != "posix", reason="owners and modes of POSIX")
def test_models_in_a_cache_of_others_are_refused(online, tmp_path):
    """Another user could have put a model there."""
    cache = tmp_path / "pard onnx é"
    Hub.files = {"model.onnx": b"graph", "model.onnx.data": b"weights", FILE_NAME: b"{}"}
    resolve_artifact("org/name")
    cache.chmod(0o777)
    with pytest.raises(BadInput, match=r"can be written by other users, so the models in it may be theirs"):
        resolve_artifact("org/name")


def test_a_local_folder_has_no_commit(write_artifact, tmp_path):
    """Whatever it claims, and whatever lies where the hub's client keeps the commit."""
    target = write_artifact(tmp_path / "target", "target")
    note = target / hub.DOWNLOADS / f"{FILE_NAME}.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{SHA}\nx\n1\n")
    with load(target, threads=1) as pair:
        assert pair.target_commit is None
    note.unlink()
    os.mkfifo(note)
    assert fetched_commit(target) is None


def test_downloads_are_reported(online, write_artifact, tmp_path):
    target = write_artifact(tmp_path / "target", "target")
    Hub.files = {path.name: path.read_bytes() for path in target.iterdir()}
    reports = []
    folder = resolve_artifact("org/name", progress=lambda *report: reports.append(report))
    assert folder.is_dir()
    assert {stage for stage, *_ in reports} == {"download"}
    assert all(0 <= done <= total for _, done, total in reports)
    size = sum(map(len, Hub.files.values()))
    assert reports[-1][1:] == (size, size)
    with load("org/name", threads=1, progress=lambda *report: reports.append(report)):
        assert "verify target" in {stage for stage, *_ in reports}


def test_a_download_ends_with_what_its_progress_raises(online, tmp_path):
    Hub.files = {"model.onnx": b"graph" * 1000, FILE_NAME: b"{}"}

    class Cancelled(Exception):
        pass

    def progress(*report):
        raise Cancelled

    for resolve in (resolve_artifact, resolve_checkpoint):
        with pytest.raises(Cancelled):
            resolve("org/name", progress=progress)
    assert resolve_artifact("org/name").is_dir()  # and can be begun again


@pytest.mark.skipif(os.name != "posix", reason="owners of POSIX")
def test_a_library_may_belong_to_root(monkeypatch: pytest.MonkeyPatch) -> None:
    def facts(mode: int, owner: int) -> os.stat_result:
        return os.stat_result((stat.S_IFDIR | mode, 1, 1, 2, owner, 0, 0, 0, 0, 0))

    monkeypatch.setattr(os, "geteuid", lambda: 10001)
    assert distrust(facts(0o755, 10001)) is None
    assert distrust(facts(0o755, 0), of_root=True) is None
    for bad in ((0o755, 0, False), (0o775, 0, True), (0o757, 0, True), (0o755, 1000, True), (0o775, 10001, True)):
        assert distrust(facts(*bad[:2]), of_root=bad[2]) is not None
