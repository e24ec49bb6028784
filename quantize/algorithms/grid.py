"""The grid that a matrix is rounded to: a scale and a zero point a block, as MatMulNBits has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.precision import Format
from pard_onnx.quantize.packing.pack import SMALLEST_SCALE, Float, Packed, pack_levels

SHRINKS = np.linspace(1.05, 0.5, 23, dtype=np.float32)  # of the range; beyond 1 the end levels are rarely met
TILE = 512  # rows whose blocks are searched together: what is computed of them stays in a core's cache
Levels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Grid:
    """Level q of a block stands for (q - zero) * scale. scale, zero: [n, blocks]; scale may be negative."""

    format: Format
    scale: Float
    zero: Float

    def levels(self, weight: Float) -> Levels:
        """The nearest levels, [n, in]."""
        found = self.steps(in_blocks(weight, self.format))
        found += self.zero[..., None]
        return found.astype(np.uint8).reshape(weight.shape)

    def steps(self, blocks: Float) -> Float:
        """The nearest levels of weights [n, blocks, block], counted from the zero point."""
        steps: Float = blocks / self.scale[..., None]
        np.rint(steps, out=steps)
        _clip(steps, self.zero[..., None], self.format)
        return steps

    def pack(self, levels: Levels) -> Packed:
        zero = None if self.format.symmetric else self.zero.astype(np.uint8)
        return pack_levels(levels, self.scale, zero, self.format)


def top(fmt: Format) -> int:
    """The highest level."""
    return (1 << fmt.bits) - 1


def in_blocks(array: Float, fmt: Format) -> Float:
    """[n, in] as [n, blocks, block]."""
    return array.reshape(len(array), -1, fmt.block)


def usable(scale: Float) -> Float:
    """Scales too small to divide by become 1: such a block is rounded to zeros."""
    return np.where(np.abs(scale) < SMALLEST_SCALE, np.float32(1), scale).astype(np.float32)


def searched(weight: Float, fmt: Format) -> Packed:
    """Rows [n, in] under the grid of `search`."""
    grid = search(weight, fmt)
    return grid.pack(grid.levels(weight))


def search(weight: Float, fmt: Format, importance: Float | None = None) -> Grid:
    """Per block the grid of the least squared error, of those that shrink the block's range and refit its scale.

    importance: [in], what a column's squared error counts; None: all alike.
    """
    found = np.empty((2, len(weight), weight.shape[1] // fmt.block), np.float32)
    roots = np.ones(weight.shape[1], np.float32) if importance is None else np.sqrt(importance.astype(np.float32))
    for start in range(0, len(weight), TILE):
        rows = slice(start, start + TILE)
        for index in range(found.shape[2]):
            columns = slice(index * fmt.block, (index + 1) * fmt.block)
            tile = np.ascontiguousarray(weight[rows, columns].T)
            found[:, rows, index] = _Tile(fmt, tile, roots[columns, None]).search()
    return Grid(fmt, *found)


class _Tile:
    """Blocks of the same columns, one a column [block, m], so that all that is computed of a block runs along memory.

    roots: of what a squared error counts [block, 1].
    """

    def __init__(self, fmt: Format, blocks: Float, roots: Float) -> None:
        self.format, self.blocks, self.roots = fmt, blocks, roots
        self.weighted = blocks * roots
        self._steps, self._off = np.empty_like(blocks), np.empty_like(blocks)

    def search(self) -> tuple[Float, Float]:
        """The best scales and zero points [m]: of each start, and of the start with its scale refitted."""
        least = np.full(self.blocks.shape[1], np.inf, np.float32)
        best = np.ones_like(least), np.zeros_like(least)
        for scale, zero in _symmetric(self.blocks, self.format) if self.format.symmetric else self._asymmetric():
            self._round(scale, zero)
            error = self._error(scale)
            refitted = self._refitted(scale)
            self._keep(error, (scale, zero), least, best)
            self._round(refitted, zero)
            self._keep(self._error(refitted), (refitted, zero), least, best)
        return best

    def _asymmetric(self) -> Iterator[tuple[Float, Float]]:
        """The range shrinks from above, or from both ends."""
        low, high = _range(self.blocks, axis=0)
        return (_levels_of(low, high, self.format, s, lower) for s in SHRINKS for lower in (1.0, float(s)))

    def _round(self, scale: Float, zero: Float) -> None:
        """The nearest levels, counted from the zero point, times the roots."""
        steps = np.divide(self.blocks, scale, out=self._steps)
        np.rint(steps, out=steps)
        _clip(steps, zero, self.format)
        steps *= self.roots

    def _error(self, scale: Float) -> Float:
        off = np.multiply(self._steps, scale, out=self._off)
        off -= self.weighted
        off *= off
        total: Float = off.sum(axis=0)
        return total

    def _refitted(self, scale: Float) -> Float:
        """The least-squares scale of the levels."""
        square = np.multiply(self._steps, self._steps, out=self._off).sum(axis=0)
        product = np.multiply(self._steps, self.weighted, out=self._off).sum(axis=0)
        return usable(np.where(square > 0, product / np.where(square > 0, square, 1), scale))

    def _keep(self, error: Float, found: tuple[Float, Float], least: Float, best: tuple[Float, Float]) -> None:
        """Of equals, the first."""
        better = error < least
        for old, new in zip((least, *best), (error, *found), strict=True):
            np.copyto(old, new, where=better)


def _symmetric(blocks: Float, fmt: Format) -> Iterator[tuple[Float, Float]]:
    """Of blocks [block, m], the largest magnitude at the far level: there is one more below zero than above."""
    half = 1 << (fmt.bits - 1)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=0)[None], axis=0)[0]
    zero = np.full_like(extreme, half)
    return ((usable(extreme * (sign * shrink / half)), zero) for shrink in SHRINKS for sign in (-1, 1))


def _clip(steps: Float, zero: Float, fmt: Format) -> None:
    """In place, to the levels that there are; a zero point is broadcast against the steps."""
    if fmt.symmetric:  # one bound for all is twice as fast
        half = 1 << (fmt.bits - 1)
        np.clip(steps, -half, top(fmt) - half, out=steps)
    else:
        np.maximum(steps, -zero, out=steps)
        np.minimum(steps, top(fmt) - zero, out=steps)


def best(blocks: Float, grids: Iterable[Grid], power: float = 2.0) -> Grid:
    """Per block [n, blocks, block] the one of `grids` under which the errors' `power` sums to the least; of equals, the
    first."""
    remaining = iter(grids)
    found = next(remaining)
    least = _error(blocks, found, power)
    for grid in remaining:
        error = _error(blocks, grid, power)
        better = error < least
        least = np.where(better, error, least)
        scale, zero = (np.where(better, getattr(grid, part), getattr(found, part)) for part in ("scale", "zero"))
        found = Grid(found.format, scale, zero)
    return found


def _error(blocks: Float, grid: Grid, power: float) -> Float:
    """[n, blocks]"""
    off = grid.steps(blocks)
    off *= grid.scale[..., None]
    off -= blocks
    off = off * off if power == 2 else np.power(np.abs(off, out=off), power)
    total: Float = off.sum(axis=-1)
    return total


def whole_range(blocks: Float, fmt: Format) -> Grid:
    """Zero points; levels from end to end of each block's range [n, blocks, block]."""
    return Grid(fmt, *_levels_of(*_range(blocks, axis=-1), fmt))


def _range(blocks: Float, axis: int) -> tuple[Float, Float]:
    """Of each block, zero included."""
    return np.minimum(blocks.min(axis=axis), 0), np.maximum(blocks.max(axis=axis), 0)


def _levels_of(low: Float, high: Float, fmt: Format, shrink: float = 1.0, lower: float = 1.0) -> tuple[Float, Float]:
    """Scales and zero points of levels over a range times `shrink`, and `lower` below zero."""
    scale = usable((high - low) * np.float32(shrink / top(fmt)))
    return scale, np.clip(np.rint(-low * np.float32(lower) / scale), 0, top(fmt))
