"""Weights, streamed from safetensors into one external data file, packed on the way.

A few blocks of rows are in memory at a time, plus the scales of their matrix, so memory does not grow with the model.
A matrix that is asked for twice (tied embeddings, several graphs) is stored once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.tensors import read_tensor, require_finite, row_blocks
from pard_onnx.models.families import shapes
from pard_onnx.models.manifest import TensorReport
from pard_onnx.models.precision import Floats, Format
from pard_onnx.quantize.algorithms.grid import Round
from pard_onnx.quantize.packing.pack import PackedRows, RoundingError, format_for_width, map_in_order, pack, unpack
from pard_onnx.quantize.packing.prepared import Prepared

ALIGNMENT = 4096  # of tensors in the data file: pages, so that they can be memory-mapped
Advance = Callable[[int], None]  # called with the number of weights stored since the last call


def joined(names: Sequence[str]) -> str:
    """The name under which several matrices are stored as one."""
    return "+".join([names[0], *(name.rsplit(".", 1)[-1] for name in names[1:])])


def _scale_type(scale: NDArray[np.generic], floats: Floats) -> np.dtype[np.generic]:
    """The type that a matrix's scales or minimums are stored in: float16 where it holds them exactly, else that of
    activations."""
    with np.errstate(over="ignore"):
        exact = np.array_equal(scale.astype(np.float16).astype(np.float32), scale)
    return np.dtype(np.float16) if exact else np.dtype(floats)


def _copy(value: ir.Value) -> ir.Value:
    """Another value for the same bytes: a value belongs to one graph, and several graphs may read the bytes."""
    return ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A stored matrix [rows, width]."""

    name: str
    format: Format
    rows: int
    width: int
    parts: dict[str, ir.Value]  # initializers: `weight` and, as the format has them, the others of PackedRows


@dataclass(frozen=True, slots=True)
class RowSelection:
    """The rows of a matrix that are stored, under another name than the whole matrix."""

    label: str  # the name
    rows: NDArray[np.int64]  # rising

    def within(self, block: slice) -> NDArray[np.int64]:
        """The selected rows in a block, counted from the block's beginning."""
        first, last = np.searchsorted(self.rows, (block.start, block.stop))
        found: NDArray[np.int64] = self.rows[first:last] - block.start
        return found


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Rows of a matrix that are read together."""

    name: str  # of the matrix
    rows: slice
    kept: slice | NDArray[np.int64]  # those of these rows that are stored, counted from the first


@dataclass
class WeightStore:
    """Packs a checkpoint's weights and appends them to `file`; the values that it returns point into the file.

    Prepared matrices are stored as they are.
    """

    checkpoint: Checkpoint
    file: BinaryIO
    location: str  # the file's name, relative to the graph
    advance: Advance = lambda _: None
    prepared: Prepared | None = None
    round: Round = pack  # for matrices that are not prepared
    scales: Floats = "float32"  # the type of scales of packed blocks, which is that of activations
    reports: list[TensorReport] = field(default_factory=list)
    _matrices: dict[tuple[tuple[str, ...], Format, bool, str | None], Matrix] = field(default_factory=dict)
    _shapes: dict[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self._shapes = dict(shapes(self.checkpoint.spec))

    def matrix(
        self, names: tuple[str, ...], fmt: Format, transposed: bool = False, selection: RowSelection | None = None
    ) -> Matrix:
        """The matrices `names` (checkpoint names without `.weight`), one above the other, in one format.

        transposed: stored as [in, out], which MatMul and DynamicQuantizeMatMul read. selection: the rows to store, of
        one matrix; None for all.
        """
        key = (names, fmt, transposed, selection.label if selection else None)
        if key not in self._matrices:
            self._matrices[key] = self._store(names, fmt, transposed, selection)
        found = self._matrices[key]
        return replace(found, parts={part: _copy(value) for part, value in found.parts.items()})

    def vectors(self, names: tuple[str, ...], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
        """Vectors one after the other, cast; small enough to live in the graph."""
        return np.concatenate([self._cast(n, self._vector(n), dtype) for n in names])

    def norm(self, name: str, dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
        """What a norm multiplies by: its weight and what the family adds to it, summed in float32."""
        return self._cast(name, self._vector(name) + np.float32(self.checkpoint.spec.norm_offset), dtype)

    def add(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        """Store a constant that is not a weight of the checkpoint."""
        return self._value(name, self._append([array]), array.shape, array.dtype)

    def _store(self, names: tuple[str, ...], fmt: Format, transposed: bool, selection: RowSelection | None) -> Matrix:
        extents = [self._shapes[f"{n}.weight"] for n in names]
        rows, width = sum(extent[0] for extent in extents) if selection is None else len(selection.rows), extents[0][1]
        fmt = format_for_width(fmt, width, names[0])
        error, rest = self._known_error(names), []
        label = selection.label if selection else joined(names)
        if selection is None and any(names == stored for stored, *_ in self._matrices):  # a tied matrix in two formats
            label += f".{fmt.name}"

        def weights() -> Iterator[NDArray[np.generic]]:
            for packed, block_error in map_in_order(
                lambda block: self._pack(block, fmt), self._blocks(names, selection)
            ):
                error.add(block_error)
                rest.append(replace(packed, weight=packed.weight[:0]))
                self.advance(packed.weight.shape[0] * width)
                yield packed.weight

        blocks: Iterator[NDArray[np.generic]] = weights()
        if transposed:
            blocks = iter([np.ascontiguousarray(np.concatenate(list(blocks)).T)])
        offset, shape, dtype = self._stream(blocks)
        shape = shape if transposed else (rows, *shape[1:])
        parts = {"weight": self._value(f"{label}.weight", offset, shape, dtype)}
        for part in ("scale", "zero_point", "minimum"):
            arrays = [a for a in (getattr(p, part) for p in rest) if a is not None]
            if arrays:
                whole = np.concatenate(arrays)
                if part != "zero_point" and fmt.kind == "nbits":
                    whole = self._cast(names[0], whole, _scale_type(whole, self.scales))
                parts[part] = self.add(f"{label}.{part}", whole)
        size = sum(v.const_value.nbytes for v in parts.values() if v.const_value is not None)
        self.reports.append(TensorReport(label, fmt.name, size, error.relative, error.relative_output))
        return Matrix(label, fmt, rows, width, parts)

    def _blocks(self, names: tuple[str, ...], selection: RowSelection | None) -> Iterator[RowBlock]:
        for name in names:
            for rows in row_blocks(self._shapes[f"{name}.weight"]):
                kept = slice(None) if selection is None else selection.within(rows)
                if isinstance(kept, slice) or len(kept):
                    yield RowBlock(name, rows, kept)

    def _pack(self, block: RowBlock, fmt: Format) -> tuple[PackedRows, RoundingError]:
        name, kept = block.name, block.kept
        if self.prepared and self.prepared.format(name) and fmt.kind == "nbits":
            return self.prepared.rows(name, block.rows).select(kept), RoundingError()  # known of the whole matrix
        weight = self._floats(name, block.rows)[kept]
        with np.errstate(over="ignore"):  # an error below names the tensor
            packed = self.round(weight, fmt) if fmt.kind == "nbits" else pack(weight, fmt)
        if fmt.kind == "float16":
            require_finite(f"{name}.weight", packed.weight.astype(np.float32))  # beyond float16's range
        return packed, RoundingError.of(weight, packed, fmt)

    def _floats(self, name: str, rows: slice) -> NDArray[np.float32]:
        """Rows of a matrix, also of one that the checkpoint has in integers only."""
        if f"{name}.weight" in self.checkpoint.tensors:
            return self._read(f"{name}.weight", rows)
        assert self.prepared is not None
        fmt = self.prepared.format(name)
        assert fmt is not None
        return unpack(self.prepared.rows(name, rows), fmt)

    def _is_prepared(self, name: str) -> bool:
        return self.prepared is not None and self.prepared.format(name) is not None

    def _known_error(self, names: tuple[str, ...]) -> RoundingError:
        error = RoundingError()
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
        """Write blocks one after the other; returns the offset of the first, and shape and dtype of the last one."""
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
        """Another value for bytes that are already in the file."""
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
