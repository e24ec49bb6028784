"""GPTQ (arXiv 2210.17323): columns are rounded one by one, and each compensates the errors of those before it.

With inputs X and X X^T = L L^T, L lower triangular, the squared error of the outputs is |(W - Q) X|^2 = |(W - Q) L|^2.
Column k of (W - Q) L is e_k L_kk plus the sum of e_j L_jk over the later columns j, where e_j are their errors. So
rounding from the last column to the first by

    q_k = round(w_k + sum over j > k of e_j L_jk / L_kk)

makes each column of (W - Q) L as small as one level allows. This is GPTQ without the inverse of X X^T: it takes one
factorization, a third of the work and less memory. QuIP (arXiv 2307.13304) shows that the two are equivalent.

Columns with the largest inputs are rounded first, when all other columns can still compensate (activation order).
Scales and zero points belong to the blocks of the checkpoint's column order and are fixed beforehand, so the matrix is
stored in that order and no columns are gathered at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pard_onnx.models.precision import Format
from pard_onnx.quantize.packing.pack import Float, PackedRows

from .grid import highest_level, search_grid

DAMPING = 0.01  # share of the mean square input added to all: columns that the text never uses keep their weights
COLUMNS = 128  # that are rounded between two updates of all remaining ones
GATHERED = 512  # rows of X X^T that are sorted at a time


@dataclass(frozen=True, slots=True)
class GramFactor:
    """The factor L of X X^T, with columns sorted by the size of their inputs."""

    importance: Float  # mean squares of the input's columns, [in]
    order: Tensor  # columns, the one with the largest input last, [in]
    columns: Tensor  # L's columns divided by its diagonal, in that order, [in, in]

    @classmethod
    def of(cls, gram: Tensor) -> GramFactor:
        """gram: X X^T [in, in], float32."""
        squares = gram.diagonal().clone()
        order = torch.argsort(squares, stable=True)
        permuted = torch.empty_like(gram)
        for start in range(0, len(order), GATHERED):
            permuted[start : start + GATHERED] = gram[order[start : start + GATHERED]][:, order]
        permuted.diagonal().add_(DAMPING * float(squares.mean()) or 1.0)
        permuted = permuted.T  # symmetric, and now in LAPACK's memory order, so that it is factored in place
        factor = torch.linalg.cholesky(permuted, out=permuted)
        factor /= factor.diagonal().clone()
        return cls(squares.numpy(), order, factor)


def gptq(factor: GramFactor, weight: Float, fmt: Format) -> PackedRows:
    """Round rows [n, in] independently of one another, for inputs whose X X^T has this factor."""
    grid = search_grid(weight, fmt, factor.importance)
    order = factor.order
    scale, zero = (torch.from_numpy(part).T.contiguous() for part in (grid.scale, grid.zero))  # [blocks, n]
    errors = torch.from_numpy(weight).T[order]  # [in, n]: weights, and errors from the last column on
    rounded = torch.empty(errors.shape, dtype=torch.uint8)
    for stop in range(len(errors), 0, -COLUMNS):
        part = slice(max(0, stop - COLUMNS), stop)
        carried = factor.columns[stop:, part].T @ errors[stop:]
        block = order[part] // fmt.block
        inner = factor.columns[part, part]
        _round(errors[part], carried, inner, scale[block], zero[block], highest_level(fmt), rounded[part])
    levels = np.empty(weight.shape, np.uint8)
    levels[:, order.numpy()] = rounded.T.numpy()
    return grid.pack(levels)


def _round(
    own: Tensor, carried: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, most: int, levels: Tensor
) -> None:
    """Round the columns of one part from the last to the first, into `levels`.

    own: their weights, which are replaced by their errors; carried: what the errors of all later parts add to them.
    """
    for k in reversed(range(len(own))):
        wanted = own[k] + carried[k] + factor[k + 1 :, k] @ own[k + 1 :]
        level = (wanted / scale[k] + zero[k]).round_().clamp_(0, most)
        levels[k] = level
        own[k] -= (level - zero[k]) * scale[k]
