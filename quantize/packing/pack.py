"""Pack a matrix into a storage format, a block of rows at a time, and measure the rounding error.

Rows are outputs, as in a checkpoint's [out, in] layout. Every format quantizes each row independently of the others, so
blocks of rows can be packed one after the other. Formats with blocks are packed by ONNX Runtime's own functions.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.errors import BadInput
from pard_onnx.models.precision import Format

Float = NDArray[np.float32]
SMALLEST_BLOCK = 16  # of MatMulNBits
HALF_RANGE = (2.0**-14, 65504.0)  # magnitudes of half-precision numbers that have all their bits
SMALLEST_SCALE = np.finfo(np.float32).tiny  # smaller floats have fewer bits, and weight / scale could exceed int8


@dataclass(frozen=True, slots=True)
class PackedRows:
    """n rows of a matrix in a storage format. Every array has n as its first axis."""

    weight: NDArray[np.generic]  # floats [n, in]; nbits uint8 [n, blocks, block * bits / 8]; dynamic, qdq int8 [n, in]
    scale: Float | None = None  # nbits [n, blocks]; dynamic, qdq [n]
    zero_point: NDArray[np.uint8] | None = None  # nbits with zero points only: uint8 [n, bytes]
    minimum: Float | None = None  # nbits with minimums only: [n, blocks]

    def select(self, rows: slice | NDArray[np.int64]) -> PackedRows:
        """The rows of a slice, or of an array of indices."""
        return PackedRows(
            self.weight[rows],
            None if self.scale is None else self.scale[rows],
            None if self.zero_point is None else self.zero_point[rows],
            None if self.minimum is None else self.minimum[rows],
        )


def format_for_width(fmt: Format, width: int, name: str) -> Format:
    """The format with the largest block, up to its own, that divides a matrix's input width.

    Raises BadInput, with the matrix's name, if that block is smaller than MatMulNBits allows.
    """
    if fmt.kind != "nbits":
        return fmt
    block = fmt.block
    while width % block:
        block //= 2
    if block < SMALLEST_BLOCK:
        raise BadInput(f"{name}: input width {width} is no multiple of {SMALLEST_BLOCK}; export it in fp32 or fp16")
    return replace(fmt, block=block)


def pack(weight: Float, fmt: Format) -> PackedRows:
    """Pack rows [n, in] of finite floats; `fmt` comes from format_for_width.

    A block (dynamic, qdq: a row) whose weights are all below about 1e-36 is too small for a float32 scale, and is
    rounded to zeros. With zero points the range of a block is 3e38 at most.
    """
    return PACKERS[fmt.kind](weight, fmt)


def half_scale(scale: Float, fmt: Format) -> Float:
    """Scales of 4 bits as the nearest numbers of half precision, which take half the room; 8 bits have few scales.

    Scales out of half precision's range stay as they are, and their matrix keeps float32.
    """
    if fmt.bits != 4:
        return scale
    size = np.abs(scale)
    inside = (size >= HALF_RANGE[0]) & (size <= HALF_RANGE[1])
    return np.where(inside, np.where(inside, scale, 0).astype(np.float16).astype(np.float32), scale)


def unpack(packed: PackedRows, fmt: Format) -> Float:
    """The floats that packed rows stand for, [n, in]."""
    if fmt.kind == "nbits":
        return _unpack_nbits(packed, fmt)
    weight = packed.weight.astype(np.float32)
    return weight if packed.scale is None else weight * packed.scale[:, None]


def _pack_nbits(weight: Float, fmt: Format) -> PackedRows:
    from onnxruntime.capi import _pybind_state as ort_native  # commands read their options before it is imported

    rows, width = weight.shape
    blocks = width // fmt.block
    data = np.zeros((rows, blocks, fmt.block * fmt.bits // 8), dtype=np.uint8)
    scale = np.zeros(rows * blocks, dtype=np.float32)
    zero = np.zeros((rows, (blocks * fmt.bits + 7) // 8), dtype=np.uint8)
    quantize = getattr(ort_native, f"quantize_matmul_{fmt.bits}bits")
    # ONNX Runtime's function takes the [in, out] layout of a MatMul.
    transposed = np.ascontiguousarray(weight.T)
    quantize(data, transposed, scale, zero.reshape(-1), fmt.block, rows, width, fmt.symmetric)
    return PackedRows(data, half_scale(scale, fmt).reshape(rows, blocks), None if fmt.symmetric else zero)


def _unpack_nbits(packed: PackedRows, fmt: Format) -> Float:
    rows, blocks, _ = packed.weight.shape
    assert packed.scale is not None
    levels = nibbles(packed.weight.astype(np.uint8, copy=False), fmt.bits).reshape(rows, blocks, fmt.block)
    if packed.minimum is not None:
        return (levels * packed.scale[..., None] + packed.minimum[..., None]).reshape(rows, blocks * fmt.block)
    if packed.zero_point is None:
        zero: NDArray[np.uint8] = np.full((rows, blocks), 1 << (fmt.bits - 1), dtype=np.uint8)
    else:
        zero = nibbles(packed.zero_point, fmt.bits).reshape(rows, -1)[:, :blocks]
    out = levels.astype(np.float32)
    out -= zero[..., None]
    out *= packed.scale[..., None]
    return out.reshape(rows, blocks * fmt.block)


def nibbles(data: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Unsigned levels in order, [..., n, 2] at 4 bits: two in a byte, the low half first."""
    return data if bits == 8 else np.stack([data & 15, data >> 4], axis=-1)


def stored_bytes(rows: int, width: int, fmt: Format) -> int:
    """Bytes of a packed matrix, with its scales and zero points; `fmt` comes from format_for_width."""
    if fmt.kind != "nbits":
        return rows * width * {"float32": 4, "float16": 2, "dynamic": 1, "qdq": 1}[fmt.kind]
    blocks = width // fmt.block
    zero = 0 if fmt.symmetric else -(-blocks * fmt.bits // 8)
    minimum = 2 * blocks if fmt.minimums else 0
    return rows * (width * fmt.bits // 8 + (2 if fmt.bits == 4 else 4) * blocks + zero + minimum)


def pack_levels(levels: NDArray[np.uint8], scale: Float, zero: NDArray[np.uint8] | None, fmt: Format) -> PackedRows:
    """Pack unsigned levels [n, in] with their scales and zero points [n, blocks]."""
    rows, blocks = scale.shape
    data = level_bytes(levels.reshape(rows, blocks, fmt.block), fmt.bits)
    return PackedRows(data, scale.astype(np.float32), None if zero is None else level_bytes(zero, fmt.bits))


def level_bytes(levels: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack levels along the last axis: at 4 bits two in a byte, the low half first; an odd number is padded with 0."""
    if bits == 8:
        return np.ascontiguousarray(levels)
    if levels.shape[-1] % 2:
        levels = np.concatenate([levels, np.zeros_like(levels[..., :1])], axis=-1)
    return levels[..., 0::2] | levels[..., 1::2] << np.uint8(4)


def _pack_rows(weight: Float, fmt: Format) -> PackedRows:
    """Symmetric int8, one scale a row; a row that is too small for a scale is stored as zeros with scale 1."""
    scale = np.abs(weight).max(axis=1) / np.float32(127)
    scale = np.where(scale < SMALLEST_SCALE, np.float32(1), scale)
    return PackedRows(np.rint(weight / scale[:, None]).astype(np.int8), scale)


PACKERS: dict[str, Callable[[Float, Format], PackedRows]] = {
    "float32": lambda weight, _: PackedRows(weight),
    "float16": lambda weight, _: PackedRows(weight.astype(np.float16)),
    "nbits": _pack_nbits,
    "dynamic": _pack_rows,
    "qdq": _pack_rows,
}


@dataclass(slots=True)
class RoundingError:
    """How far stored weights are from the checkpoint's: sums over all weights that were added."""

    squared: float = 0.0  # of the differences
    weight_squared: float = 0.0  # of the checkpoint's weights
    output: float = 0.0  # squared differences of the products with calibration inputs; 0 without such inputs
    output_squared: float = 0.0  # of the products of the checkpoint's weights

    @classmethod
    def of(cls, weight: Float, packed: PackedRows, fmt: Format) -> RoundingError:
        """The error of packed rows against the weights [n, in] that they were packed from."""
        if fmt.kind == "float32":
            return cls(0.0, _square(weight))
        return cls.between(weight, unpack(packed, fmt))

    @classmethod
    def between(cls, weight: Float, rounded: Float) -> RoundingError:
        return cls(_square(rounded - weight), _square(weight))

    def add_outputs(self, weight: Float, rounded: Float, gram: Float) -> None:
        """Add the error of the products of rows [n, in].

        gram: X X^T of the inputs, [in, in]; or its diagonal [in], which leaves their correlations out.
        """
        difference: Float = rounded - weight
        self.output += _inner(_product(difference, gram), difference)
        self.output_squared += _inner(_product(weight, gram), weight)

    def add(self, other: RoundingError) -> None:
        self.squared += other.squared
        self.weight_squared += other.weight_squared
        self.output += other.output
        self.output_squared += other.output_squared

    @property
    def relative(self) -> float:
        """Root mean square of the differences over that of the weights."""
        return float(np.sqrt(self.squared / self.weight_squared)) if self.weight_squared else 0.0

    @property
    def relative_output(self) -> float | None:
        """The same of the products; None if there were no calibration inputs."""
        return float(np.sqrt(max(0.0, self.output) / self.output_squared)) if self.output_squared else None


def _product(rows: Float, gram: Float) -> Float:
    product: Float = rows @ gram if gram.ndim == 2 else rows * gram
    return product.astype(np.float32, copy=False)


def _square(array: Float) -> float:
    return _inner(array, array)


def _inner(one: Float, other: Float) -> float:
    return float(np.dot(one.reshape(-1), other.reshape(-1)))


WORKERS = os.cpu_count() or 1
Item = TypeVar("Item")
Output = TypeVar("Output")


def map_in_order(
    function: Callable[[Item], Output], items: Iterable[Item], start: Callable[[], object] = lambda: None
) -> Iterator[Output]:
    """`function` of each item, by threads, in the items' order; at most one result a thread waits to be taken.

    start: is called once in each thread.
    """
    pending: deque[Future[Output]] = deque()
    with ThreadPoolExecutor(WORKERS, initializer=start) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > WORKERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
