"""Tensors of GGUF files: the floats of the gguf package, whole and by any block of rows; the integers of the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf_files
import numpy as np
import pytest

from pard_onnx.models.checkpoints.checkpoint import Checkpoint, read_tensor
from pard_onnx.models.checkpoints.gguf.types import TYPES, GgmlType, GgufMatrix, GgufTensor
from pard_onnx.quantize.packing.imported import imported_matrices

Tiny = Callable[..., Path]
SHAPE = {"layers": 1, "hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "intermediate": 512}
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "smollm3", "gemma3_text")


def floats(checkpoint: Checkpoint, name: str, rows: slice) -> np.ndarray:
    matrix = name.removesuffix(".weight")
    matrices = imported_matrices(checkpoint)
    if matrices and matrix in checkpoint.packed:
        return matrices.dequantized(matrix, rows)
    return read_tensor(checkpoint.tensors[name], rows)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """llama: the rows of q and k are in another order in the file, so rows cross the blocks that are read."""
    path = tmp_path / "model.gguf"
    truth = Checkpoint.open(gguf_files.write(path, tiny(tmp_path / "tiny", "llama", **SHAPE), kind))
    found = Checkpoint.open(path)
    assert {f"{name}.weight" for name in found.packed} | set(found.tensors) == set(truth.tensors)
    assert (kind in ("Q4_0", "Q4_1", "Q8_0")) == bool(found.packed)
    for name, tensor in truth.tensors.items():
        for rows in (slice(0, tensor.shape[0]), slice(3, 68), slice(65, 66)):
            expected = read_tensor(tensor, rows)
            np.testing.assert_array_equal(expected, floats(found, name, rows), err_msg=f"{name} {rows}")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tiny: Tiny, tmp_path: Path, family: str) -> None:
    path = tmp_path / "model.gguf"
    truth = Checkpoint.open(gguf_files.write(path, tiny(tmp_path / "tiny", family), "F16", kinds={"ffn_up": "BF16"}))
    found = Checkpoint.open(path)
    assert set(truth.tensors) == set(found.tensors)
    for name, tensor in truth.tensors.items():
        np.testing.assert_array_equal(read_tensor(tensor), read_tensor(found.tensors[name]), err_msg=name)


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q8_0", 8)])
def test_integers_are_those_of_the_file(tiny: Tiny, tmp_path: Path, kind: str, bits: int) -> None:
    path = tmp_path / "model.gguf"
    gguf_files.write(path, tiny(tmp_path / "tiny", "qwen2"), kind, kinds={"attn_v": "F32"})
    found = Checkpoint.open(path)
    assert found.bits == bits and found.quantization is not None and found.quantization.method == "gguf"
    assert "model.layers.0.self_attn.v_proj.weight" in found.tensors
    matrix = found.packed["model.layers.0.mlp.down_proj"]
    assert isinstance(matrix, GgufMatrix)
    raw = path.read_bytes()[matrix.tensor.offset :]
    for row in (0, 5, 63):
        levels, scales = matrix.levels(slice(row, row + 1))[0], matrix.scales(slice(row, row + 1))[0]
        for block in range(3):
            size = 2 + 32 * bits // 8
            stored = raw[(row * 3 + block) * size : (row * 3 + block + 1) * size]
            assert np.frombuffer(stored[:2], "<f2")[0] == scales[block]
            own = levels[block * 32 : block * 32 + 32].tolist()
            if bits == 8:
                assert [b - 256 if b > 127 else b for b in stored[2:]] == [level - 128 for level in own]
            else:
                assert [b & 15 for b in stored[2:]] + [b >> 4 for b in stored[2:]] == own


@pytest.mark.parametrize("kind", [kind for kind in TYPES.values() if kind.integers], ids=lambda kind: kind.name)
def test_integers_stand_for_the_floats(tiny: Tiny, tmp_path: Path, kind: GgmlType) -> None:
    """A block of equal weights has the scale 0 in Q4_1."""
    path, folder = tmp_path / "model.gguf", tiny(tmp_path / "tiny", "llama")
    gguf_files.write(path, folder, "F32")
    weights = read_tensor(Checkpoint.open(path).tensors["model.layers.0.mlp.up_proj.weight"])
    weights[3, 32:] = 0.25
    data = gguf_files.encoded(weights, kind.name)
    (tmp_path / "rows").write_bytes(data.tobytes())
    matrix = GgufMatrix(GgufTensor(tmp_path / "rows", kind, weights.shape, 0))
    rows = slice(2, 40)
    levels = matrix.levels(rows).reshape(38, 2, 32).astype(np.float32)
    if matrix.has_minimums:
        found = levels * matrix.scales(rows)[..., None] + matrix.minimums(rows)[..., None]
    else:
        found = (levels - (1 << (matrix.bits - 1))) * matrix.scales(rows)[..., None]
    np.testing.assert_array_equal(found.reshape(38, 64), gguf_files.decoded(data, kind.name)[rows])
