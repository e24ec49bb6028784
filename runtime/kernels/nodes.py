"""The parts of ONNX's protobuf messages that rewriting a graph needs: nodes, inputs, and positions of initializers."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

from pard_onnx.models.protobuf import BYTES, VARINT, Field, fields, message, signed, text

# Field numbers of onnx.proto
MODEL_GRAPH, MODEL_OPSET = 7, 8
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT = 1, 5, 11, 12
NODE_INPUT, NODE_OUTPUT, NODE_OPERATOR, NODE_ATTRIBUTE, NODE_DOMAIN = 1, 2, 4, 5, 7
ATTRIBUTE_NAME, ATTRIBUTE_INT, ATTRIBUTE_STRING, ATTRIBUTE_TYPE = 1, 3, 4, 20
TYPE_INT, TYPE_STRING = 2, 3
VALUE_NAME, VALUE_TYPE = 1, 2
TYPE_TENSOR, TENSOR_ELEMENT, TENSOR_SHAPE, SHAPE_DIM, DIM_VALUE = 1, 1, 2, 1, 1
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME, TENSOR_RAW, TENSOR_EXTERNAL = 1, 2, 8, 9, 13
FLOAT, UINT8, INT64, FLOAT16 = 1, 2, 7, 10  # element types of tensors
LETTERS: dict[int | bytes, str] = {INT64: "q", FLOAT: "f"}  # of the struct module
ENTRY_KEY, ENTRY_VALUE = 1, 2
OPSET_DOMAIN, OPSET_VERSION = 1, 2


@dataclass
class Node:
    """A NodeProto. The parts that rewriting needs are decoded; the others are kept as they are."""

    operator: str = ""
    domain: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    attributes: dict[str, int] = field(default_factory=dict)  # those that are whole numbers
    attribute_names: set[str] = field(default_factory=set)  # of all attributes
    texts: dict[str, str] = field(default_factory=dict)  # the text attributes that `set` added
    rest: list[Field] = field(default_factory=list)  # all other fields, such as the name and all attributes

    @classmethod
    def parse(cls, data: bytes) -> Node:
        """The node in an encoded NodeProto."""
        node = cls()
        for number, wire, value in fields(data):
            if number == NODE_INPUT:
                node.inputs.append(as_text(value))
            elif number == NODE_OUTPUT:
                node.outputs.append(as_text(value))
            elif number == NODE_OPERATOR:
                node.operator = as_text(value)
            elif number == NODE_DOMAIN:
                node.domain = as_text(value)
            else:
                node.rest.append((number, wire, value))
                if number == NODE_ATTRIBUTE:
                    node._read(as_bytes(value))
        return node

    def _read(self, attribute: bytes) -> None:
        parts = {n: v for n, _, v in fields(attribute)}
        name = as_text(parts.get(ATTRIBUTE_NAME, b""))
        self.attribute_names.add(name)
        if parts.get(ATTRIBUTE_TYPE) == TYPE_INT:
            self.attributes[name] = signed(int(parts.get(ATTRIBUTE_INT, 0)))

    def encode(self) -> bytes:
        """The encoded NodeProto."""
        names = [text(NODE_INPUT, name) for name in self.inputs] + [text(NODE_OUTPUT, name) for name in self.outputs]
        return message([*names, text(NODE_OPERATOR, self.operator), text(NODE_DOMAIN, self.domain), *self.rest])

    def set(self, name: str, value: int | str) -> None:
        """Add an attribute."""
        stored: Field
        if isinstance(value, int):
            kind, stored = TYPE_INT, (ATTRIBUTE_INT, VARINT, value)
            self.attributes[name] = value
        else:
            kind, stored = TYPE_STRING, text(ATTRIBUTE_STRING, value)
            self.texts[name] = value
        attribute = message([text(ATTRIBUTE_NAME, name), stored, (ATTRIBUTE_TYPE, VARINT, kind)])
        self.rest.append((NODE_ATTRIBUTE, BYTES, attribute))


@dataclass(frozen=True, slots=True)
class FilePosition:
    """Where the data file has an initializer's values."""

    file: str
    offset: int  # bytes
    values: int  # how many the initializer has
    type: int  # their element type's number in TensorProto


def file_positions(graph: Iterable[Field]) -> Iterator[tuple[str, FilePosition]]:
    """The positions of the initializers that are in a data file, by name; `models.graph_file` has checked them."""
    for number, _, value in graph:
        if number != GRAPH_INITIALIZER:
            continue
        entries: dict[str, str] = {}
        parts = list(fields(as_bytes(value)))
        for n, _, v in parts:
            if n == TENSOR_EXTERNAL:
                pair = {k: as_text(x) for k, _, x in fields(as_bytes(v))}
                entries[pair.get(ENTRY_KEY, "")] = pair.get(ENTRY_VALUE, "")
        if "location" in entries:
            count = prod(int(v) for n, _, v in parts if n == TENSOR_DIMS)
            kind = next((int(v) for n, _, v in parts if n == TENSOR_TYPE), 0)
            yield (
                name_of(as_bytes(value), TENSOR_NAME),
                FilePosition(entries["location"], int(entries.get("offset", "0")), count, kind),
            )


def float16_initializers(graph: Iterable[Field]) -> set[str]:
    """The names of the initializers in float16."""
    tensors = (as_bytes(value) for number, _, value in graph if number == GRAPH_INITIALIZER)
    return {name_of(t, TENSOR_NAME) for t in tensors if any((n, v) == (TENSOR_TYPE, FLOAT16) for n, _, v in fields(t))}


def number_initializers(graph: Iterable[Field]) -> Iterator[tuple[str, tuple[float, ...]]]:
    """The values of the initializers in int64 or float32 that the graph itself holds as bytes, by name."""
    for number, _, value in graph:
        if number != GRAPH_INITIALIZER:
            continue
        tensor = {n: v for n, _, v in fields(as_bytes(value))}
        raw, letter = as_bytes(tensor.get(TENSOR_RAW, b"")), LETTERS.get(tensor.get(TENSOR_TYPE, 0))
        if letter and len(raw) % struct.calcsize(letter) == 0:
            yield (
                name_of(as_bytes(value), TENSOR_NAME),
                struct.unpack(f"<{len(raw) // struct.calcsize(letter)}{letter}", raw),
            )


@dataclass(frozen=True, slots=True)
class Value:
    """The type of a graph's input."""

    type: int  # the element type's number in TensorProto
    shape: tuple[int, ...]  # 0 for a dimension that is not fixed


def inputs(graph: Iterable[Field]) -> Iterator[tuple[str, Value]]:
    """The types of the graph's inputs that are tensors, by name."""
    for number, _, value in graph:
        if number != GRAPH_INPUT:
            continue
        data = as_bytes(value)
        for tensor in inside(inside([data], VALUE_TYPE), TYPE_TENSOR):
            dims = inside(inside([tensor], TENSOR_SHAPE), SHAPE_DIM)
            sizes = [{n: v for n, _, v in fields(dim)}.get(DIM_VALUE, 0) for dim in dims]
            element = next((v for n, _, v in fields(tensor) if n == TENSOR_ELEMENT), 0)
            yield name_of(data, VALUE_NAME), Value(int(element), tuple(map(int, sizes)))


def inside(messages: Iterable[bytes], number: int) -> list[bytes]:
    """All messages in field `number` of these messages."""
    return [as_bytes(v) for data in messages for n, _, v in fields(data) if n == number]


def name_of(data: bytes, number: int) -> str:
    """The text in field `number` of a message; empty if the field is missing."""
    return next((as_text(v) for n, _, v in fields(data) if n == number), "")


def as_bytes(value: int | bytes) -> bytes:
    """The value of a field that must be bytes; ValueError for a number."""
    if isinstance(value, int):
        raise ValueError("a number where a message should be")
    return value


def as_text(value: int | bytes) -> str:
    """The value of a field that must be text."""
    return as_bytes(value).decode()


OPERATOR = "GroupQueryAttention"
PAST_KEY, PAST_VALUE = 3, 4
INPUTS = {0: 7, 1: 9}  # number of inputs by do_rotary: the rotary tables come last
# A node with other attributes needs features that the kernels do not have.
ATTRIBUTES = {"num_heads", "kv_num_heads", "scale", "do_rotary", "local_window_size"}
RANK = 4  # of a KV cache
LANES = 16  # head_dim must be a multiple of it


def is_supported_attention(node: Node, domain: str, inputs: Mapping[str, Value]) -> bool:
    """Whether the kernels can run this node; inputs: of the graph, with the types of the KV caches."""
    if (node.domain, node.operator) != (domain, OPERATOR):
        return False
    heads, kv_heads = node.attributes.get("num_heads", 0), node.attributes.get("kv_num_heads", 0)
    return (
        INPUTS.get(node.attributes.get("do_rotary", 0)) == len(node.inputs)
        and node.attribute_names <= ATTRIBUTES
        and 0 < kv_heads <= heads
        and heads % kv_heads == 0
        and all(_is_supported_cache(inputs.get(node.inputs[i])) for i in (PAST_KEY, PAST_VALUE))
    )


def _is_supported_cache(value: Value | None) -> bool:
    """Whether a KV cache is float32 [batch, kv_heads, rows, head_dim] with a known head_dim, a multiple of LANES."""
    if value is None or value.type != FLOAT or len(value.shape) != RANK:
        return False
    return value.shape[-1] > 0 and value.shape[-1] % LANES == 0
