"""Weights that are prepared: taken bit for bit, in their own formats and orders, everything else from the recipe."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny import weights

from pard_onnx.export.exporter import Job, export
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.families import shapes
from pard_onnx.models.json_files import read_json
from pard_onnx.models.manifest import Manifest, Source
from pard_onnx.models.precision import INT4, INT8, Format, Recipe
from pard_onnx.quantize.packing.pack import Float, PackedRows, RoundingError, format_for_width, pack
from pard_onnx.quantize.packing.prepared import EMBEDDING, HEAD, ColumnOrder, Formats

Tiny = Callable[..., Path]
ZP32 = Format("nbits", 4, 32, symmetric=False)
FLAT = Format("nbits", 8, 32)


class Held:
    """Float matrices packed when they are asked for: the protocol's smallest true implementation."""

    def __init__(
        self,
        matrices: dict[str, tuple[Float, Format]],
        orders: dict[str, ColumnOrder] | None = None,
        vectors: dict[str, Float] | None = None,
    ) -> None:
        self.matrices, self.orders, self.vectors = matrices, orders or {}, vectors or {}

    def format(self, name: str) -> Format | None:
        return self.matrices[name][1] if name in self.matrices else None

    def rows(self, name: str, rows: slice) -> PackedRows:
        weight, fmt = self.matrices[name]
        return pack(np.ascontiguousarray(weight[rows]), fmt)

    def error(self, name: str) -> RoundingError:
        return RoundingError(1.0, 4.0)

    def order(self, name: str) -> ColumnOrder | None:
        return self.orders.get(name)

    def vector(self, name: str) -> Float | None:
        return self.vectors.get(name)


def run(root: Path, prepared: Held) -> tuple[Manifest, onnx.ModelProto]:
    job = Job(Checkpoint.open(root / "model"), Source("tiny"), root / "out", "int8", prepared=prepared)
    return export(job), onnx.load(root / "out" / "model.onnx")


def tensors(root: Path) -> dict[str, Float]:
    return weights(read_json(root / "model" / "config.json"))


def stored(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


UP = "model.layers.1.mlp.up_proj"


def test_a_prepared_matrix_is_stored_bit_for_bit(tmp_path: Path, tiny: Tiny) -> None:
    tiny(tmp_path / "model")
    weight = tensors(tmp_path)[f"{UP}.weight"]
    manifest, model = run(tmp_path, Held({UP: (weight, ZP32)}))
    found, expected = stored(model), pack(weight, ZP32)
    for part in ("weight", "scale", "zero_point"):
        np.testing.assert_array_equal(found[f"{UP}.{part}"], getattr(expected, part))
    report = {tensor.name: tensor for tensor in manifest.tensors}
    assert (report[UP].format, report[UP].error) == ("int4-b32-zp", 0.5)
    assert report["model.layers.0.mlp.up_proj"].format == "int8-b64"


def test_an_order_gathers_the_input(tmp_path: Path, tiny: Tiny) -> None:
    """Columns and input shuffled alike: the same model. q, k and v of one order stay one matmul."""
    tiny(tmp_path / "model")
    order = np.random.default_rng(0).permutation(64)
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    held = {name: (tensors(tmp_path)[f"{name}.weight"][:, order], FLAT) for name in names}
    manifest, model = run(tmp_path, Held(held, dict.fromkeys(names, order)))
    gathers = [node for node in model.graph.node if node.op_type == "Gather" and ".order" in node.input[1]]
    assert len(gathers) == 1
    assert manifest.parity is not None and manifest.parity.mean_error < 0.05


def test_matrices_of_different_orders_are_not_joined() -> None:
    order, matrix = np.arange(32)[::-1], (np.zeros((1, 32), np.float32), FLAT)
    names = ["a", "b", "c"]
    for orders, joined in (({}, True), (dict.fromkeys(names, order), True), ({"a": order, "b": order}, False)):
        held = Held(dict.fromkeys(names, matrix), orders)
        assert Formats(Recipe(INT4, INT4, INT4), tied=False, prepared=held).joinable(names) is joined
    assert not Formats(Recipe(INT4, INT4, INT4, (("a", INT8),)), tied=False).joinable(names)


def test_a_vector_replaces_the_checkpoints(tmp_path: Path, tiny: Tiny) -> None:
    """A scale moved from a norm into the matrices that read it, as AWQ moves it."""
    tiny(tmp_path / "model")
    norm, readers = "model.layers.1.post_attention_layernorm.weight", [UP, UP.replace("up", "gate")]
    scale = np.random.default_rng(0).uniform(0.5, 2, 64).astype(np.float32)
    vectors = {norm: tensors(tmp_path)[norm] / scale}
    held = {name: (tensors(tmp_path)[f"{name}.weight"] * scale, FLAT) for name in readers}
    manifest, model = run(tmp_path, Held(held, vectors=vectors))
    np.testing.assert_array_equal(stored(model)[norm], vectors[norm])
    assert manifest.parity is not None and manifest.parity.mean_error < 0.05


@pytest.mark.parametrize("tied", (True, False))
def test_a_prepared_embedding(tmp_path: Path, tiny: Tiny, tied: bool) -> None:
    """Tied, it serves as the head too; otherwise the head keeps the recipe's format."""
    tiny(tmp_path / "model", tied=tied)
    weight = tensors(tmp_path)[f"{EMBEDDING}.weight"]
    manifest, model = run(tmp_path, Held({EMBEDDING: (weight, ZP32)}))
    expected = pack(weight, ZP32)
    rows = stored(model)[f"{EMBEDDING}.rows"]  # the same bytes, as a lookup sees them
    np.testing.assert_array_equal(rows.reshape(expected.weight.shape), expected.weight)
    found = {tensor.name: tensor.format for tensor in manifest.tensors}
    assert found[EMBEDDING] == "int4-b32-zp"
    assert found.get(HEAD) == (None if tied else "int8-b64")
    assert manifest.parity is not None and manifest.parity.top1_agreement > 0.3


def test_formats_of_a_tied_head() -> None:
    recipe = Recipe(INT4, head=INT8, embedding=INT4)
    assert [Formats(recipe, tied=True).of(name) for name in (HEAD, EMBEDDING)] == [INT8, INT8]
    assert [Formats(recipe, tied=False).of(name) for name in (HEAD, EMBEDDING)] == [INT8, INT4]
    held = Held({EMBEDDING: (np.zeros((1, 32), np.float32), FLAT)})
    assert [Formats(recipe, True, held).of(name) for name in (HEAD, EMBEDDING)] == [FLAT, FLAT]
    assert [Formats(recipe, False, held).of(name) for name in (HEAD, EMBEDDING)] == [INT8, FLAT]


def test_the_stored_recipe_is_what_was_done(tmp_path: Path, tiny: Tiny) -> None:
    """Blocks that the widths allow, prepared formats; of every matrix the format in which it is stored."""
    checkpoint = Checkpoint.open(tiny(tmp_path / "model", hidden=96, head_dim=32, intermediate=160))
    spec, prepared = checkpoint.spec, Held({"model.layers.1.mlp.up_proj": (np.zeros((160, 96), np.float32), ZP32)})
    wanted = Recipe(INT4, INT8, INT8, (("*.v_proj", INT8),))
    formats = Formats(wanted, spec.tied, prepared)
    found = formats.stored_recipe(spec)
    by32 = replace(INT4, block=32)
    assert found.matrices == by32  # 96 and 160 are multiples of 32, and of no more
    assert set(found.overrides) == {
        ("model.layers.1.mlp.up_proj", ZP32),
        ("*.v_proj", replace(INT8, block=32)),
        ("*.o_proj", INT4),
    }
    assert found.head == found.embedding == replace(INT8, block=32)
    for name, shape in shapes(spec):
        stem = name.removesuffix(".weight")
        if len(shape) == 2 and stem != EMBEDDING:
            assert found.of(stem) == format_for_width(formats.of(stem), shape[1], stem)
