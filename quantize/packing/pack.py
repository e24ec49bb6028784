"""One matrix to one storage format, a block of rows at a time.

Rows are outputs, as in a checkpoint's [out, in] layout; every format is quantized independently
per row, so blocks of rows may be packed one after the other. ONNX Runtime's own packers do the work.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from onnxruntime.capi import _pybind_state as ort_native

from pard_onnx.models.errors import BadInput
from pard_onnx.models.precision import Format

Float = NDArray[np.float32]
SMALLEST_BLOCK = 16  # of MatMulNBits
SMALLEST_SCALE = np.finfo(np.float32).tiny  # below it floats lose bits, and a weight over its scale leaves int8


@dataclass(frozen=True, slots=True)
class Packed:
    """A block of n rows. Every array has n as its first axis.

    weight: float [n, in]; nbits uint8 [n, blocks, block * bits / 8]; dynamic and qdq int8 [n, in].
    scale: nbits [n, blocks]; dynamic and qdq [n]. zero_point: nbits with zero points only, uint8 [n, bytes].
    """

    weight: NDArray[np.generic]
    scale: Float | None = None
    zero_point: NDArray[np.uint8] | None = None

    def keep(self, rows: slice | NDArray[np.int64]) -> Packed:
        """Some of the rows."""
        return Packed(
            self.weight[rows],
            None if self.scale is None else self.scale[rows],
            None if self.zero_point is None else self.zero_point[rows],
        )


def fit_block(fmt: Format, width: int, name: str) -> Format:
    """The format with the largest block that divides the matrix's input width."""
    if fmt.kind != "nbits":
        return fmt
    block = fmt.block
    while width % block:
        block //= 2
    if block < SMALLEST_BLOCK:
        raise BadInput(f"{name}: input width {width} is no multiple of {SMALLEST_BLOCK}; export it in fp32 or fp16")
    return Format("nbits", fmt.bits, block, fmt.symmetric)


def pack(weight: Float, fmt: Format) -> Packed:
    """Pack rows [n, in] of finite floats; `fmt` comes from fit_block.

    Blocks (dynamic: rows) with no weight above about 1e-36 are too small for a float32 scale; the error is then
    of their own size. With zero points a block may span 3e38 at most.
    """
    return _PACKERS[fmt.kind](weight, fmt)


def unpack(packed: Packed, fmt: Format) -> Float:
    """The floats that the packed rows stand for, [n, in]."""
    if fmt.kind == "nbits":
        return _unpack_nbits(packed, fmt)
    weight = packed.weight.astype(np.float32)
    return weight if packed.scale is None else weight * packed.scale[:, None]


def _pack_nbits(weight: Float, fmt: Format) -> Packed:
    rows, width = weight.shape
    blocks = width // fmt.block
    data = np.zeros((rows, blocks, fmt.block * fmt.bits // 8), dtype=np.uint8)
    scale = np.zeros(rows * blocks, dtype=np.float32)
    zero = np.zeros((rows, (blocks * fmt.bits + 7) // 8), dtype=np.uint8)
    quantize = getattr(ort_native, f"quantize_matmul_{fmt.bits}bits")
    # The packer takes the [in, out] layout of a MatMul.
    transposed = np.ascontiguousarray(weight.T)
    quantize(data, transposed, scale, zero.reshape(-1), fmt.block, rows, width, fmt.symmetric)
    return Packed(data, scale.reshape(rows, blocks), None if fmt.symmetric else zero)


def _unpack_nbits(packed: Packed, fmt: Format) -> Float:
    rows, blocks, _ = packed.weight.shape
    assert packed.scale is not None
    levels = _nibbles(packed.weight.astype(np.uint8, copy=False), fmt.bits).reshape(rows, blocks, fmt.block)
    if packed.zero_point is None:
        zero: NDArray[np.uint8] = np.full((rows, blocks), 1 << (fmt.bits - 1), dtype=np.uint8)
    else:
        zero = _nibbles(packed.zero_point, fmt.bits).reshape(rows, -1)[:, :blocks]
    out = levels.astype(np.float32)
    out -= zero[..., None]
    out *= packed.scale[..., None]
    return out.reshape(rows, blocks * fmt.block)


def _nibbles(data: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The unsigned levels in order; two a byte at 4 bits, the low one first."""
    return data if bits == 8 else np.stack([data & 15, data >> 4], axis=-1)


def stored_bytes(rows: int, width: int, fmt: Format) -> int:
    """Of a matrix, scales and zero points included; `fmt` comes from fit_block."""
    if fmt.kind != "nbits":
        return rows * width * {"float32": 4, "float16": 2, "dynamic": 1, "qdq": 1}[fmt.kind]
    blocks = width // fmt.block
    zero = 0 if fmt.symmetric else -(-blocks * fmt.bits // 8)
    return rows * (width * fmt.bits // 8 + 4 * blocks + zero)


def pack_levels(levels: NDArray[np.uint8], scale: Float, zero: NDArray[np.uint8] | None, fmt: Format) -> Packed:
    """Unsigned levels [n, in] under scales and zero points [n, blocks] in the layout of `Packed`."""
    rows, blocks = scale.shape
    data = level_bytes(levels.reshape(rows, blocks, fmt.block), fmt.bits)
    return Packed(data, scale.astype(np.float32), None if zero is None else level_bytes(zero, fmt.bits))


def level_bytes(levels: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Levels along the last axis, two a byte at 4 bits, the low one first; an odd one has an empty neighbour."""
    if bits == 8:
        return np.ascontiguousarray(levels)
    if levels.shape[-1] % 2:
        levels = np.concatenate([levels, np.zeros_like(levels[..., :1])], axis=-1)
    return levels[..., 0::2] | levels[..., 1::2] << np.uint8(4)


def _pack_rows(weight: Float, fmt: Format) -> Packed:
    """Symmetric int8 per output row; a row of zeros, or too small for a scale, is stored as zeros of scale 1."""
    scale = np.abs(weight).max(axis=1) / np.float32(127)
    scale = np.where(scale < SMALLEST_SCALE, np.float32(1), scale)
    return Packed(np.rint(weight / scale[:, None]).astype(np.int8), scale)


_PACKERS: dict[str, Callable[[Float, Format], Packed]] = {
    "float32": lambda weight, _: Packed(weight),
    "float16": lambda weight, _: Packed(weight.astype(np.float16)),
    "nbits": _pack_nbits,
    "dynamic": _pack_rows,
    "qdq": _pack_rows,
}


WORKERS = os.cpu_count() or 1
Job = TypeVar("Job")
Found = TypeVar("Found")


def in_order(
    work: Callable[[Job], Found], jobs: Iterable[Job], start: Callable[[], object] = lambda: None
) -> Iterator[Found]:
    """work(job) of each job, in the jobs' order; one result for each worker waits at most. start: in each thread."""
    pending: deque[Future[Found]] = deque()
    with ThreadPoolExecutor(WORKERS, initializer=start) as pool:
        for job in jobs:
            pending.append(pool.submit(work, job))
            if len(pending) > WORKERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
