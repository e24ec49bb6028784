"""MatMulNBits at accuracy level 4, said as literally as numpy allows, and random matrices for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Matrix:
    """The standard tensors of an [n, k] matrix."""

    bits: int
    block: int
    levels: NDArray[np.uint8]  # [n, blocks, block * bits / 8]
    scales: Floats  # [n, blocks]
    zero_points: NDArray[np.uint8] | None = None  # [n, bytes]
    bias: Floats | None = None  # [n]

    @property
    def n(self) -> int:
        return self.levels.shape[0]

    @property
    def k(self) -> int:
        return self.levels.shape[1] * self.block

    def weights(self) -> NDArray[np.int64]:
        """Whole numbers about zero, [n, blocks, block]."""
        levels = unpacked(self.levels, self.bits)
        if self.zero_points is None:
            return levels - (1 << (self.bits - 1))
        return levels - unpacked(self.zero_points, self.bits)[:, : levels.shape[1], None]


def unpacked(data: NDArray[np.uint8], bits: int) -> NDArray[np.int64]:
    if bits == 8:
        return data.astype(np.int64)
    pairs = np.stack([data & 15, data >> 4], axis=-1)
    return pairs.reshape(*data.shape[:-1], -1).astype(np.int64)


def random_matrix(
    rng: np.random.Generator, n: int, k: int, bits: int, block: int, zero_points: bool = False, bias: bool = False
) -> Matrix:
    blocks = k // block
    return Matrix(
        bits,
        block,
        rng.integers(0, 256, (n, blocks, block * bits // 8), dtype=np.uint8),
        ((rng.random((n, blocks)) + 0.5) * rng.choice([-0.01, 0.01], (n, blocks))).astype(np.float32),
        rng.integers(0, 256, (n, (blocks * bits + 7) // 8), dtype=np.uint8) if zero_points else None,
        rng.standard_normal(n).astype(np.float32) if bias else None,
    )


def matmul(matrix: Matrix, x: Floats) -> NDArray[np.float64]:
    """[rows, k] -> [rows, n]: activations as int8 per row and block, whole numbers, then sums in float64."""
    blocks = x.reshape(len(x), -1, matrix.block)
    peak = np.abs(blocks).max(axis=2, keepdims=True)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        levels = np.where(peak >= 2.0**-121, np.rint(blocks * (np.float32(127) / peak)), 0).astype(np.int64)
    dots = np.einsum("rbk,nbk->rnb", levels, matrix.weights())
    scales = (peak[:, :, 0] / np.float32(127)).astype(np.float64)
    out: NDArray[np.float64] = (dots * scales[:, None, :] * matrix.scales).sum(axis=2)
    return out if matrix.bias is None else out + matrix.bias


def magnitude(matrix: Matrix, x: Floats) -> NDArray[np.float64]:
    """What rounding errors of the sums are relative to, [rows, n]."""
    weights = np.abs(matrix.weights() * matrix.scales[:, :, None].astype(np.float64)).reshape(matrix.n, -1)
    return np.abs(x).astype(np.float64) @ weights.T + (0 if matrix.bias is None else np.abs(matrix.bias))
