"""HQQ, half-quadratic quantization (Badri and Shaji, 2023): zero points that minimize a p-norm of the errors, p < 1.

Such a norm forgives the few outliers and serves the many. ONNX Runtime ships the solver, but its zero points are
fractions, for which MatMulNBits leaves its integer arithmetic on CPU; here they are whole levels.
"""

from __future__ import annotations

import numpy as np

from pard_onnx.models.precision import Format

from .grid import Grid, in_blocks, top, whole_range
from .pack import Float, Packed

NORM = 0.7
STEPS = 20
BETA, GROWTH = 10.0, 1.01  # how strongly the split variable is held to the errors, and how that grows
SMALLEST = np.float32(1e-8)  # keeps the power of an error of zero finite


def hqq(weight: Float, fmt: Format) -> Packed:
    """Rows [n, in] with zero points."""
    blocks = in_blocks(weight, fmt)
    start = whole_range(blocks, fmt)
    scale = start.scale[..., None]
    found, beta = start, BETA
    least = _norm(blocks, found)
    zero = start.zero[..., None]
    for _ in range(STEPS):
        levels = np.clip(np.rint(blocks / scale + zero), 0, top(fmt))
        error = _shrink(blocks - (levels - zero) * scale, beta)
        zero = (levels - (blocks - error) / scale).mean(axis=-1, keepdims=True)
        whole = Grid(fmt, start.scale, np.clip(np.rint(zero[..., 0]), 0, top(fmt)))
        norm = _norm(blocks, whole)
        found = Grid(fmt, start.scale, np.where(norm < least, whole.zero, found.zero))
        least = np.minimum(norm, least)
        beta *= GROWTH
    return found.pack(found.levels(weight))


def _shrink(error: Float, beta: float) -> Float:
    """The proximal operator of the p-norm: small errors become none, large ones stay."""
    size = np.abs(error)
    kept = np.maximum(size - np.power(size + SMALLEST, NORM - 1) / np.float32(beta), 0)
    shrunk: Float = np.sign(error) * kept
    return shrunk


def _norm(blocks: Float, grid: Grid) -> Float:
    off = np.abs(grid.steps(blocks) * grid.scale[..., None] - blocks)
    total: Float = np.power(off, NORM).sum(axis=-1)
    return total
