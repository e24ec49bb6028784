"""An artifact's graph, its MatMulNBits and GroupQueryAttention nodes handed to this package's kernels.

The artifact stays as it is: the nodes are rewritten in memory. A node's weights are no longer constants of the
graph but places in the data file, which the operator reads while packing them: ONNX Runtime would keep its
constants in memory beside the packed ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pard_onnx.runtime.kernels import library

from .gated import gate
from .nodes import (
    GRAPH_INITIALIZER,
    GRAPH_NODE,
    GRAPH_OUTPUT,
    MODEL_GRAPH,
    MODEL_OPSET,
    OPSET_DOMAIN,
    OPSET_VERSION,
    TENSOR_NAME,
    VALUE_NAME,
    Node,
    Place,
    as_bytes,
    attends,
    halves,
    inputs,
    name_of,
    places,
)
from .protobuf import BYTES, VARINT, Field, fields, message, text

DOMAIN, MICROSOFT, OPERATOR = "pard_onnx", "com.microsoft", "MatMulNBits"
FOLDER_OPTION = "session.model_external_initializers_file_folder_path"
PARTS = {1: "B_offset", 2: "scales_offset", 3: "zero_points_offset"}  # inputs that become places in the file
G_IDX = 4


def with_kernel(path: Path, options: Any) -> bytes | Path:
    """What to open as a session instead of an artifact's graph, and its SessionOptions prepared for that.

    Without the kernels (not built, switched off, other processor, other formats) the path, and the options
    untouched. ValueError if the file is not an ONNX graph.
    """
    folder = path.parent
    native = library()
    graph = None if native is None else rewritten(path.read_bytes(), folder)
    if graph is None:
        return path
    options.register_custom_ops_library(str(native))
    options.add_session_config_entry(FOLDER_OPTION, str(folder))
    return graph


def rewritten(model: bytes, folder: Path) -> bytes | None:
    """The model with the kernels' operators wherever they fit; None where they fit nowhere."""
    out: list[Field] = []
    changed = False
    for number, wire, value in fields(model):
        if number == MODEL_GRAPH and (graph := _graph(as_bytes(value), folder)) is not None:
            value, changed = graph, True
        out.append((number, wire, value))
    out.append((MODEL_OPSET, BYTES, message([text(OPSET_DOMAIN, DOMAIN), (OPSET_VERSION, VARINT, 1)])))
    return message(out) if changed else None


def _graph(data: bytes, folder: Path) -> bytes | None:
    parts = list(fields(data))
    nodes = [Node.parse(as_bytes(v)) for n, _, v in parts if n == GRAPH_NODE]
    values, narrow = dict(inputs(parts)), halves(parts)
    matmuls = [node for node in nodes if _fits(node) and not narrow & set(node.inputs)]
    attentions = [node for node in nodes if attends(node, MICROSOFT, values)]
    if not matmuls and not attentions:
        return None
    lying = dict(places(parts))
    used = _used(nodes)
    for node in attentions:
        node.domain = DOMAIN
    for node in matmuls:
        _hand_over(node, lying, folder)
    outputs = {name_of(as_bytes(v), VALUE_NAME) for n, _, v in parts if n == GRAPH_OUTPUT}
    nodes = gate(nodes, DOMAIN, OPERATOR, outputs)
    unused = used - _used(nodes)
    out: list[Field] = [(GRAPH_NODE, BYTES, node.encode()) for node in nodes]
    for number, wire, value in parts:
        dropped = number == GRAPH_INITIALIZER and name_of(as_bytes(value), TENSOR_NAME) in unused
        if number != GRAPH_NODE and not dropped:
            out.append((number, wire, value))
    return message(out)


def _used(nodes: Iterable[Node]) -> set[str]:
    return {name for node in nodes for name in node.inputs}


def _fits(node: Node) -> bool:
    """Whether the kernels have this node's format; others stay ONNX Runtime's."""
    numbers = node.attributes
    return (
        (node.domain, node.operator) == (MICROSOFT, OPERATOR)
        and numbers.get("accuracy_level") == 4
        and numbers.get("bits", 4) in (4, 8)
        and numbers.get("block_size") in (32, 64, 128)
        and numbers.get("K", 1) % numbers["block_size"] == 0
        and not (len(node.inputs) > G_IDX and node.inputs[G_IDX])
    )


def _hand_over(node: Node, lying: dict[str, Place], folder: Path) -> None:
    node.domain = DOMAIN
    names = {i: node.inputs[i] for i in PARTS if i < len(node.inputs) and node.inputs[i]}
    found = {i: lying[name] for i, name in names.items() if name in lying}
    files = {place.file for place in found.values()}
    if len(found) < len(names) or len(files) != 1:
        return  # weights within the graph: they stay its constants
    node.set("weights_file", str(folder / files.pop()))
    for i, place in found.items():
        node.inputs[i] = ""
        node.set(PARTS[i], place.offset)
    while not node.inputs[-1]:
        node.inputs.pop()
