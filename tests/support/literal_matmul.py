"""MatMulNBits at accuracy level 4, said as literally as numpy allows, and random matrices for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Halves = NDArray[np.float16]


@dataclass(frozen=True)
class Matrix:
    """The standard tensors of an [n, k] matrix."""

    bits: int
    block: int
    levels: NDArray[np.uint8]  # [n, blocks, block * bits / 8]
    scales: Floats | Halves  # [n, blocks]; float16 beside minimums
    zero_points: NDArray[np.uint8] | None = None  # [n, bytes]
    bias: Floats | None = None  # [n]
    minimums: Halves | None = None  # [n, blocks]

    @property
    def n(self) -> int:
        return self.levels.shape[0]

    @property
    def k(self) -> int:
        return self.levels.shape[1] * self.block

    def weights(self) -> NDArray[np.int64]:
        """Whole numbers, [n, blocks, block]: about zero, but beside minimums."""
        levels = unpacked(self.levels, self.bits)
        if self.minimums is not None:
            return levels
        if self.zero_points is None:
            return levels - (1 << (self.bits - 1))
        return levels - unpacked(self.zero_points, self.bits)[:, : levels.shape[1], None]


def unpacked(data: NDArray[np.uint8], bits: int) -> NDArray[np.int64]:
    if bits == 8:
        return data.astype(np.int64)
    pairs = np.stack([data & 15, data >> 4], axis=-1)
    return pairs.reshape(*data.shape[:-1], -1).astype(np.int64)


def random_matrix(
    rng: np.random.Generator,
    n: int,
    k: int,
    bits: int,
    block: int,
    zero_points: bool = False,
    bias: bool = False,
    minimums: bool = False,
) -> Matrix:
    blocks, scale_type = k // block, np.float16 if minimums else np.float32
    zero_shape = (n, (blocks * bits + 7) // 8)
    levels = rng.integers(0, 256, (n, blocks, block * bits // 8), dtype=np.uint8)
    scales = ((rng.random((n, blocks)) + 0.5) * rng.choice([-0.01, 0.01], (n, blocks))).astype(scale_type)
    zeros = rng.integers(0, 256, zero_shape, dtype=np.uint8) if zero_points else None
    biases = rng.standard_normal(n).astype(np.float32) if bias else None
    if not minimums:
        return Matrix(bits, block, levels, scales, zeros, biases)
    lowest = rng.choice([-0.1, 0, 1e-6, 0.2], (n, blocks)).astype(np.float16)
    return Matrix(bits, block, levels, scales, None, biases, lowest)


def matmul(matrix: Matrix, x: Floats) -> NDArray[np.float64]:
    """[rows, k] -> [rows, n]: activations as int8 per row and block, whole numbers, then sums in float64."""
    blocks = x.reshape(len(x), -1, matrix.block)
    peak = np.abs(blocks).max(axis=2, keepdims=True)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        levels = np.where(peak >= 2.0**-121, np.rint(blocks * (np.float32(127) / peak)), 0).astype(np.int64)
    dots = np.einsum("rbk,nbk->rnb", levels, matrix.weights())
    scales = (peak[:, :, 0] / np.float32(127)).astype(np.float64)
    out: NDArray[np.float64] = (dots * scales[:, None, :] * matrix.scales).sum(axis=2)
    if matrix.minimums is not None:
        out += (levels.sum(axis=2) * scales) @ matrix.minimums.T.astype(np.float64)
    return out if matrix.bias is None else out + matrix.bias


def magnitude(matrix: Matrix, x: Floats) -> NDArray[np.float64]:
    """What rounding errors of the sums are relative to, [rows, n]."""
    weights = np.abs(matrix.weights() * matrix.scales[:, :, None].astype(np.float64))
    if matrix.minimums is not None:
        weights += np.abs(matrix.minimums[:, :, None].astype(np.float64))
    out: NDArray[np.float64] = np.abs(x).astype(np.float64) @ weights.reshape(matrix.n, -1).T
    return out + (0 if matrix.bias is None else np.abs(matrix.bias))
