"""pard-models: list, pull, show and rm, with a stand-in for the hub."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stand_in_hub import Hub
from tiny import SHA, make_pard2

from pard_onnx import pull
from pard_onnx.generate_command import main as generate_main
from pard_onnx.models import downloads
from pard_onnx.models.library import Library, Record
from pard_onnx.models.manifest import FILE_NAME, RECORD, Manifest
from pard_onnx.models_command import main

EXPORTED, QWEN, DISTILL = "org/big", "amd/PARD-Qwen2.5-0.5B", "amd/PARD-DeepSeek-R1-Distill-Qwen-1.5B"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Library and caches in tmp_path, and no way out."""
    monkeypatch.setenv("PARD_ONNX_MODELS", str(tmp_path / "library"))
    monkeypatch.setenv("PARD_ONNX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def hub(online: object, pair_folders: tuple[Path, Path], write_artifact: Callable[..., Path], tmp_path: Path) -> None:
    """The toy pair as exported repositories: a target, its published draft, and one with another tokenizer."""
    other = write_artifact(tmp_path / "other", "draft", text="pack my box with five dozen liquor jugs")
    for name, folder in ((EXPORTED, pair_folders[0]), (QWEN, pair_folders[1]), (DISTILL, other)):
        Hub.repositories[name] = {path.name: path.read_bytes() for path in folder.iterdir()}


def told(capsys: Capture, *arguments: str) -> Any:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: Capture, *arguments: str, code: int = 2) -> str:
    capsys.readouterr()
    assert main([*arguments]) == code
    out, err = capsys.readouterr()
    *before, problem = err.splitlines()
    assert out == "" and problem.startswith("error: ") and not any("error" in line for line in before)  # but progress
    return problem


def names() -> list[str]:
    return sorted(path.name for path in Library.of_user().folder.iterdir())


def test_an_empty_library(capsys: Capture) -> None:
    assert told(capsys, "list")["models"] == []
    assert main(["list"]) == 0
    assert "no models yet; pard-models pull ID gets one" in capsys.readouterr().out
    assert not Library.of_user().folder.exists()
    assert "no such model in the library" in refused(capsys, "show", "x")


def test_a_pair_is_fetched_and_runs_by_name(hub: None, capsys: Capture) -> None:
    found = told(capsys, "pull", EXPORTED)
    assert (found["model_state"], found["draft_state"]) == ("fetched", "fetched")
    assert found["model"]["draft"] == "PARD-Qwen2.5-0.5B"  # the other one of the family has other tokens
    assert names() == ["PARD-Qwen2.5-0.5B", "big"]
    assert all((Library.of_user().folder / name).stat().st_mode & 0o77 == 0 for name in names())
    assert set(Hub.repositories[EXPORTED]) | {RECORD} == {
        path.name for path in (Library.of_user().folder / "big").iterdir()
    }
    asked = len(Hub.asked)
    assert told(capsys, "pull", EXPORTED)["draft_state"] == "present"
    assert len(Hub.asked) == asked
    for arguments in (["big"], ["--target", "big", "--draft", "PARD-Qwen2.5-0.5B"], [EXPORTED]):
        generate = ["--prompt", "the quick", "--max-new-tokens", "6", "--draft-length", "3", "--json"]
        assert generate_main([*arguments, *generate]) == 0
        assert json.loads(capsys.readouterr().out)["sources"]
    listed = told(capsys, "list")["models"]
    assert [(one["name"], one["role"], one["draft"]) for one in listed] == [
        ("PARD-Qwen2.5-0.5B", "draft", None),
        ("big", "target", "PARD-Qwen2.5-0.5B"),
    ]
    shown = told(capsys, "show", "big")
    assert shown == listed[1] and shown["pulled"] == {"model": EXPORTED, "revision": None, "options": []}
    assert main(["show", EXPORTED]) == 0 and main(["list"]) == 0
    assert "PARD-Qwen2.5-0.5B" in capsys.readouterr().out


def test_nothing_but_the_files_of_the_manifest_is_kept(hub: None, capsys: Capture) -> None:
    Hub.repositories[EXPORTED] |= {"more.json": b"{}", RECORD: b'{"pulled": "x", "draft": "y"}', "pickle.bin": b"x"}
    told(capsys, "pull", EXPORTED, "--no-draft")
    kept = {path.name for path in (Library.of_user().folder / "big").iterdir()}
    assert not {"more.json", "pickle.bin", ".cache"} & kept
    assert Library.of_user().require("big").record() == Record(EXPORTED, no_draft=True)
    assert told(capsys, "show", "big")["draft"] is None


def test_a_changed_file_is_refused_and_nothing_is_left_that_looks_whole(hub: None, capsys: Capture) -> None:
    Hub.repositories[EXPORTED]["model.onnx"] += b"x"
    assert "download it again" in refused(capsys, "pull", EXPORTED)
    assert names() == [".big.partial"] and told(capsys, "list")["models"] == []


def test_an_interrupted_download_goes_on(hub: None, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = downloads.fetch_snapshot

    def interrupted(*arguments: Any, **options: Any) -> None:
        fetch(*arguments, **options | {"allow_patterns": ["*.onnx", "*.data", RECORD]})
        raise KeyboardInterrupt

    Hub.repositories[EXPORTED][RECORD] = b'{"pulled": "else/where"}'  # which is not fetched
    monkeypatch.setattr(downloads, "fetch_snapshot", interrupted)
    assert main(["pull", EXPORTED, "--no-draft"]) == 130
    assert told(capsys, "list")["models"] == []
    monkeypatch.setattr(downloads, "fetch_snapshot", fetch)
    before = set(Hub.asked)
    Hub.asked.clear()
    told(capsys, "pull", EXPORTED, "--no-draft")
    assert f"{EXPORTED}/model.onnx" in before and f"{EXPORTED}/model.onnx" not in Hub.asked
    assert names() == ["big"]


def test_what_an_interrupted_pull_of_another_model_left_is_not_used(
    hub: None, pair_folders: tuple[Path, Path], capsys: Capture
) -> None:
    library = Library.of_user()
    library.make()
    for model in (EXPORTED, str(pair_folders[0])):
        library.staging("big").mkdir()
        for file in ("model.onnx", "stray"):
            (library.staging("big") / file).write_bytes(b"evil")
        told(capsys, "pull", model, "--name", "big", "--no-draft", "--force")
        assert (library.folder / "big" / "model.onnx").read_bytes() == Hub.repositories[EXPORTED]["model.onnx"]
        assert not (library.folder / "big" / "stray").exists() and names() == ["big"]


def test_no_draft_fits(hub: None, capsys: Capture) -> None:
    del Hub.repositories[QWEN]
    Hub.status[QWEN] = (404, "RepoNotFound")
    try:
        assert main(["pull", EXPORTED]) == 0
    finally:
        del Hub.status[QWEN]
    out, err = capsys.readouterr()
    assert "big: target" in out and err.count("warning: ") == 1
    assert "no published PARD draft was found" in err and "its tokenizer is not that of" in err and "--draft" in err
    Hub.repositories["org/mine"] = Hub.repositories[DISTILL]
    assert "its tokenizer is not that of" in refused(capsys, "pull", EXPORTED, "--draft", "org/mine")
    assert names() == ["big"]
    assert "is a target, not a draft" in refused(capsys, "pull", EXPORTED, "--draft", "big")


def test_names_that_are_taken(hub: None, capsys: Capture) -> None:
    told(capsys, "pull", EXPORTED)
    Hub.repositories["else/big"] = Hub.repositories[EXPORTED]
    line = refused(capsys, "pull", "else/big", "--no-draft")
    assert "big: the library has a model of this name, pulled from org/big; add --force" in line and "--name" in line
    assert told(capsys, "pull", "else/big", "--name", "mine")["model"]["name"] == "mine"
    assert told(capsys, "pull", "else/big", "--force")["model_state"] == "fetched"
    assert told(capsys, "show", "big")["pulled"]["model"] == "else/big"
    assert names() == ["PARD-Qwen2.5-0.5B", "big", "mine"]


def test_bad_input(hub: None, pair_folders: tuple[Path, Path], capsys: Capture, tmp_path: Path) -> None:
    cases = {
        ("org/absent",): "neither a folder here nor a repository",
        ("org/gated",): "is gated",
        ("gpt2",): "neither a checkpoint folder nor a hub id",
        ("",): "neither a checkpoint folder nor a hub id",
        ("\0",): "neither a checkpoint folder nor a hub id",
        (str(tmp_path / "absent"),): "neither a checkpoint folder nor a hub id",
        (EXPORTED, "--revision", "v9"): "that revision is not",
        (EXPORTED, "--precision", "int8"): "--precision int8: org/big is an exported model",
        (EXPORTED, "--draft", "a/b", "--no-draft"): "leave one of them out",
        (EXPORTED, "--name", "../up"): "is no name of a model in the library",
        (EXPORTED, "--name", "nul"): "is no name of a model in the library",
        (EXPORTED, "--draft-precision", "int8", "--no-draft"): "--draft-precision int8: --no-draft is given",
        (QWEN, "--draft", QWEN): "is a draft itself",
        (QWEN, "--draft-revision", "main"): "is a draft itself",
        (EXPORTED, "--draft", "PARD-Qwen2.5-0.5B", "--draft-precision", "int8"): "is in the library as it is",
        (str(pair_folders[0]), "--revision", "main"): "is a local path, which has no revisions",
        (str(pair_folders[0]), "--name", "x", "--draft", ""): "neither a checkpoint folder nor a hub id",
    }
    for arguments, words in cases.items():
        assert words in refused(capsys, "pull", *arguments), arguments
    assert not {name for name in names() if name.startswith("..") or name == "nul"}


def test_a_local_export_is_copied(pair_folders: tuple[Path, Path], capsys: Capture) -> None:
    assert told(capsys, "pull", str(pair_folders[1]), "--name", "small")["model_state"] == "copied"
    found = told(capsys, "pull", str(pair_folders[0]), "--name", "big", "--draft", "small")
    assert (found["draft"]["name"], found["draft_state"]) == ("small", "present")
    assert names() == ["big", "small"]


def test_too_little_space(hub: None, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    Hub.repositories["org/raw"] = {"config.json": b"{}", "model.safetensors": bytes(1 << 20)}
    line = refused(capsys, "pull", "org/raw", code=1)
    assert "1 MiB free, the download of org/raw needs 65 MiB; free some space, or name another folder in HF_HUB" in line
    assert "PARD_ONNX_MODELS" in refused(capsys, "pull", EXPORTED, code=1)
    assert not [path for path in Hub.asked if path.endswith((".onnx", ".safetensors"))]


def test_two_pulls_at_once(hub: None, capsys: Capture) -> None:
    script = (
        "import sys\nfrom pard_onnx.models.library import Library\n"
        "with Library.of_user().writing('big'):\n    print('writing', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "writing\n"
        line = refused(capsys, "pull", EXPORTED, "--no-draft", code=1)
        assert "big: another pard-models command is writing it now" in line
        other.kill()
    told(capsys, "pull", EXPORTED, "--no-draft")
    assert names() == ["big"]


def test_removing_asks(hub: None, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    told(capsys, "pull", EXPORTED)
    assert "nobody can answer here; add --yes" in refused(capsys, "rm", "big")
    assert "no such model" in refused(capsys, "rm", "big", "bag", "--yes")
    assert "is no name" in refused(capsys, "rm", "../library", "--yes")
    answer = io.StringIO("n\ny\n")
    answer.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", answer)
    assert main(["rm", "PARD-Qwen2.5-0.5B"]) == 2
    err = capsys.readouterr().err
    assert "remove PARD-Qwen2.5-0.5B" in err and "big then decodes without its draft? [y/N]" in err
    assert len(names()) == 2
    assert main(["rm", "PARD-Qwen2.5-0.5B"]) == 0
    assert told(capsys, "rm", "big", "--yes") == {"removed": ["big"]}
    assert names() == []


def test_a_checkpoint_and_its_draft_are_exported(
    online: object, tiny: Callable[..., Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the export and the renaming, and between the two exports: the next call goes on."""
    for name, role in (("Org/Qwen2.5-tiny", "target"), (QWEN, "draft"), (DISTILL, "target")):
        folder = tiny(tmp_path / name, role=role)
        Hub.repositories[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    options = ["pull", "Org/Qwen2.5-tiny", "--quality", "fast", "--no-verify", "--context-length", "256"]
    with monkeypatch.context() as patch:
        patch.setattr(Library, "put", interrupted)
        assert main(options) == 130
    with monkeypatch.context() as patch:
        patch.setattr(pull, "pull_draft", interrupted)
        patch.setattr(pull, "export_job", interrupted)
        assert main(options) == 130
    assert names() == ["Qwen2.5-tiny-int4"]
    found = told(capsys, *options)
    assert (found["model_state"], found["draft_state"]) == ("present", "exported")
    assert found["model"]["source"]["revision"] == SHA
    assert found["model"]["draft"] == found["draft"]["name"] == "PARD-Qwen2.5-0.5B-int4"
    assert (found["draft"]["role"], found["draft"]["context_length"]) == ("draft", 256)
    line = refused(capsys, *options[:-1], "128")
    assert "a model of this name, pulled from Org/Qwen2.5-tiny with quality=fast, context_length=256" in line
    assert names() == ["PARD-Qwen2.5-0.5B-int4", "Qwen2.5-tiny-int4"]


@pytest.fixture
def quick_exports(
    monkeypatch: pytest.MonkeyPatch, pair_folders: tuple[Path, Path], online: object, tiny: Callable[..., Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    """Exports that give the toy artifact of the role, with the context length that was asked for; a hub of a pair."""

    def export(job: Any) -> None:
        assert job.force
        shutil.rmtree(job.output, ignore_errors=True)
        shutil.copytree(pair_folders[job.checkpoint.spec.role == "draft"], job.output)
        manifest = Manifest.read(job.output)
        replace(manifest, capacity=min(job.resolved_capacity(), 100), source=job.source).write(job.output)

    monkeypatch.setattr(pull, "export_job", export)
    monkeypatch.setattr(pull, "_require_same_tokens", lambda *_: None)
    for name, role in (("Org/Qwen2.5-tiny", "target"), ("Org/Qwen2.5-more", "target"), (QWEN, "draft")):
        folder = tiny(tmp_path / name, role=role)
        Hub.repositories[name] = {path.name: path.read_bytes() for path in folder.iterdir()}


def test_targets_of_a_family_share_a_draft(quick_exports: None, capsys: Capture) -> None:
    fast = ["--quality", "fast"]
    assert told(capsys, "pull", "Org/Qwen2.5-tiny", *fast)["draft_state"] == "exported"
    found = told(capsys, "pull", "Org/Qwen2.5-more")
    assert (found["draft"]["name"], found["draft_state"]) == ("PARD-Qwen2.5-0.5B-int4", "present")
    found = told(capsys, "pull", "Org/Qwen2.5-more", "--name", "best", "--quality", "best", "--context-length", "99")
    assert (found["draft"]["name"], found["draft_state"]) == ("PARD-Qwen2.5-0.5B-int4-best-99", "exported")
    found = told(capsys, "pull", "Org/Qwen2.5-tiny", *fast, "--draft-precision", "fp16")
    assert (found["model_state"], found["draft"]["name"]) == ("present", "PARD-Qwen2.5-0.5B-fp16")
    assert told(capsys, "show", "Qwen2.5-tiny-int4")["draft"] == "PARD-Qwen2.5-0.5B-fp16"


def test_a_whole_export_that_was_left_is_not_taken_with_force(quick_exports: None, capsys: Capture) -> None:
    library, options = Library.of_user(), ["pull", "Org/Qwen2.5-tiny", "--no-draft"]
    told(capsys, *options)
    shutil.copytree(library.folder / "Qwen2.5-tiny-int4", library.staging("Qwen2.5-tiny-int4"))
    (library.staging("Qwen2.5-tiny-int4") / "old").write_text("")
    assert told(capsys, *options, "--force")["model_state"] == "exported"
    assert not (library.folder / "Qwen2.5-tiny-int4" / "old").exists()
    assert names() == ["Qwen2.5-tiny-int4"]


def interrupted(*arguments: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


def test_manifests_are_where_the_commands_look(hub: None, capsys: Capture) -> None:
    told(capsys, "pull", EXPORTED)
    (Library.of_user().folder / "big" / FILE_NAME).write_text("{")
    listed = {one["name"]: one["problem"] for one in told(capsys, "list")["models"]}
    assert listed["PARD-Qwen2.5-0.5B"] is None and "pard_onnx.json" in listed["big"]
    assert main(["list"]) == 0 and "damaged" in capsys.readouterr().out
    assert "pard_onnx.json" in refused(capsys, "show", "big")
    assert told(capsys, "pull", EXPORTED, "--force")["model_state"] == "fetched"
    assert told(capsys, "rm", "big", "--yes")


@pytest.mark.slow
def test_a_pard_2_draft_is_pulled_by_itself_and_then_with_its_target(
    online: object, tiny: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    """The projection is fetched with the weights; a line says the command for the target."""
    draft = make_pard2(tiny(tmp_path / "draft", "qwen2", "draft"), layers=(-1, -2))
    target = tiny(tmp_path / "target", "qwen2", "target")
    for name, folder in (("amd/PARD2-tiny", draft), ("org/tiny", target)):
        Hub.repositories[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    alone = told(capsys, "pull", "amd/PARD2-tiny", "--precision", "fp32")["model"]
    features = Manifest.read(Path(alone["folder"])).spec.pard.features  # type: ignore[union-attr]
    assert features is not None and features.layers == (-1, -2)
    assert main(["pull", "org/tiny", "--precision", "fp32", "--draft", alone["name"]]) == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if "hidden states" in line)
    command = line.partition("pull it again: pard-models ")[2].partition(";")[0].split()
    again = f"pull org/tiny --precision=fp32 --force --features=-1,-2 --draft {alone['name']}"
    assert command == again.split()
    assert main(command) == 0
    assert "hidden states" not in capsys.readouterr().err
    pair = told(capsys, "show", "tiny-fp32")
    assert pair["draft"] == alone["name"]
    assert Manifest.read(Path(pair["folder"])).feature_layers == (-1, -2)
