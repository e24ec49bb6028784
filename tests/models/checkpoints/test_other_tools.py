"""What other tools write in another form: token ids, dtypes, names of tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import edit_json, save_json, save_safetensors, weights

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.tensors import HEAD, read_tensor
from pard_onnx.models.errors import BadCheckpoint

Tiny = Callable[..., Path]
IDS = np.arange(20, 45)


def exported_logits(folder: Path, out: Path) -> Any:
    """Logits [tokens, size of the tokenizer] of IDS by the exported graph."""
    from pard_onnx.export.exporter import Job, export
    from pard_onnx.export.verify.drive import drive
    from pard_onnx.models.manifest import Source

    manifest = export(Job(Checkpoint.open(folder), Source("tiny"), out, "fp32"))
    return drive(out, manifest).step(IDS)[:, : manifest.spec.vocabulary.size]


def transformers_logits(folder: Path) -> Any:
    """The same by transformers, which loads the checkpoint itself."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.from_numpy(IDS)[None]).logits[0].numpy()


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (-1, 9, (9,)),
        (None, -1, ()),
        ([5, -1], 9, (5,)),
        (-1, [-1], ()),
    ],
)
def test_an_id_of_minus_one_is_no_token(
    tiny: Tiny, tmp_path: Path, generation: Any, config: Any, expected: tuple[int, ...]
) -> None:
    tiny(tmp_path)
    edit_json(tmp_path / "config.json", eos_token_id=config, bos_token_id=config)
    save_json(tmp_path / "generation_config.json", {"eos_token_id": generation, "bos_token_id": generation})
    vocabulary = Checkpoint.open(tmp_path).spec.vocabulary
    assert (vocabulary.eos_ids, vocabulary.bos_id) == (expected, expected[0] if expected else None)
    edit_json(tmp_path / "config.json", eos_token_id=-2)
    edit_json(tmp_path / "generation_config.json", eos_token_id=...)
    with pytest.raises(BadCheckpoint, match="eos_token_id is -2, outside the vocabulary"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("value", "expected"), [("auto", None), ("torch.float32", "float32"), ("torch.float16", "float16")]
)
def test_dtypes(tiny: Tiny, tmp_path: Path, key: str, stored: str, value: str, expected: str | None) -> None:
    tiny(tmp_path, dtype=stored)
    edit_json(tmp_path / "config.json", dtype=...)
    edit_json(tmp_path / "config.json", **{key: value})
    assert (expected or stored) == Checkpoint.open(tmp_path).spec.dtype


@pytest.mark.parametrize("value", ["torch.float64", "torch.auto", "float", ["torch.float32"]])
def test_dtypes_that_are_refused(tiny: Tiny, tmp_path: Path, value: object) -> None:
    tiny(tmp_path, dtype="float32")
    edit_json(tmp_path / "config.json", dtype=value)
    with pytest.raises(BadCheckpoint, match=r"dtype is .*; supported: float32, float16, bfloat16"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("value", ["auto", "torch.float32"])
def test_exports_of_these_dtypes(tiny: Tiny, tmp_path: Path, value: str) -> None:
    folder = tiny(tmp_path / "model", dtype="float32")
    expected = transformers_logits(folder)
    edit_json(folder / "config.json", dtype=value, eos_token_id=-1)
    found = exported_logits(folder, tmp_path / "out")
    np.testing.assert_allclose(found, expected[:, : found.shape[1]], atol=1e-4)


def without_prefix(folder: Path) -> None:
    held = weights(json.loads((folder / "config.json").read_text()))
    save_safetensors(folder / "model.safetensors", {name.removeprefix("model."): held[name] for name in held})


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
@pytest.mark.parametrize("tied", (False, True))
def test_tensors_saved_without_the_prefix(tiny: Tiny, tmp_path: Path, family: str, tied: bool) -> None:
    folder = tiny(tmp_path / "model", family, tied=tied)
    without_prefix(folder)
    expected = transformers_logits(folder)
    found = exported_logits(folder, tmp_path / "out")
    np.testing.assert_allclose(found, expected[:, : found.shape[1]], atol=1e-4)


def test_shards_saved_without_the_prefix(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(tmp_path, shards=2)
    held = weights(json.loads((folder / "config.json").read_text()))
    index = folder / "model.safetensors.index.json"
    shard_of = json.loads(index.read_text())["weight_map"]
    for shard in set(shard_of.values()):
        names = [name for name in held if shard_of[name] == shard]
        save_safetensors(folder / shard, {name.removeprefix("model."): held[name] for name in names})
    edit_json(index, weight_map={name.removeprefix("model."): shard for name, shard in shard_of.items()})
    tensors = Checkpoint.open(folder).tensors
    for name, array in held.items():
        np.testing.assert_array_equal(read_tensor(tensors[name]), array)


def test_some_tensors_without_the_prefix(tiny: Tiny, tmp_path: Path) -> None:
    tiny(tmp_path)
    held = weights(json.loads((tmp_path / "config.json").read_text()))
    held["norm.weight"] = held.pop("model.norm.weight")
    save_safetensors(tmp_path / "model.safetensors", held)
    with pytest.raises(BadCheckpoint, match=r"no tensor model\.norm\.weight"):
        Checkpoint.open(tmp_path)


def test_a_head_is_missing_beside_tensors_without_the_prefix(tiny: Tiny, tmp_path: Path) -> None:
    tiny(tmp_path)
    held = weights(json.loads((tmp_path / "config.json").read_text()))
    del held[HEAD]
    save_safetensors(tmp_path / "model.safetensors", {name.removeprefix("model."): held[name] for name in held})
    with pytest.raises(BadCheckpoint, match=r"no tensor lm_head\.weight"):
        Checkpoint.open(tmp_path)
