"""Heads that are tied to the embedding: config.json says so, and the stored weights say whether it is true."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import STORED, edit_json, save_safetensors, weights

from pard_onnx.models.checkpoints import tensors as reading
from pard_onnx.models.checkpoints.checkpoint import EMBEDDING, Checkpoint
from pard_onnx.models.checkpoints.tensors import HEAD
from pard_onnx.models.errors import BadCheckpoint
from pard_onnx.models.families import FAMILIES

Tiny = Callable[..., Path]
Weights = dict[str, NDArray[np.float32]]


def write(tiny: Tiny, folder: Path, family: str = "qwen2", dtype: str = "float32") -> tuple[Path, Weights]:
    """A checkpoint whose config.json says tied and whose file holds another head, and its weights."""
    tiny(folder, family, dtype=dtype)
    held = weights(json.loads((folder / "config.json").read_text()))
    edit_json(folder / "config.json", tie_word_embeddings=True)
    return folder, held


@pytest.mark.parametrize("dtype", STORED)
def test_another_head_is_taken(tiny: Tiny, tmp_path: Path, dtype: str) -> None:
    folder, held = write(tiny, tmp_path, dtype=dtype)
    checkpoint = Checkpoint.open(folder)
    assert not checkpoint.spec.tied
    assert HEAD in checkpoint.tensors
    save_safetensors(folder / "model.safetensors", held | {HEAD: held[EMBEDDING]}, STORED[dtype])
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.spec.tied
    assert HEAD not in checkpoint.tensors


def test_the_comparison_reads_all_rows(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK_VALUES", 1000)  # 15 rows of 64
    folder, held = write(tiny, tmp_path)
    head = held[EMBEDDING].copy()
    head[-1, -1] += 1
    save_safetensors(folder / "model.safetensors", held | {HEAD: head})
    assert not Checkpoint.open(folder).spec.tied


@pytest.mark.parametrize("rows", (-1, 1))
def test_a_head_of_another_shape_is_refused(tiny: Tiny, tmp_path: Path, rows: int) -> None:
    folder, held = write(tiny, tmp_path)
    shape = (len(held[EMBEDDING]) + rows, held[EMBEDDING].shape[1])
    save_safetensors(folder / "model.safetensors", held | {HEAD: np.zeros(shape, np.float32)})
    with pytest.raises(BadCheckpoint, match=r"tensor lm_head.weight is \[\d+, 64\]; config.json says \[320, 64\]"):
        Checkpoint.open(folder)


def test_without_a_head(tiny: Tiny, tmp_path: Path) -> None:
    folder, held = write(tiny, tmp_path)
    del held[HEAD]
    save_safetensors(folder / "model.safetensors", held)
    assert Checkpoint.open(folder).spec.tied
    edit_json(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(BadCheckpoint, match=r"no tensor lm_head\.weight in its safetensors"):
        Checkpoint.open(folder)


def test_an_index_names_a_tied_head_that_no_shard_stores(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(tmp_path, tied=True, shards=2)
    index = folder / "model.safetensors.index.json"
    shard_of = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=shard_of | {HEAD: "model-00001-of-00002.safetensors"})
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.spec.tied
    assert set(shard_of) == set(checkpoint.tensors)
    edit_json(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(BadCheckpoint, match=r"no tensor lm_head\.weight in its safetensors"):
        Checkpoint.open(folder)


def test_an_index_names_a_tied_head_in_the_wrong_shard(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(tmp_path, shards=2)
    index = folder / "model.safetensors.index.json"
    shard_of = json.loads(index.read_text())["weight_map"]
    wrong = next(shard for shard in shard_of.values() if shard != shard_of[HEAD])
    edit_json(index, weight_map=shard_of | {HEAD: wrong})
    with pytest.raises(BadCheckpoint, match=r"has no tensor lm_head\.weight, which .* says it has"):
        Checkpoint.open(folder)


CASES = [(family, "another head") for family in FAMILIES]
CASES += [(family, case) for family in ("qwen2", "gemma3_text") for case in ("an equal head", "the head alone")]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_logits_are_those_of_transformers(tiny: Tiny, tmp_path: Path, family: str, case: str) -> None:
    """Its own loading is the reference here: what this package reads of the checkpoint takes no part."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from pard_onnx.export.exporter import Job, export
    from pard_onnx.export.verify.drive import drive
    from pard_onnx.models.manifest import Source

    folder, held = write(tiny, tmp_path / "model", family)
    if case == "an equal head":
        save_safetensors(folder / "model.safetensors", held | {HEAD: held[EMBEDDING]})
    if case == "the head alone":
        save_safetensors(folder / "model.safetensors", {name: held[name] for name in held if name != EMBEDDING})
    ids = np.arange(20, 45)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    manifest = export(Job(Checkpoint.open(folder), Source("tiny"), tmp_path / "out", "fp32"))
    found = drive(tmp_path / "out", manifest).step(ids)
    size = manifest.spec.vocabulary.size
    np.testing.assert_allclose(found[:, :size], expected[:, :size], atol=1e-4)
    assert manifest.spec.tied == (case != "another head")
