"""Rewrites an artifact's graph so that this package's kernels run its MatMulNBits and GroupQueryAttention nodes.

The graph is rewritten in memory; the artifact's files stay as they are. The weights of a rewritten matmul are no longer
initializers of the graph. The node has their positions in the data file instead, and the operator reads and packs them:
ONNX Runtime would keep initializers in memory, in addition to the packed weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pard_onnx.models.protobuf import BYTES, VARINT, Field, fields, message, text
from pard_onnx.runtime.kernels import library

from .gated import HALF, gate
from .minimums import MINIMUMS, Constants, join_minimums
from .nodes import (
    FLOAT,
    FLOAT16,
    GRAPH_INITIALIZER,
    GRAPH_NODE,
    GRAPH_OUTPUT,
    MODEL_GRAPH,
    MODEL_OPSET,
    OPSET_DOMAIN,
    OPSET_VERSION,
    TENSOR_NAME,
    UINT8,
    VALUE_NAME,
    FilePosition,
    Node,
    as_bytes,
    file_positions,
    float16_initializers,
    inputs,
    is_supported_attention,
    name_of,
    number_initializers,
)

DOMAIN, MICROSOFT, OPERATOR = "pard_onnx", "com.microsoft", "MatMulNBits"
FOLDER_OPTION = "session.model_external_initializers_file_folder_path"
# By the number of an input: the attribute with its position in the data file.
WEIGHTS, SCALES, ZERO_POINTS = 1, 2, 3
PARTS = {WEIGHTS: "B_offset", SCALES: "scales_offset", ZERO_POINTS: "zero_points_offset", MINIMUMS: "minimums_offset"}
G_IDX = 4
# A node with other attributes needs features that the kernels do not have, or sets what the rewriting sets
ATTRIBUTES = {"K", "N", "bits", "block_size", "accuracy_level"}


def with_kernel(path: Path, options: Any, model: bytes | None = None) -> bytes | Path:
    """The rewritten model at `path`, for a session with these SessionOptions, which are prepared for it.

    model: the file's bytes, which `models.graph_file.read_graph` has checked; None: they are read here. If the kernels
    cannot be used (not built, switched off, another processor, other formats), returns the path and does not change the
    options. Raises ValueError if the file is not an ONNX graph.
    """
    native = library()
    if native is None:
        return path
    try:
        graph = rewritten(path.read_bytes() if model is None else model, path.parent)
    except LookupError as error:  # a node without the inputs or outputs that its operator has
        raise ValueError(f"it is not an ONNX graph: {error!r}") from error
    if graph is None:
        return path
    options.register_custom_ops_library(str(native))
    options.add_session_config_entry(FOLDER_OPTION, str(path.parent))
    return graph


def rewritten(model: bytes, folder: Path) -> bytes | None:
    """The model with the kernels' operators where they can be used; None if they can be used nowhere."""
    out: list[Field] = []
    changed = False
    for number, wire, value in fields(model):
        if number == MODEL_GRAPH and (graph := _graph(as_bytes(value), folder)) is not None:
            value, changed = graph, True
        out.append((number, wire, value))
    out.append((MODEL_OPSET, BYTES, message([text(OPSET_DOMAIN, DOMAIN), (OPSET_VERSION, VARINT, 1)])))
    return message(out) if changed else None


def _graph(data: bytes, folder: Path) -> bytes | None:
    """The GraphProto with the kernels' operators; None if no node can be rewritten."""
    parts = list(fields(data))
    nodes = [Node.parse(as_bytes(v)) for n, _, v in parts if n == GRAPH_NODE]
    values, float16 = dict(inputs(parts)), float16_initializers(parts)
    outputs = {name_of(as_bytes(v), VALUE_NAME) for n, _, v in parts if n == GRAPH_OUTPUT}
    positions, halves = dict(file_positions(parts)), _widened(nodes, float16)
    matmuls = [
        node
        for node in nodes
        if _is_supported(node) and not float16 & set(node.inputs) and _fits(node, positions, halves)
    ]
    attentions = [node for node in nodes if is_supported_attention(node, MICROSOFT, values)]
    if not matmuls and not attentions:
        return None
    used = _used(nodes)
    for node in attentions:
        node.domain = DOMAIN
    supported = {id(node) for node in matmuls}
    widened = {wide: half for wide, half in halves.items() if half in positions}
    sizes = {half: positions[half].values for half in widened.values()}
    constants = Constants(widened, sizes, dict(number_initializers(parts)))
    nodes = join_minimums(
        nodes,
        lambda node: id(node) in supported and _is_joinable(node, positions, halves),
        constants,
        outputs,
    )
    for node in matmuls:
        _rewrite_matmul(node, positions, halves, folder)
    nodes = gate(nodes, DOMAIN, OPERATOR, outputs)
    unused = used - _used(nodes)
    nodes = [node for node in nodes if not (set(node.outputs) <= unused & set(halves))]
    unused = used - _used(nodes)
    out: list[Field] = [(GRAPH_NODE, BYTES, node.encode()) for node in nodes]
    for number, wire, value in parts:
        dropped = number == GRAPH_INITIALIZER and name_of(as_bytes(value), TENSOR_NAME) in unused
        if number != GRAPH_NODE and not dropped:
            out.append((number, wire, value))
    return message(out)


def _used(nodes: Iterable[Node]) -> set[str]:
    """The names of all inputs of the nodes."""
    return {name for node in nodes for name in node.inputs}


def _widened(nodes: Iterable[Node], float16: set[str]) -> dict[str, str]:
    """The initializers in float16 that a Cast makes float32, by the names of the Casts' outputs."""
    casts = (node for node in nodes if (node.domain, node.operator, node.attributes.get("to")) == ("", "Cast", FLOAT))
    return {node.outputs[0]: node.inputs[0] for node in casts if node.inputs[0] in float16}


def _is_supported(node: Node) -> bool:
    """Whether the kernels support this node's format; ONNX Runtime runs the other nodes."""
    numbers = node.attributes
    return (
        (node.domain, node.operator) == (MICROSOFT, OPERATOR)
        and numbers.get("accuracy_level") == 4
        and numbers.get("bits", 4) in (4, 8)
        and numbers.get("block_size") in (32, 64, 128)
        and min(numbers.get("K", 0), numbers.get("N", 0)) > 0
        and numbers["K"] % numbers["block_size"] == 0
        and node.attribute_names <= ATTRIBUTES
        and len(node.inputs) > SCALES
        and not (len(node.inputs) > G_IDX and node.inputs[G_IDX])
    )


def _fits(node: Node, positions: dict[str, FilePosition], halves: dict[str, str]) -> bool:
    """Whether the tensors of a matmul that are in a data file have as many values as its attributes say.

    The kernels read as many as the attributes say; ONNX Runtime refuses a node that does not fit.
    """
    columns, rows, bits = (node.attributes.get(name, 4) for name in ("K", "N", "bits"))
    blocks = columns // node.attributes["block_size"]
    wanted = {
        WEIGHTS: (UINT8, rows * columns * bits // 8),
        SCALES: (FLOAT16 if node.inputs[SCALES] in halves else FLOAT, rows * blocks),
        ZERO_POINTS: (UINT8, rows * -(-blocks * bits // 8)),
    }
    named = ((fact, node.inputs[i]) for i, fact in wanted.items() if i < len(node.inputs))
    found = ((fact, positions.get(halves.get(name, name))) for fact, name in named)
    return all(position is None or fact == (position.type, position.values) for fact, position in found)


def _is_joinable(node: Node, positions: dict[str, FilePosition], halves: dict[str, str]) -> bool:
    """Whether a matmul can take minimums: 4 bits, no zero points, scales in float16, and all in a data file."""
    if node.attributes.get("bits", 4) != 4 or any(node.inputs[ZERO_POINTS : ZERO_POINTS + 1]):
        return False
    return node.inputs[1] in positions and halves.get(node.inputs[SCALES]) in positions


def _rewrite_matmul(node: Node, positions: dict[str, FilePosition], halves: dict[str, str], folder: Path) -> None:
    """Make the node the kernels' operator.

    positions: of initializers in a data file, by name. halves: initializers in float16, by the names of their float32.
    """
    node.domain = DOMAIN
    names = {i: node.inputs[i] for i in PARTS if i < len(node.inputs) and node.inputs[i]}
    half = names[SCALES] in halves
    names[SCALES] = halves.get(names[SCALES], names[SCALES])
    found = {i: positions[name] for i, name in names.items() if name in positions}
    files = {position.file for position in found.values()}
    if len(found) < len(names) or len(files) != 1:
        return  # the weights are in the graph itself, and stay its initializers
    node.set("weights_file", str(folder / files.pop()))
    if half:
        node.set(HALF, 1)
    for i, position in found.items():
        node.inputs[i] = ""
        node.set(PARTS[i], position.offset)
    while not node.inputs[-1]:
        node.inputs.pop()
