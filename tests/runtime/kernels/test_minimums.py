"""Matmuls whose matrices have minimums: one operator where the graph is as an export writes it, else left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf_files
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from pard_onnx.export_command import main
from pard_onnx.models.manifest import Manifest
from pard_onnx.runtime import kernels
from pard_onnx.runtime.kernels.graph import with_kernel
from pard_onnx.runtime.providers.discovery import require_installed
from pard_onnx.runtime.providers.threads import Threads
from pard_onnx.runtime.sessions.dynamic_shapes import FusedTarget

pytestmark = pytest.mark.skipif(kernels.isa() is None, reason="the kernels are not built")
Tiny = Callable[..., Path]
Edit = Callable[[onnx.GraphProto], None]
MATMULS = ["GatedMatMulNBits"] * 2 + ["MatMulNBits"] * 7  # of two layers: q/k/v, o, gate and up, down; and the head


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Path:
    folder = tmp_path_factory.mktemp("minimums")
    gguf_files.write(folder / "model.gguf", tiny(folder / "tiny", "qwen2", layers=2, tied=True), "Q4_1")
    assert main(["--model", str(folder / "model.gguf"), "--no-verify", "--output", str(folder / "out")]) == 0
    return folder / "out"


def rewritten(path: Path) -> onnx.GraphProto:
    graph = with_kernel(path, ort.SessionOptions())
    assert isinstance(graph, bytes)
    return onnx.load_from_string(graph).graph


def joined(graph: onnx.GraphProto) -> list[str]:
    """The kernels' matmuls that have minimums."""
    found = [node for node in graph.node if any(a.name.endswith("minimums_offset") for a in node.attribute)]
    assert all(node.domain == "pard_onnx" for node in found)
    return sorted(node.op_type for node in found)


def test_every_product_is_one_operator(artifact: Path) -> None:
    graph = rewritten(artifact / "model.onnx")
    assert joined(graph) == MATMULS
    assert not any(node.op_type == "MatMul" for node in graph.node)
    left = {name for node in graph.node for name in node.input}
    assert all(name.startswith("model.embed_tokens") for name in left if name.endswith(".minimum"))


def test_rows_do_not_depend_on_the_width(artifact: Path) -> None:
    session = FusedTarget(artifact, Manifest.read(artifact), require_installed("cpu"), Threads(2))
    ids = np.random.default_rng(0).integers(300, size=40).tolist()
    seen = []
    for widths in ([1] * 40, [40], [7] * 5 + [5], [2, 9, 29]):
        session.rollback(0)
        logits = [session.step(ids[session.length : session.length + width], width).logits.copy() for width in widths]
        seen.append(np.concatenate(logits).tobytes())
    assert seen[1:] == seen[:1] * 3


def chain(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """The nodes from which the second operand of the first product's sum is made, by their types."""
    makers = {name: node for node in graph.node for name in node.output}
    found, waiting = {}, [next(node for node in graph.node if node.op_type == "MatMul")]
    while waiting:
        node = waiting.pop()
        if node.op_type in ("MatMul", "ReduceSum", "Reshape", "Transpose", "Add", "Mul"):
            found[node.op_type] = node
            waiting += [makers[name] for name in node.input if name in makers and node.op_type != "Reshape"]
    return found


def constant(kind: str, index: int, values: np.ndarray) -> Edit:
    """Give a node of the chain another constant as an input."""

    def edit(graph: onnx.GraphProto) -> None:
        graph.initializer.append(numpy_helper.from_array(values, "changed"))
        chain(graph)[kind].input[index] = "changed"

    return edit


def keep_dimensions(graph: onnx.GraphProto) -> None:
    chain(graph)["ReduceSum"].attribute[0].i = 1


def other_scales(graph: onnx.GraphProto) -> None:
    chain(graph)["Mul"].input[0] = next(node.output[0] for node in graph.node if node.op_type == "Cast")


def other_input(graph: onnx.GraphProto) -> None:
    chain(graph)["Reshape"].input[0] = "input_ids"


def read_twice(graph: onnx.GraphProto) -> None:
    product = next(node for node in graph.node if node.op_type == "MatMulNBits")
    graph.node.append(onnx.helper.make_node("Identity", [product.output[0]], ["also.read"]))
    graph.output.append(onnx.helper.make_tensor_value_info("also.read", onnx.TensorProto.FLOAT, None))


@pytest.mark.parametrize(
    "edit",
    [
        constant("Mul", 1, np.array(7, np.float32)),
        constant("Reshape", 1, np.array([0, 0, 1, 64])),
        constant("ReduceSum", 1, np.array([-2])),
        keep_dimensions,
        other_scales,
        other_input,
        read_twice,
    ],
)
def test_other_graphs_are_left_alone(artifact: Path, tmp_path: Path, edit: Edit) -> None:
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    edit(model.graph)
    onnx.save(model, tmp_path / "model.onnx")
    assert len(joined(rewritten(tmp_path / "model.onnx"))) == len(MATMULS) - 1
