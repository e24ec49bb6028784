"""The grid that a matrix is rounded to, a scale and a zero point for each block as in MatMulNBits, and its search.

The search tries ranges that shrink step by step, keeps the one with the least squared error, and refits its scale by
least squares. The errors count equally, or by the importance of their columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.precision import Format
from pard_onnx.quantize.packing.pack import SMALLEST_SCALE, Float, PackedRows, half_scale, pack, pack_levels

SHRINKS = np.linspace(1.05, 0.5, 23, dtype=np.float32)  # factors of the range; above 1 the end levels are rarely used
END_SHRINKS = (1.0, 0.88, 0.76)  # factors of the upper and of the lower end of a range with zero points
REFITS = 2  # of the best start; refitting every start takes 1.5 times as long, and lowers the squared error by 0.4 %
TILE = 512  # rows whose blocks are searched together: their intermediate results stay in a core's cache
LEAST_IMPORTANCE = 1e-3  # share of the mean square input: columns that the text never uses keep some weight
Levels = NDArray[np.uint8]
Round = Callable[[Float, Format], PackedRows]  # rounds rows [n, in] independently of one another


@dataclass(frozen=True, slots=True)
class Grid:
    """Level q of a block stands for the value (q - zero) * scale."""

    format: Format
    scale: Float  # [n, blocks], may be negative
    zero: Float  # [n, blocks]

    def levels(self, weight: Float) -> Levels:
        """The nearest levels, [n, in]."""
        levels = self.steps(in_blocks(weight, self.format))
        levels += self.zero[..., None]
        return levels.astype(np.uint8).reshape(weight.shape)

    def steps(self, blocks: Float) -> Float:
        """The nearest levels of weights [n, blocks, block], counted from the zero point."""
        steps: Float = blocks / self.scale[..., None]
        np.rint(steps, out=steps)
        _clip(steps, self.zero[..., None], self.format)
        return steps

    def pack(self, levels: Levels) -> PackedRows:
        """Levels [n, in] with this grid's scales and zero points."""
        zero = None if self.format.symmetric else self.zero.astype(np.uint8)
        return pack_levels(levels, self.scale, zero, self.format)


def highest_level(fmt: Format) -> int:
    """The highest level."""
    return (1 << fmt.bits) - 1


def in_blocks(array: Float, fmt: Format) -> Float:
    """Reshape [n, in] to [n, blocks, block]."""
    return array.reshape(len(array), -1, fmt.block)


def without_tiny(scale: Float) -> Float:
    """Replace scales that are too small to divide by with 1, by which their blocks are rounded to zeros."""
    return np.where(np.abs(scale) < SMALLEST_SCALE, np.float32(1), scale).astype(np.float32)


def round_by_search(weight: Float, fmt: Format) -> PackedRows:
    """Round rows [n, in] to the grid of `search_grid`."""
    grid = search_grid(weight, fmt)
    return grid.pack(grid.levels(weight))


def round_by_importance(squares: Float) -> Round:
    """The rounding function for a matrix whose input columns have these sums of squares, [in].

    The squared error of a weight counts as much as the square of its input, as in llama.cpp's importance matrix: it is
    the error of the outputs for inputs whose columns are not correlated. 8 bits are rounded to nearest, which loses
    very little.
    """
    importance = squares + LEAST_IMPORTANCE * (float(squares.mean()) or 1.0)

    def round_rows(weight: Float, fmt: Format) -> PackedRows:
        if fmt.bits == 8:
            return pack(weight, fmt)
        grid = search_grid(weight, fmt, importance)
        return grid.pack(grid.levels(weight))

    return round_rows


def search_grid(weight: Float, fmt: Format, importance: Float | None = None) -> Grid:
    """The grid of the least squared error of each block, among shrunk ranges and their least-squares scales.

    importance: [in], the weight of each column's squared error; None: equal weights.
    """
    found = np.empty((2, len(weight), weight.shape[1] // fmt.block), np.float32)
    roots = np.ones(weight.shape[1], np.float32) if importance is None else np.sqrt(importance.astype(np.float32))
    for start in range(0, len(weight), TILE):
        rows = slice(start, start + TILE)
        for index in range(found.shape[2]):
            columns = slice(index * fmt.block, (index + 1) * fmt.block)
            tile = np.ascontiguousarray(weight[rows, columns].T)
            found[:, rows, index] = _Tile(fmt, tile, roots[columns, None]).search()
    return Grid(fmt, half_scale(found[0], fmt), found[1])


class _Tile:
    """The search for a few rows' blocks of the same columns, transposed to [block, m]: one block in each column.

    In this layout sums over a block add whole rows, which are contiguous in memory. roots: square roots of the weights
    of squared errors, [block, 1].
    """

    def __init__(self, fmt: Format, blocks: Float, roots: Float) -> None:
        self.format, self.blocks, self.roots = fmt, blocks, roots
        self.weighted = blocks * roots
        self._steps, self._difference = np.empty_like(blocks), np.empty_like(blocks)

    def search(self) -> tuple[Float, Float]:
        """The scales and zero points [m] of the best start, or of the least-squares scales that it leads to."""
        least = np.full(self.blocks.shape[1], np.inf, np.float32)
        best = np.ones_like(least), np.zeros_like(least)
        for scale, zero in _symmetric(self.blocks, self.format) if self.format.symmetric else self._asymmetric():
            self._round(scale, zero)
            self._keep(self._error(scale), (scale, zero), least, best)
        for _ in range(REFITS):
            scale, zero = best
            self._round(scale, zero)
            refitted = self._refitted(scale)
            self._round(refitted, zero)
            self._keep(self._error(refitted), (refitted, zero), least, best)
        return best

    def _asymmetric(self) -> Iterator[tuple[Float, Float]]:
        """Starts with zero points: each end of the range shrinks by itself."""
        low, high = _range(self.blocks)
        pairs = product(END_SHRINKS, repeat=2)
        return (_levels_of(low * np.float32(lower), high * np.float32(upper), self.format) for lower, upper in pairs)

    def _round(self, scale: Float, zero: Float) -> None:
        """Set `_steps` to the nearest levels, counted from the zero point, times the roots."""
        steps = np.divide(self.blocks, scale, out=self._steps)
        np.rint(steps, out=steps)
        _clip(steps, zero, self.format)
        steps *= self.roots

    def _error(self, scale: Float) -> Float:
        """Weighted squared error of each block under `_steps`, [m]."""
        difference = np.multiply(self._steps, scale, out=self._difference)
        difference -= self.weighted
        difference *= difference
        total: Float = difference.sum(axis=0)
        return total

    def _refitted(self, scale: Float) -> Float:
        """The least-squares scale for the levels in `_steps`, [m]."""
        square = np.multiply(self._steps, self._steps, out=self._difference).sum(axis=0)
        product = np.multiply(self._steps, self.weighted, out=self._difference).sum(axis=0)
        return without_tiny(np.where(square > 0, product / np.where(square > 0, square, 1), scale))

    def _keep(self, error: Float, found: tuple[Float, Float], least: Float, best: tuple[Float, Float]) -> None:
        """Update `least` and `best` in place where the error is smaller; of equal ones the first stays."""
        better = error < least
        for old, new in zip((least, *best), (error, *found), strict=True):
            np.copyto(old, new, where=better)


def _symmetric(blocks: Float, fmt: Format) -> Iterator[tuple[Float, Float]]:
    """Starts without zero points, for blocks [block, m]: the largest magnitude is at the lowest level, or opposite it.

    There is one level more below zero than above.
    """
    half = 1 << (fmt.bits - 1)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=0)[None], axis=0)[0]
    zero = np.full_like(extreme, half)
    return ((without_tiny(extreme * (sign * shrink / half)), zero) for shrink in SHRINKS for sign in (-1, 1))


def _clip(steps: Float, zero: Float, fmt: Format) -> None:
    """Clip steps in place to the format's levels; zero points are broadcast against the steps."""
    if fmt.symmetric:  # scalar bounds are twice as fast
        half = 1 << (fmt.bits - 1)
        np.clip(steps, -half, highest_level(fmt) - half, out=steps)
    else:
        np.maximum(steps, -zero, out=steps)
        np.minimum(steps, highest_level(fmt) - zero, out=steps)


def _range(blocks: Float) -> tuple[Float, Float]:
    """The least and the greatest value of each block [block, m], and of zero."""
    return np.minimum(blocks.min(axis=0), 0), np.maximum(blocks.max(axis=0), 0)


def _levels_of(low: Float, high: Float, fmt: Format) -> tuple[Float, Float]:
    """Scales and zero points whose levels span a range."""
    scale = without_tiny((high - low) / np.float32(highest_level(fmt)))
    return scale, np.clip(np.rint(-low / scale), 0, highest_level(fmt))
