"""An artifact's graph, its MatMulNBits nodes handed to this package's kernel.

The artifact stays as it is: the nodes are rewritten in memory. A node's weights are no longer constants of the
graph but places in the data file, which the operator reads while packing them: ONNX Runtime would keep its
constants in memory beside the packed ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import library
from .protobuf import BYTES, VARINT, Field, fields, message, text

GRAPH = "model.onnx"
DOMAIN, MICROSOFT, OPERATOR = "pard_onnx", "com.microsoft", "MatMulNBits"
FOLDER_OPTION = "session.model_external_initializers_file_folder_path"

# Field numbers of onnx.proto
MODEL_GRAPH, MODEL_OPSET = 7, 8
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_OUTPUT = 1, 5, 12
NODE_INPUT, NODE_OPERATOR, NODE_ATTRIBUTE, NODE_DOMAIN = 1, 4, 5, 7
ATTRIBUTE_NAME, ATTRIBUTE_INT, ATTRIBUTE_STRING, ATTRIBUTE_TYPE = 1, 3, 4, 20
TYPE_INT, TYPE_STRING = 2, 3
TENSOR_NAME, TENSOR_EXTERNAL = 8, 13
OPSET_DOMAIN, OPSET_VERSION = 1, 2

PARTS = {1: "B_offset", 2: "scales_offset", 3: "zero_points_offset"}  # inputs that become places in the file
G_IDX = 4


@dataclass
class Node:
    """A NodeProto: what the rewriting looks at, and the rest."""

    operator: str = ""
    domain: str = ""
    inputs: list[str] = field(default_factory=list)
    attributes: dict[str, int] = field(default_factory=dict)  # the whole numbers
    rest: list[Field] = field(default_factory=list)  # outputs, name, attributes

    @classmethod
    def parse(cls, data: bytes) -> Node:
        node = cls()
        for number, wire, value in fields(data):
            if number == NODE_INPUT:
                node.inputs.append(_text(value))
            elif number == NODE_OPERATOR:
                node.operator = _text(value)
            elif number == NODE_DOMAIN:
                node.domain = _text(value)
            else:
                node.rest.append((number, wire, value))
                if number == NODE_ATTRIBUTE:
                    parts = {n: v for n, _, v in fields(_bytes(value))}
                    if parts.get(ATTRIBUTE_TYPE) == TYPE_INT:
                        node.attributes[_text(parts[ATTRIBUTE_NAME])] = int(parts.get(ATTRIBUTE_INT, 0))
        return node

    def encode(self) -> bytes:
        names = [text(NODE_INPUT, name) for name in self.inputs]
        return message([*names, text(NODE_OPERATOR, self.operator), text(NODE_DOMAIN, self.domain), *self.rest])

    def set(self, name: str, value: int | str) -> None:
        kind = TYPE_INT if isinstance(value, int) else TYPE_STRING
        stored: Field = (
            (ATTRIBUTE_INT, VARINT, value) if isinstance(value, int) else text(ATTRIBUTE_STRING, value)
        )
        attribute = message([text(ATTRIBUTE_NAME, name), stored, (ATTRIBUTE_TYPE, VARINT, kind)])
        self.rest.append((NODE_ATTRIBUTE, BYTES, attribute))

    @property
    def fits(self) -> bool:
        """Whether the kernel has this node's format; others stay ONNX Runtime's."""
        a = self.attributes
        return (
            (self.domain, self.operator) == (MICROSOFT, OPERATOR)
            and a.get("accuracy_level") == 4
            and a.get("bits", 4) in (4, 8)
            and a.get("block_size") in (32, 64, 128)
            and a.get("K", 1) % a["block_size"] == 0
            and not (len(self.inputs) > G_IDX and self.inputs[G_IDX])
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Of an initializer in a data file."""

    file: str
    offset: int


def with_kernel(folder: Path, options: Any) -> bytes | Path:
    """What to open as a session instead of the folder's model.onnx, and SessionOptions prepared for it.

    Without the kernel (not built, switched off, other processor) the path of model.onnx and untouched options.
    ValueError if model.onnx is not an ONNX graph.
    """
    path = folder / GRAPH
    native = library()
    if native is None:
        return path
    graph = rewritten(path.read_bytes(), folder)
    if graph is None:
        return path
    options.register_custom_ops_library(str(native))
    options.add_session_config_entry(FOLDER_OPTION, str(folder))
    return graph


def rewritten(model: bytes, folder: Path) -> bytes | None:
    """The model with the kernel's operator wherever it fits; None where it fits nowhere."""
    out: list[Field] = []
    changed = False
    for number, wire, value in fields(model):
        if number == MODEL_GRAPH:
            graph = _graph(_bytes(value), folder)
            changed = graph is not None
            value = graph or value
        out.append((number, wire, value))
    out.append((MODEL_OPSET, BYTES, message([text(OPSET_DOMAIN, DOMAIN), (OPSET_VERSION, VARINT, 1)])))
    return message(out) if changed else None


def _graph(data: bytes, folder: Path) -> bytes | None:
    parts = list(fields(data))
    nodes = {i: Node.parse(_bytes(v)) for i, (n, _, v) in enumerate(parts) if n == GRAPH_NODE}
    fitting = [node for node in nodes.values() if node.fits]
    if not fitting:
        return None
    places = dict(_places(parts))
    before = Counter(name for node in nodes.values() for name in node.inputs)
    for node in fitting:
        _hand_over(node, places, folder)
    after = Counter(name for node in nodes.values() for name in node.inputs)
    unused = before.keys() - after.keys()
    out: list[Field] = []
    for i, (number, wire, value) in enumerate(parts):
        if number == GRAPH_NODE:
            value = nodes[i].encode()
        elif number == GRAPH_INITIALIZER and _name(_bytes(value)) in unused:
            continue
        out.append((number, wire, value))
    return message(out)


def _hand_over(node: Node, places: dict[str, Place], folder: Path) -> None:
    node.domain = DOMAIN
    names = {i: node.inputs[i] for i in PARTS if i < len(node.inputs) and node.inputs[i]}
    files = {places[name].file if name in places else None for name in names.values()}
    if len(files) != 1 or None in files:
        return  # weights within the graph: they stay its constants
    (file,) = files
    node.set("weights_file", str(folder / str(file)))
    for i, name in names.items():
        node.inputs[i] = ""
        node.set(PARTS[i], places[name].offset)
    while not node.inputs[-1]:
        node.inputs.pop()


def _places(parts: list[Field]) -> Iterator[tuple[str, Place]]:
    """The initializers that lie in a data file."""
    for number, _, value in parts:
        if number != GRAPH_INITIALIZER:
            continue
        entries: dict[str, str] = {}
        for n, _, v in fields(_bytes(value)):
            if n == TENSOR_EXTERNAL:
                pair = {k: _text(x) for k, _, x in fields(_bytes(v))}
                entries[pair[1]] = pair[2]
        if "location" in entries:
            yield _name(_bytes(value)), Place(entries["location"], int(entries.get("offset", "0")))


def _name(tensor: bytes) -> str:
    return next((_text(v) for n, _, v in fields(tensor) if n == TENSOR_NAME), "")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a message should be")
    return value


def _text(value: int | bytes) -> str:
    return _bytes(value).decode()
