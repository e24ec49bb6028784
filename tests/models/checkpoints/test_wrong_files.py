"""Files that are not what their names say, and formats that are not read: one line that says what is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadCheckpoint, BadInput
from pard_onnx.models.hub import resolve_artifact, resolve_checkpoint
from pard_onnx.models.manifest import Source

Tiny = Callable[..., Path]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 988097824\n".format("0a" * 32)


def refusal(folder: Path) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "tokenizer.json", "model.safetensors.index.json"])
def test_git_lfs_pointers(tiny: Tiny, tmp_path: Path, name: str) -> None:
    folder = tiny(tmp_path, shards=2)
    (folder / name).write_text(POINTER)
    problem = "is a Git LFS pointer, not the file itself; fetch that with git lfs pull or hf download"
    assert f"{folder / name}: {problem}" == refusal(folder)


@pytest.mark.parametrize("name", ["model-Q4_K_M.gguf", "model.onnx", "MODEL.GGUF"])
def test_folders_of_other_formats(tiny: Tiny, tmp_path: Path, name: str) -> None:
    folder = tiny(tmp_path)
    (folder / "model.safetensors").rename(folder / name)
    other = name == "model.onnx"
    advice = (
        f"; {name} is not read: the checkpoint in safetensors is needed"
        if other
        else f"; name the file itself: {folder / name}"
    )
    problem = "no weights: neither model.safetensors nor model.safetensors.index.json is there"
    assert refusal(folder).endswith(problem + advice)
    (folder / "config.json").unlink()
    assert refusal(folder).endswith(f"no config.json, so not a Hugging Face checkpoint folder{advice}")


@pytest.mark.parametrize("name", ["model-Q4_K_M.gguf", "MODEL.GGUF", "model.onnx"])
def test_files_that_are_not_there(tmp_path: Path, name: str) -> None:
    checkpoint = "a checkpoint folder with config.json, tokenizer.json and safetensors, or a GGUF file"
    cases: tuple[tuple[Callable[[str], object], str], ...] = (
        (resolve_checkpoint, checkpoint),
        (resolve_artifact, "a folder that pard-export writes"),
    )
    for resolve, wanted in cases:
        for given in (str(tmp_path / name), f"org/{name}"):
            with pytest.raises(BadInput) as caught:
                resolve(given)
            assert f"{given}: there is no such file; name {wanted}, or a hub id of one" == str(caught.value)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("model-Q4_K_M.gguf", "model-Q4_K_M"),
        ("MODEL.GGUF", "MODEL"),
        ("model-Q8_0-00001-of-00003.gguf", "model-Q8_0"),
        ("0123abcd", "0123abcd"),  # of a download cache
    ],
)
def test_gguf_files_are_checkpoints(tmp_path: Path, name: str, model: str) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(b"GGUF")
    path = tmp_path / name
    path.symlink_to(blob)
    assert (path, Source(model)) == resolve_checkpoint(str(path))
    with pytest.raises(BadInput, match=r"revision 'main': .* is a local path"):
        resolve_checkpoint(str(path), "main")


def test_a_gguf_file_is_no_artifact(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(BadInput, match=f"run pard-export --model {path} first and name the folder it writes"):
        resolve_artifact(path)


def test_a_file_of_the_folder(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny(tmp_path) / "model.safetensors"
    with pytest.raises(BadInput, match="is a file; name a checkpoint folder with config"):
        resolve_checkpoint(str(path))
    with pytest.raises(BadInput, match="is a file; name a folder that pard-export writes"):
        resolve_artifact(path)


def test_a_folder_that_is_not_exported_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as caught:
        resolve_artifact("PARD-Qwen2.5-0.5B-int4")
    problem = "neither an exported folder nor a hub id (org/name); pard-export --model CHECKPOINT writes such a folder"
    assert str(caught.value).startswith(f"'PARD-Qwen2.5-0.5B-int4': {problem}, pard-models pull ")
