"""Float exports read as checkpoints: their weights, and what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pard_onnx.export.float_export import Columns, FloatExport, tensor_names
from pard_onnx.export.store import joined
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.tensors import read_tensor
from pard_onnx.models.errors import BadArtifact, BadInput

Exported = Callable[..., tuple[Path, Path]]


def test_what_is_quantized_already_is_refused(exported: Exported) -> None:
    with pytest.raises(BadInput, match=r"is quantized already \(int4.* rounding twice .* tiny, or an export"):
        FloatExport.open(exported("qwen2", "target", "int4")[1])


def test_damage_is_found_before_anything_is_read(exported: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(exported("qwen2", "target", "fp32", verify=False)[1], folder)
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[5000] ^= 1
    (folder / "model.onnx.data").write_bytes(data)
    with pytest.raises(BadArtifact, match=r"model\.onnx\.data: has been changed"):
        FloatExport.open(folder)


@pytest.mark.parametrize(("family", "attention"), (("llama", "portable"), ("qwen2", "gqa"), ("qwen3", "gqa")))
def test_every_weight_is_the_checkpoints(exported: Exported, family: str, attention: str) -> None:
    folder, artifact = exported(family, "target", "fp32", attention=attention, verify=False)
    expected, found = Checkpoint.open(folder), FloatExport.open(artifact).checkpoint
    assert list(found.tensors) == list(expected.tensors) and found.spec == expected.spec
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(read_tensor(found.tensors[name]), read_tensor(tensor))
        np.testing.assert_array_equal(read_tensor(found.tensors[name], slice(3, 8)), read_tensor(tensor, slice(3, 8)))


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 9), width=st.integers(1, 7), before=st.integers(0, 4), after=st.integers(0, 4), data=st.data()
)
def test_columns_are_the_rows_of_the_matrix_transposed(
    tmp_path_factory: pytest.TempPathFactory, rows: int, width: int, before: int, after: int, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("columns") / "data"
    whole = np.random.default_rng(0).normal(size=(width, before + rows + after)).astype(np.float32)
    path.write_bytes(b"head" + whole.tobytes())
    tensor = Columns(path, "F32", (rows, width), 4 + 4 * before, whole.shape[1])
    first, stop = sorted((data.draw(st.integers(0, rows)), data.draw(st.integers(0, rows))))
    found = read_tensor(tensor, slice(first, stop))
    np.testing.assert_array_equal(found, whole.T[before + first : before + stop])
    assert tensor.nbytes == 4 * rows * width and found.flags.writeable


def test_names_of_what_is_stored_together() -> None:
    names = [f"model.layers.3.self_attn.{part}_proj" for part in "qkv"]
    for kind in ("weight", "bias"):
        assert tensor_names(f"{joined(names)}.{kind}") == [f"{name}.{kind}" for name in names]
    assert tensor_names("+".join(f"{name}.bias" for name in names)) == [f"{name}.bias" for name in names]
    assert tensor_names("plain.model.norm.weight") == ["model.norm.weight"] == tensor_names("model.norm.weight")
