"""A graph's file, checked before ONNX Runtime or this package's kernels read it.

A graph from a stranger may name any file as its weights, have operators that read files or never end, and repeat a
field so that two readers see two graphs. What `pard-export` writes has none of this, so it is refused: the operators
are those of `models.devices`, and the only tensors outside the graph's file are initializers in files that the manifest
lists. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice
from math import prod
from pathlib import Path

from .devices import DEVICES
from .errors import BadArtifact, shown
from .folder_files import read_file
from .protobuf import Field, fields, signed

MOST_BYTES = (1 << 31) - 1  # the format's own limit
MOST_FIELDS = 1 << 20  # graphs of fixed shapes have 3,000 a layer
MOST_DIMENSIONS = 8
OPERATORS = frozenset(name for device in DEVICES.values() for name in device.operators)
MODEL_GRAPH, MODEL_TRAINING, MODEL_FUNCTION = 7, 20, 25
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_SPARSE = 1, 5, 15
NODE_OPERATOR, NODE_ATTRIBUTE, NODE_DOMAIN = 4, 5, 7
ATTRIBUTE_NAME, ATTRIBUTE_TENSOR, ATTRIBUTE_TENSORS = 1, 5, 10
GRAPHS = {6, 11, 22, 23}  # of attributes: subgraphs and sparse tensors
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME, TENSOR_EXTERNAL, TENSOR_PLACE = 1, 2, 8, 13, 14
ENTRY_KEY, ENTRY_VALUE = 1, 2
ENTRIES = {"location", "offset", "length", "checksum"}
BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4}
NUMBER = re.compile(r"[0-9]{1,19}", re.ASCII)


def read_graph(path: Path, files: Mapping[str, int]) -> bytes:
    """The bytes of a graph's file. files: the sizes of the files that the manifest lists, by name.

    Raises BadArtifact for a file that is no graph of an export, or names others than these files.
    """
    data = read_file(path, MOST_BYTES, BadArtifact)
    try:
        _Check(files).model(data)
    except ValueError as problem:  # UnicodeDecodeError is one
        raise BadArtifact(
            f"{path}: is not a graph that pard-export writes: {problem}; export or download the folder again"
        ) from problem
    return data


class _Check:
    """Reads a model's fields and raises ValueError for what no export has."""

    def __init__(self, files: Mapping[str, int]) -> None:
        self.files = files
        self.left = MOST_FIELDS

    def model(self, data: bytes) -> None:
        parts = self.fields(data)
        if any(number in (MODEL_TRAINING, MODEL_FUNCTION) for number, _, _ in parts):
            raise ValueError("it has functions or training steps")
        graph = _only(parts, MODEL_GRAPH)
        if graph is None:
            raise ValueError("it has no graph")
        names = set()
        for number, _, value in self.fields(_message(graph)):
            if number == GRAPH_NODE:
                self.node(_message(value))
            elif number == GRAPH_SPARSE:
                raise ValueError("it has sparse tensors")
            elif number == GRAPH_INITIALIZER:
                name = self.tensor(_message(value), may_be_outside=True)
                if name in names:
                    raise ValueError(f"it has the tensor {shown(name)} twice")
                names.add(name)

    def node(self, data: bytes) -> None:
        parts = self.fields(data)
        domain, operator = (_text(_only(parts, number)) for number in (NODE_DOMAIN, NODE_OPERATOR))
        name = f"{domain}.{operator}" if domain else operator
        if name not in OPERATORS:
            raise ValueError(f"it has the operator {shown(name)}")
        names = [self.attribute(_message(value)) for number, _, value in parts if number == NODE_ATTRIBUTE]
        if len(set(names)) < len(names):
            raise ValueError(f"a node {shown(name)} has an attribute twice")

    def attribute(self, data: bytes) -> str:
        """The attribute's name."""
        parts = self.fields(data)
        if any(number in GRAPHS for number, _, _ in parts):
            raise ValueError("an attribute holds a graph or a sparse tensor")
        _only(parts, ATTRIBUTE_TENSOR)
        for number, _, value in parts:
            if number in (ATTRIBUTE_TENSOR, ATTRIBUTE_TENSORS):
                self.tensor(_message(value), may_be_outside=False)
        return _text(_only(parts, ATTRIBUTE_NAME))

    def tensor(self, data: bytes, *, may_be_outside: bool) -> str:
        """The tensor's name, once it is known where its values are."""
        parts = self.fields(data)
        name, kind, place = (_only(parts, number) for number in (TENSOR_NAME, TENSOR_TYPE, TENSOR_PLACE))
        entries = [self.entry(_message(value)) for number, _, value in parts if number == TENSOR_EXTERNAL]
        if (place == 1) != bool(entries) or (entries and not may_be_outside):
            raise ValueError(f"the tensor {shown(_text(name))} is half outside of the graph")
        if entries:
            self.require_within(_text(name), _bits(kind, _dims(parts)), entries)
        return _text(name)

    def entry(self, data: bytes) -> tuple[str, str]:
        parts = self.fields(data)
        return _text(_only(parts, ENTRY_KEY)), _text(_only(parts, ENTRY_VALUE))

    def require_within(self, name: str, bits: int, entries: list[tuple[str, str]]) -> None:
        """ValueError unless a tensor of this size lies within one of the files."""
        values = dict(entries)
        if len(values) < len(entries) or not values.keys() <= ENTRIES or "location" not in values:
            raise ValueError(f"the place of the tensor {shown(name)} is not clear")
        file, nbytes = values["location"], -(-bits // 8)
        numbers = values.get("offset", "0"), values.get("length", str(nbytes))
        if not all(NUMBER.fullmatch(number) for number in numbers):
            raise ValueError(f"the tensor {shown(name)} is at {shown(values)}")
        offset, length = map(int, numbers)
        if file not in self.files:
            raise ValueError(f"the tensor {shown(name)} is in the file {shown(file)}, which the manifest does not list")
        if length != nbytes or offset + length > self.files[file]:
            raise ValueError(
                f"the tensor {shown(name)} of {shown(nbytes)} bytes is in bytes {offset} to {offset + length} "
                f"of {file}, which has {self.files[file]}"
            )

    def fields(self, data: bytes) -> list[Field]:
        found = list(islice(fields(data), self.left + 1))
        self.left -= len(found)
        if self.left < 0:
            raise ValueError(f"it has more than {MOST_FIELDS} fields")
        return found


def _only(parts: list[Field], number: int) -> int | bytes | None:
    """The value of a field that may be there once: of several, readers take one, or join them."""
    found = [value for n, _, value in parts if n == number]
    if len(found) > 1:
        raise ValueError(f"field {number} of a message is there twice")
    return found[0] if found else None


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a message should be")
    return value


def _text(value: int | bytes | None) -> str:
    return _message(value or b"").decode()


def _dims(parts: list[Field]) -> list[int]:
    """The dimensions of a tensor. ValueError for packed ones, which no export writes."""
    found = [value for number, _, value in parts if number == TENSOR_DIMS]
    if any(isinstance(value, bytes) for value in found):
        raise ValueError("the dimensions of a tensor are packed")
    return [signed(int(value)) for value in found]


def _bits(kind: int | bytes | None, dims: list[int]) -> int:
    """The bits of a tensor of this element type and these dimensions."""
    size = BITS.get(kind) if isinstance(kind, int) else None
    if size is None or len(dims) > MOST_DIMENSIONS or min(dims, default=0) < 0:
        raise ValueError(f"it has a tensor of type {shown(kind)} and dimensions {shown(dims)}")
    return prod(dims) * size
