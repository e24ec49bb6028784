"""k-quant: per block the scale and minimum that llama.cpp's search finds, through ONNX Runtime's implementation."""

from __future__ import annotations

import numpy as np

from pard_onnx.models.precision import Format
from pard_onnx.quantize.packing.pack import Float, Packed

from .grid import Grid, best, in_blocks, usable, whole_range


def kquant(weight: Float, fmt: Format) -> Packed:
    """Rows [n, in] with zero points.

    The search rounds its minimum to a zero point in the end and knows none for blocks of one sign: where plain
    rounding is closer, that is taken.
    """
    # Here: it imports onnx, which only exporting needs.
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    with np.errstate(all="ignore"):  # blocks without a range
        _, scale, zero = quant_tensor_k_quant_cpu(weight, fmt.bits, fmt.block)
    blocks = in_blocks(weight, fmt)
    scale = np.where(np.isfinite(scale), scale, 0).astype(np.float32).reshape(blocks.shape[:2])
    found = Grid(fmt, usable(scale), zero.astype(np.float32).reshape(scale.shape))
    grid = best(blocks, (whole_range(blocks, fmt), found))
    return grid.pack(grid.levels(weight))
