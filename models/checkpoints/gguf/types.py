"""The types of tensors in GGUF files: a table; `GgufTensor`, whose rows are read one block at a time as floats, and
`GgufMatrix`, whose rows are read as the integers that the file holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.checkpoints.tensors import DTYPES
from pard_onnx.models.errors import BadCheckpoint, BadInput

# The numbers of ggml's types in a file; all are named, so that those which are not read are refused by name
TYPE_NUMBERS = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip


Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Integers:
    """How a block holds integers that MatMulNBits can take, after its scale (and minimum) in float16.

    weight = scale * (level - the middle level), or with a minimum: scale * level + minimum.
    """

    bits: int
    levels: Callable[[Bytes], Bytes]  # of the bytes after scale and minimum, along the last axis
    minimum: bool = False


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A type of values: `block` consecutive values of a row take `size` bytes."""

    name: str
    block: int
    size: int
    integers: Integers | None = None  # None: the values are read as floats

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) // self.block * self.size


def _halves(packed: Bytes) -> Bytes:
    """16 bytes: their low halves are the first 16 levels, their high halves the other 16."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _signed(packed: Bytes) -> Bytes:
    """32 signed bytes."""
    return packed ^ np.uint8(128)


TYPES = {
    kind.name: kind
    for kind in (
        GgmlType("F32", 1, 4),
        GgmlType("F16", 1, 2),
        GgmlType("BF16", 1, 2),
        GgmlType("Q8_0", 32, 34, Integers(8, _signed)),
        GgmlType("Q4_0", 32, 18, Integers(4, _halves)),
        GgmlType("Q4_1", 32, 20, Integers(4, _halves, minimum=True)),
        GgmlType("Q5_0", 32, 22),
        GgmlType("Q5_1", 32, 24),
        GgmlType("Q4_K", 256, 144),
        GgmlType("Q5_K", 256, 176),
        GgmlType("Q6_K", 256, 210),
    )
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of a GGUF file as transformers' model of it has it, in floats.

    heads: how many heads the rows belong to, whose rotary pairs are rows 2i and 2i + 1 in the file, rows i and
    i + head_dim / 2 in transformers; 0: the rows are in the same order. added: what the file's values have more than
    transformers'.
    """

    file: Path
    kind: GgmlType
    shape: tuple[int, ...]
    offset: int  # bytes from the beginning of the file
    heads: int = 0
    added: float = 0.0

    @property
    def dtype(self) -> str:
        return self.kind.name if self.kind.name in DTYPES and not self.added else "F32"

    @property
    def nbytes(self) -> int:
        return self.kind.nbytes(self.shape)

    def read(self, first: int, stop: int) -> NDArray[Any]:
        values = self._floats(self.blocks(first, stop))
        values = values.reshape(len(values), *self.shape[1:])
        return values - np.float32(self.added) if self.added else values

    def blocks(self, first: int, stop: int) -> Bytes:
        """The bytes of rows first .. stop, in transformers' order: [rows, bytes of a row]."""
        rows, width = self.shape[0], self.kind.nbytes(self.shape[1:])
        if not self.heads:
            return self._stored(first, stop, width)
        head = rows // self.heads
        low = first // head * head
        stored = self._stored(low, -(-stop // head) * head, width)
        pairs = stored.reshape(-1, head // 2, 2, width).swapaxes(1, 2)  # [heads, 2, head / 2, bytes]
        return pairs.reshape(stored.shape)[first - low : stop - low]

    def _stored(self, first: int, stop: int, row: int) -> Bytes:
        count = max(0, stop - first)
        raw: Bytes = np.fromfile(self.file, np.uint8, count * row, offset=self.offset + first * row)
        if raw.size != count * row:
            raise BadCheckpoint(f"{self.file}: ends within a tensor; download it again")
        return raw.reshape(count, row)

    def _floats(self, blocks: Bytes) -> NDArray[Any]:
        """The values of rows: in the stored type where that is a float, else in float32."""
        if stored := DTYPES.get(self.kind.name):
            values = blocks.view(stored)
            if not self.added or self.kind.name != "BF16":
                return values
            return (values.astype(np.uint32) << 16).view(np.float32)
        gguf = library()
        found: NDArray[np.float32] = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[self.kind.name])
        return found


@dataclass(frozen=True, slots=True)
class GgufMatrix:
    """A matrix [out, in] in integers: weight = scale * (level - the middle level), or scale * level + minimum."""

    tensor: GgufTensor  # of a type with integers

    @property
    def shape(self) -> tuple[int, int]:
        rows, width = self.tensor.shape
        return rows, width

    @property
    def bits(self) -> int:
        return self._integers.bits

    @property
    def group(self) -> int:
        """Input columns that share a scale."""
        return self.tensor.kind.block

    @property
    def has_minimums(self) -> bool:
        return self._integers.minimum

    def levels(self, rows: slice) -> Bytes:
        """The integers of rows, [n, in]."""
        blocks = self._blocks(rows)
        found = self._integers.levels(blocks[..., 4 if self.has_minimums else 2 :])
        return found.reshape(len(blocks), self.shape[1])

    def scales(self, rows: slice) -> NDArray[np.float32]:
        """The scales of rows, [n, groups]."""
        return self._half(self._blocks(rows), 0)

    def minimums(self, rows: slice) -> NDArray[np.float32]:
        """The minimums of rows, [n, groups], of a type that has them."""
        return self._half(self._blocks(rows), 2)

    def _half(self, blocks: Bytes, place: int) -> NDArray[np.float32]:
        """The number in float16 at a place in each block."""
        return np.ascontiguousarray(blocks[..., place : place + 2]).view("<f2")[..., 0].astype(np.float32)

    def _blocks(self, rows: slice) -> Bytes:
        first, stop, _ = rows.indices(self.shape[0])
        stored = self.tensor.blocks(first, stop)
        return stored.reshape(len(stored), self.shape[1] // self.group, self.tensor.kind.size)

    @property
    def _integers(self) -> Integers:
        assert self.tensor.kind.integers is not None
        return self.tensor.kind.integers


def library() -> Any:
    """The gguf package, which only files with quantized tensors need."""
    try:
        import gguf
    except ImportError:
        raise BadInput("the gguf package, which reads quantized tensors, is not installed; pip install gguf") from None
    return gguf
