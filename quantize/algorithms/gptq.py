"""GPTQ (arXiv 2210.17323): columns are rounded one by one, each making up for the errors of those before it.

With inputs X and X X^T = L L^T, L lower triangular, the squared error of the outputs is |(W - Q) X|^2 = |(W - Q) L|^2.
Column k of (W - Q) L is e_k L_kk plus what the errors e_j of later columns bring, so going from the last to the first

    q_k = round(w_k + sum over j > k of e_j L_jk / L_kk)

makes each column of it as small as one level allows. This is GPTQ without the inverse of X X^T: one factorization,
a third of the work and less memory (that the two agree is shown in QuIP, arXiv 2307.13304).

Columns are sorted so that those with the largest inputs come first, while the others are free (activation order).
Scales and zero points are of the matrix's own blocks and fixed beforehand, so the matrix is stored in the checkpoint's
order and nothing is gathered at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pard_onnx.models.precision import Format
from pard_onnx.quantize.packing.pack import Float, Packed

from .grid import search, top

DAMPING = 0.01  # of the mean square input, added to all: what the text never used keeps its own weights
COLUMNS = 128  # rounded between two updates of all that follow
GATHERED = 512  # rows of X X^T sorted at a time


@dataclass(frozen=True, slots=True)
class Feedback:
    """What errors cost. importance: mean squares of the input's columns [in]; order: columns, the largest last;
    factor: L's columns over its diagonal, in that order [in, in]."""

    importance: Float
    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, gram: Tensor) -> Feedback:
        """gram: X X^T [in, in], float32."""
        squares = gram.diagonal().clone()
        order = torch.argsort(squares, stable=True)
        turned = torch.empty_like(gram)
        for start in range(0, len(order), GATHERED):
            turned[start : start + GATHERED] = gram[order[start : start + GATHERED]][:, order]
        turned.diagonal().add_(DAMPING * float(squares.mean()) or 1.0)
        turned = turned.T  # symmetric, and now in LAPACK's order: factored in place
        factor = torch.linalg.cholesky(turned, out=turned)
        factor /= factor.diagonal().clone()
        return cls(squares.numpy(), order, factor)


def gptq(feedback: Feedback, weight: Float, fmt: Format) -> Packed:
    """Rows [n, in], rounded independently of one another."""
    grid = search(weight, fmt, feedback.importance)
    order = feedback.order
    scale, zero = (torch.from_numpy(part).T.contiguous() for part in (grid.scale, grid.zero))  # [blocks, n]
    errors = torch.from_numpy(weight).T[order]  # [in, n]: weights, and errors from the last column on
    found = torch.empty(errors.shape, dtype=torch.uint8)
    for stop in range(len(errors), 0, -COLUMNS):
        part = slice(max(0, stop - COLUMNS), stop)
        brought = feedback.factor[stop:, part].T @ errors[stop:]
        block = order[part] // fmt.block
        _round(errors[part], brought, feedback.factor[part, part], scale[block], zero[block], top(fmt), found[part])
    levels = np.empty(weight.shape, np.uint8)
    levels[:, order.numpy()] = found.T.numpy()
    return grid.pack(levels)


def _round(
    own: Tensor, brought: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, most: int, levels: Tensor
) -> None:
    """The columns of one part, from the last to the first. own: theirs, become errors; brought: by all later parts."""
    for k in reversed(range(len(own))):
        wanted = own[k] + brought[k] + factor[k + 1 :, k] @ own[k + 1 :]
        level = (wanted / scale[k] + zero[k]).round_().clamp_(0, most)
        levels[k] = level
        own[k] -= (level - zero[k]) * scale[k]
