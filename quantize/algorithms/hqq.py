"""HQQ's objective (Badri and Shaji, 2023): zero points under which a p-norm of the errors is least, p < 1.

Such a norm forgives the few outliers and serves the many. HQQ's own solver, which ONNX Runtime ships, moves the zero
point by fractions of a level, for which MatMulNBits leaves its integer arithmetic on CPU. Here zero points are whole,
so few come into question, and each is tried. At whole zero points there is little to win (docs/quantization.md).
"""

from __future__ import annotations

import numpy as np

from pard_onnx.models.precision import Format
from pard_onnx.quantize.packing.pack import Float, Packed

from .grid import Grid, best, in_blocks, top, whole_range

NORM = 0.7
MOVES = (0, -1, 1, -2, 2)  # of the zero point, in levels


def hqq(weight: Float, fmt: Format) -> Packed:
    """Rows [n, in] with zero points."""
    blocks = in_blocks(weight, fmt)
    start = whole_range(blocks, fmt)
    moved = (Grid(fmt, start.scale, np.clip(start.zero + move, 0, top(fmt))) for move in MOVES)
    grid = best(blocks, moved, power=NORM)
    return grid.pack(grid.levels(weight))
