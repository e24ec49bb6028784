"""Matrices of a quantized checkpoint in MatMulNBits' layout: the same integers, packed again without dequantizing."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import gcd

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.checkpoints.checkpoint import Checkpoint, Packed
from pard_onnx.models.checkpoints.gguf.types import GgufMatrix
from pard_onnx.models.checkpoints.quantization import PACKINGS, WORD, PackedMatrix, QuantizationConfig
from pard_onnx.models.checkpoints.tensors import TensorEntry, read_tensor, require_finite
from pard_onnx.models.errors import BadCheckpoint
from pard_onnx.models.precision import Format

from .pack import SMALLEST_BLOCK, Float, PackedRows, RoundingError, level_bytes, unpack
from .prepared import ColumnOrder

LARGEST_BLOCK = 128  # of this package's kernels; a larger group becomes several blocks with the same scale
INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)  # places in a word of the levels of eight consecutive outputs
Levels = NDArray[np.uint8]


@dataclass
class ImportedMatrices:
    """The matrices of a quantized checkpoint, as `Prepared`."""

    checkpoint: Checkpoint
    quantization: QuantizationConfig
    _zeros: dict[str, Levels | None] = field(default_factory=dict)
    _orders: dict[str, ColumnOrder | None] = field(default_factory=dict)

    def format(self, name: str) -> Format | None:
        matrix = self.checkpoint.packed.get(name)
        if matrix is None:
            return None
        block = gcd(matrix.group, LARGEST_BLOCK)
        if block < SMALLEST_BLOCK:
            raise BadCheckpoint(
                f"{self.checkpoint.path}: {name}: groups of {matrix.group} weights; MatMulNBits takes multiples of "
                f"{SMALLEST_BLOCK}, so export the unquantized checkpoint"
            )
        if isinstance(matrix, GgufMatrix):
            return Format("nbits", matrix.bits, block, minimums=matrix.has_minimums)
        return Format("nbits", matrix.bits, block, symmetric=self.zeros(name) is None)

    def rows(self, name: str, rows: slice) -> PackedRows:
        matrix, fmt = self.checkpoint.packed[name], self.format(name)
        assert fmt is not None
        levels, order = self.levels(name, rows), self.order(name)
        if order is not None:
            levels = levels[:, order]
        blocks, per_group = matrix.shape[1] // fmt.block, matrix.group // fmt.block
        scale = np.repeat(self._scales(name, matrix, rows), per_group, axis=1)
        packed = level_bytes(levels, fmt.bits).reshape(len(levels), blocks, -1)
        if isinstance(matrix, GgufMatrix) and fmt.minimums:
            return PackedRows(packed, scale, None, self._minimums(name, matrix, rows))
        zeros = self.zeros(name)
        zero = None if zeros is None else level_bytes(np.repeat(zeros[rows], per_group, axis=1), fmt.bits)
        return PackedRows(packed, scale, zero)

    def dequantized(self, name: str, rows: slice) -> Float:
        """The floats that rows stand for, [n, in], with columns in the checkpoint's order."""
        fmt = self.format(name)
        assert fmt is not None
        weight, order = unpack(self.rows(name, rows), fmt), self.order(name)
        if order is None:
            return weight
        out = np.empty_like(weight)
        out[:, order] = weight
        return out

    def error(self, name: str) -> RoundingError:
        """No error: importing rounds nothing."""
        return RoundingError()

    def vector(self, name: str) -> Float | None:
        return None

    def order(self, name: str) -> ColumnOrder | None:
        """Columns sorted by group, if the tool made groups of columns of similar importance (GPTQ's act-order)."""
        if name not in self._orders:
            self._orders[name] = self._read_order(name) if name in self.checkpoint.packed else None
        return self._orders[name]

    def _read_order(self, name: str) -> ColumnOrder | None:
        matrix = self.checkpoint.packed[name]
        if isinstance(matrix, GgufMatrix):
            return None
        end = PACKINGS[self.quantization.packing].order
        entry = matrix.parts.get(end) if end else None
        if entry is None:
            return None
        group_of = _mapped(entry)
        sizes = np.bincount(group_of, minlength=matrix.groups) if group_of.min() >= 0 else np.zeros(1)
        if sizes.tolist() != [matrix.group] * matrix.groups:
            raise BadCheckpoint(
                f"{entry.file}: tensor {name}.{end} does not give each of {matrix.groups} groups {matrix.group} columns"
            )
        order: ColumnOrder = np.argsort(group_of, kind="stable").astype(np.int64)
        return None if (np.diff(order) == 1).all() else order

    def levels(self, name: str, rows: slice) -> Levels:
        """The integers of rows as they are stored, [n, in]."""
        matrix = self.checkpoint.packed[name]
        if isinstance(matrix, GgufMatrix):
            return matrix.levels(rows)
        return self._unpacked(matrix, PACKINGS[self.quantization.packing].weight, rows)

    def zeros(self, name: str) -> Levels | None:
        """The zero points [out, groups]; None if all are the middle level, which MatMulNBits takes without any."""
        if name not in self._zeros:
            self._zeros[name] = self._read_zeros(self.checkpoint.packed[name])
        return self._zeros[name]

    def _read_zeros(self, matrix: Packed) -> Levels | None:
        if isinstance(matrix, GgufMatrix):
            return None
        end = PACKINGS[self.quantization.packing].zero
        if end not in matrix.parts:
            return None
        zeros = self._unpacked(matrix, end, slice(0, matrix.shape[0]))
        return None if (zeros == 1 << (matrix.bits - 1)).all() else zeros

    def _unpacked(self, matrix: PackedMatrix, end: str, rows: slice) -> Levels:
        """Outputs `rows` of a packed tensor as unsigned levels, [n, in or groups]."""
        packing, bits = PACKINGS[self.quantization.packing], matrix.bits
        shape, per_word = packing.shapes[end], WORD // bits
        outputs, packed = ("out" in str(shape[0]), "word" in str(shape[0]))  # whether axis 0 is of outputs, of words
        by_output = outputs == packed
        first, last, _ = rows.indices(matrix.shape[0])
        low, high = (first // per_word, -(-last // per_word)) if by_output else (first, last)
        stored = _mapped(matrix.parts[end])
        words = (stored[low:high] if outputs else stored[:, low:high]).astype(np.uint32)
        if end == packing.zero:
            # Added to whole words, as the tools that write them subtract from whole words: borrows cancel
            words += np.uint32(self.quantization.less * sum(1 << shift for shift in range(0, WORD, bits)))
        if packed:
            words = words.T
        shifts = np.arange(0, WORD, bits, dtype=np.uint32)
        levels = (words[..., None] >> shifts & np.uint32((1 << bits) - 1)).astype(np.uint8)
        if self.quantization.interleaved:
            levels = levels[..., list(INTERLEAVED)]
        if self.quantization.signed:
            levels ^= np.uint8(1 << (bits - 1))
        flat = levels.reshape(len(levels), -1)
        if by_output:  # [in or groups, outputs of whole words]
            return flat[:, first - low * per_word : last - low * per_word].T
        return flat[:, : matrix.shape[1]]

    def _minimums(self, name: str, matrix: GgufMatrix, rows: slice) -> Float:
        minimums = matrix.minimums(rows)
        require_finite(name, minimums)
        return minimums

    def _scales(self, name: str, matrix: Packed, rows: slice) -> Float:
        """The scales of rows, [n, groups]."""
        if isinstance(matrix, GgufMatrix):
            scale = matrix.scales(rows)
            require_finite(name, scale)
            return scale
        packing = PACKINGS[self.quantization.packing]
        scale = read_tensor(matrix.parts[packing.scale])
        require_finite(f"{name}.{packing.scale}", scale)
        return (scale if packing.shapes[packing.scale][0] == "out" else scale.T)[rows]


def imported_matrices(checkpoint: Checkpoint) -> ImportedMatrices | None:
    """The matrices of a quantized checkpoint; None for a checkpoint in floats."""
    return ImportedMatrices(checkpoint, checkpoint.quantization) if checkpoint.quantization else None


def _mapped(entry: TensorEntry) -> NDArray[np.int32]:
    """A tensor of 32-bit integers by memory map: only the parts that are used are read."""
    return np.memmap(entry.file, np.dtype("<i4"), "r", entry.offset, entry.shape)
