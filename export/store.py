"""Weights, streamed from safetensors into one external data file, packed on the way.

One block of rows is in memory at a time (plus the scales of its matrix), so the largest model needs
no more than the smallest. The same matrix asked for twice (tied embeddings) is stored once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pard_onnx.models.checkpoint import Checkpoint
from pard_onnx.models.families import shapes
from pard_onnx.models.manifest import TensorReport
from pard_onnx.models.precision import Floats, Format
from pard_onnx.models.tensors import read_tensor, require_finite, row_blocks
from pard_onnx.quantize.algorithms import Round
from pard_onnx.quantize.pack import Packed, fit_block, pack
from pard_onnx.quantize.parallel import in_order
from pard_onnx.quantize.prepared import Prepared
from pard_onnx.quantize.report import Error

ALIGNMENT = 4096  # of tensors in the data file: pages, so that they can be memory-mapped
Progress = Callable[[int], None]  # weights of matrices stored since the last call


def joined(names: Sequence[str]) -> str:
    """The name of matrices that are stored as one."""
    return "+".join([names[0], *(name.rsplit(".", 1)[-1] for name in names[1:])])


def _again(value: ir.Value) -> ir.Value:
    """A value of its own for each that reads it: several graphs may."""
    return ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A stored matrix [rows, width] as initializers: the parts of quantize.pack.Packed, by name."""

    name: str
    format: Format
    rows: int
    width: int
    parts: dict[str, ir.Value]


@dataclass(frozen=True, slots=True)
class Chosen:
    """Some rows of a matrix, rising, stored under a name of their own."""

    label: str
    rows: NDArray[np.int64]

    def within(self, block: slice) -> NDArray[np.int64]:
        """Those in a block, counted from its beginning."""
        first, last = np.searchsorted(self.rows, (block.start, block.stop))
        found: NDArray[np.int64] = self.rows[first:last] - block.start
        return found


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of a matrix that are read together; kept: those of them that are stored."""

    name: str
    rows: slice
    kept: slice | NDArray[np.int64]


@dataclass
class WeightStore:
    """Appends to `file`; the values it returns point into it. What is prepared is taken as it is."""

    checkpoint: Checkpoint
    file: BinaryIO
    location: str  # the file's name beside the graph
    progress: Progress = lambda _: None
    prepared: Prepared | None = None
    round: Round = pack
    scales: Floats = "float32"  # of packed blocks: the type of the activations beside them
    reports: list[TensorReport] = field(default_factory=list)
    _matrices: dict[tuple[tuple[str, ...], Format, bool, str | None], Matrix] = field(default_factory=dict)
    _shapes: dict[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self._shapes = dict(shapes(self.checkpoint.spec))

    def matrix(
        self, names: tuple[str, ...], fmt: Format, transposed: bool = False, chosen: Chosen | None = None
    ) -> Matrix:
        """The matrices `names` (checkpoint names without `.weight`), one above the other, in one format.

        transposed: [in, out], as a float MatMul and DynamicQuantizeMatMul want their weights. chosen: the rows that
        are stored, of one matrix; None for all.
        """
        key = (names, fmt, transposed, chosen.label if chosen else None)
        if key not in self._matrices:
            self._matrices[key] = self._store(names, fmt, transposed, chosen)
        found = self._matrices[key]
        return replace(found, parts={part: _again(value) for part, value in found.parts.items()})

    def vectors(self, names: tuple[str, ...], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
        """Vectors one after the other, cast; small enough to live in the graph."""
        return np.concatenate([self._cast(n, self._vector(n), dtype) for n in names])

    def norm(self, name: str, dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
        """What a norm multiplies by: its weight and what the family adds to it, summed in float32."""
        return self._cast(name, self._vector(name) + np.float32(self.checkpoint.spec.norm_offset), dtype)

    def add(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        """A constant of the exporter's own making."""
        return self._value(name, self._append([array]), array.shape, array.dtype)

    def _store(self, names: tuple[str, ...], fmt: Format, transposed: bool, chosen: Chosen | None) -> Matrix:
        extents = [self._shapes[f"{n}.weight"] for n in names]
        rows, width = sum(extent[0] for extent in extents) if chosen is None else len(chosen.rows), extents[0][1]
        fmt = fit_block(fmt, width, names[0])
        error, rest = self._known_error(names), []
        label = chosen.label if chosen else joined(names)
        if chosen is None and any(names == stored for stored, *_ in self._matrices):  # a tied matrix in two formats
            label += f".{fmt.name}"

        def weights() -> Iterator[NDArray[np.generic]]:
            for packed, block_error in in_order(lambda block: self._pack(block, fmt), self._blocks(names, chosen)):
                error.add(block_error)
                rest.append(Packed(packed.weight[:0], packed.scale, packed.zero_point))
                self.progress(packed.weight.shape[0] * width)
                yield packed.weight

        blocks: Iterator[NDArray[np.generic]] = weights()
        if transposed:
            blocks = iter([np.ascontiguousarray(np.concatenate(list(blocks)).T)])
        offset, shape, dtype = self._stream(blocks)
        shape = shape if transposed else (rows, *shape[1:])
        parts = {"weight": self._value(f"{label}.weight", offset, shape, dtype)}
        for part in ("scale", "zero_point"):
            arrays = [a for a in (getattr(p, part) for p in rest) if a is not None]
            if arrays:
                whole = np.concatenate(arrays)
                if part == "scale" and fmt.kind == "nbits":
                    whole = self._cast(names[0], whole, np.dtype(self.scales))
                parts[part] = self.add(f"{label}.{part}", whole)
        size = sum(v.const_value.nbytes for v in parts.values() if v.const_value is not None)
        self.reports.append(TensorReport(label, fmt.name, size, error.relative, error.relative_output))
        return Matrix(label, fmt, rows, width, parts)

    def _blocks(self, names: tuple[str, ...], chosen: Chosen | None) -> Iterator[Block]:
        for name in names:
            for rows in row_blocks(self._shapes[f"{name}.weight"]):
                kept = slice(None) if chosen is None else chosen.within(rows)
                if isinstance(kept, slice) or len(kept):
                    yield Block(name, rows, kept)

    def _pack(self, block: Block, fmt: Format) -> tuple[Packed, Error]:
        name, kept = block.name, block.kept
        if self.prepared and self.prepared.format(name) and fmt.kind == "nbits":
            return self.prepared.rows(name, block.rows).keep(kept), Error()  # its error is known of the whole
        weight = self._read(f"{name}.weight", block.rows)[kept]
        with np.errstate(over="ignore"):  # told below, by name
            packed = self.round(weight, fmt) if fmt.kind == "nbits" else pack(weight, fmt)
        if fmt.kind == "float16":
            require_finite(f"{name}.weight", packed.weight.astype(np.float32))  # beyond float16's range
        return packed, Error.of(weight, packed, fmt)

    def _is_prepared(self, name: str) -> bool:
        return self.prepared is not None and self.prepared.format(name) is not None

    def _known_error(self, names: tuple[str, ...]) -> Error:
        error = Error()
        for name in names:
            if self.prepared and self._is_prepared(name):
                error.add(self.prepared.error(name))
        return error

    def _vector(self, name: str) -> NDArray[np.float32]:
        replaced = self.prepared.vector(name) if self.prepared else None
        return self._read(name, None) if replaced is None else replaced

    def _read(self, name: str, rows: slice | None) -> NDArray[np.float32]:
        array = read_tensor(self.checkpoint.tensors[name], rows)
        require_finite(name, array)
        return array

    def _cast(self, name: str, array: NDArray[np.generic], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
        with np.errstate(over="ignore"):
            cast = array.astype(dtype)
        require_finite(name, cast)
        return cast

    def _append(self, arrays: list[NDArray[np.generic]]) -> int:
        return self._stream(iter(arrays))[0]

    def _stream(self, blocks: Iterator[NDArray[np.generic]]) -> tuple[int, tuple[int, ...], np.dtype[np.generic]]:
        """Write blocks behind one another; the offset, and shape and dtype of the last block."""
        self.file.write(b"\0" * (-self.file.tell() % ALIGNMENT))
        offset, shape = self.file.tell(), ()
        dtype: np.dtype[np.generic] = np.dtype(np.uint8)
        for block in blocks:
            self.file.write(np.ascontiguousarray(block).data)
            shape, dtype = block.shape, block.dtype
        return offset, shape, dtype

    def _value(self, name: str, offset: int, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> ir.Value:
        return self.alias(name, offset, shape, ir.DataType.from_numpy(dtype))

    def alias(self, name: str, offset: int, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
        """A value over bytes that are already in the file."""
        length = int(np.prod(shape)) * dtype.itemsize
        tensor = ir.ExternalTensor(
            self.location,
            offset,
            int(length),
            dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=Path(self.file.name).parent,
        )
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
