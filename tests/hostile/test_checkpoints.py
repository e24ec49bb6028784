"""Checkpoints, adapters and GGUF files from a stranger: links, FIFOs and absurd numbers are refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import gguf_files
import pytest
from hostile import SECRET, listen, one_line, replace
from tiny import save_in_hub_cache

from pard_onnx.export_command import main
from pard_onnx.models.checkpoints.adapter import Adapter
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.gguf.file import GgufFile
from pard_onnx.models.errors import BadCheckpoint, BadInput

pytestmark = [pytest.mark.timeout(30, func_only=True), pytest.mark.skipif(os.name == "nt", reason="FIFOs and links")]
Tiny = Callable[..., Path]
FILES = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "model.safetensors",
    "model.safetensors.index.json", "quantize_config.json", "adapter_config.json",
]  # fmt: skip
PLACES: dict[str, Callable[[Path], object]] = {
    "FIFO": os.mkfifo,
    "socket": listen,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link that leaves": lambda path: path.symlink_to("../secret.txt"),
    "link to nothing": lambda path: path.symlink_to("nothing"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FILES)
def test_something_else_in_a_files_place(
    tiny: Tiny, tmp_path: Path, name: str, place: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tiny(tmp_path / "model")
    (tmp_path / "secret.txt").write_text(SECRET)
    replace(folder / name, PLACES[place])
    assert main(["--model", str(folder), "--output", str(tmp_path / "out")]) == 2
    assert name in one_line(capfd) and not (tmp_path / "out").exists()


def test_links_of_the_hubs_cache_are_read(tiny: Tiny, tmp_path: Path) -> None:
    snapshot = save_in_hub_cache(tiny(tmp_path / "model"), tmp_path / "hub", "org/model")
    assert Checkpoint.open(snapshot).spec.layers == 2


def test_links_within_the_folder_are_read(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(folder)
    assert Checkpoint.open(tmp_path / "link").spec.layers == 2


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "a:b", "NUL", "fifo", "link"])
def test_shards(tiny: Tiny, tmp_path: Path, shard: str) -> None:
    folder = tiny(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "other.safetensors")
    os.mkfifo(folder / "fifo")
    (folder / "link").symlink_to("../other.safetensors")
    index = {"weight_map": {"model.norm.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadCheckpoint, match=shard):
        Checkpoint.open(folder)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"])
def test_adapters(tmp_path: Path, name: str, place: str) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text(SECRET)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / file).write_text("{}")
    replace(folder / name, PLACES[place])
    with pytest.raises(BadInput, match=name) as caught:
        Adapter.open(folder)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("place", PLACES)
def test_parts_of_gguf_files(tiny: Tiny, tmp_path: Path, place: str) -> None:
    whole = tmp_path / "whole.gguf"
    gguf_files.write(whole, tiny(tmp_path / "tiny", "llama"))
    (tmp_path / "model").mkdir()
    parts = gguf_files.split(whole, tmp_path / "model" / "part", 2)
    (tmp_path / "secret.txt").write_text(SECRET)
    replace(parts[1], PLACES[place])
    with pytest.raises(BadCheckpoint, match=parts[1].name):
        GgufFile.read(parts[0])


KEYS = [
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "eos_token_id", "pard_token",
]  # fmt: skip
HARMLESS = {"max_position_embeddings", "rms_norm_eps", "rope_theta"}  # nothing is made by them
TOKENS = {("eos_token_id", "0"), ("eos_token_id", "-1"), ("pard_token", "0")}  # -1: none
ABSURD = {"0": 0, "-1": -1, "2^31": 1 << 31, "2^40": 1 << 40, "2^63": 1 << 63, "10^400": 10**400}


@pytest.mark.parametrize("value", ABSURD)
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "smollm3"])
def test_numbers(tiny: Tiny, tmp_path: Path, family: str, key: str, value: str) -> None:
    folder = tiny(tmp_path / "model", family, "draft")
    config = json.loads((folder / "config.json").read_text())
    for name in ("layer_types", "no_rope_layers"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config | {key: ABSURD[value]}))
    (folder / "generation_config.json").unlink()
    try:
        Checkpoint.open(folder)
    except BadCheckpoint as error:
        assert "\n" not in str(error) and len(str(error)) < 600
    else:
        assert key in HARMLESS or (key, value) in TOKENS


def test_a_large_config(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        path = folder / name
        before = path.read_bytes() if path.exists() else None
        with path.open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(BadCheckpoint, match=rf"{name}: has 1099511627776 bytes"):
            Checkpoint.open(folder)
        path.unlink()
        if before is not None:
            path.write_bytes(before)
