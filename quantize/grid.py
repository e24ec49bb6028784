"""The grid that a matrix is rounded to: a scale and a zero point a block, as MatMulNBits has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.precision import Format

from .pack import SMALLEST_SCALE, Float, Packed, pack_levels

SHRINKS = np.linspace(1.05, 0.5, 23, dtype=np.float32)  # of the range; beyond 1 the end levels are rarely met
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
        steps = blocks / self.scale[..., None]
        np.rint(steps, out=steps)
        zero = self.zero[..., None]
        clipped: Float = np.clip(steps, -zero, top(self.format) - zero, out=steps)
        return clipped

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
    blocks = in_blocks(weight, fmt)
    counts = None if importance is None else in_blocks(importance[None].astype(np.float32), fmt)
    return best(blocks, _candidates(blocks, fmt, counts), counts)


def _candidates(blocks: Float, fmt: Format, counts: Float | None) -> Iterator[Grid]:
    """Each of those that shrink the range, and once more with its scale refitted."""
    for start in _symmetric(blocks, fmt) if fmt.symmetric else _asymmetric(blocks, fmt):
        yield start
        yield _refit(blocks, start, counts)


def best(blocks: Float, grids: Iterable[Grid], counts: Float | None = None, power: float = 2.0) -> Grid:
    """Per block the one of `grids` under which the errors' `power` sums to the least; of equals, the first."""
    remaining = iter(grids)
    found = next(remaining)
    least = _error(blocks, found, counts, power)
    for grid in remaining:
        error = _error(blocks, grid, counts, power)
        better = error < least
        least = np.where(better, error, least)
        scale, zero = (np.where(better, getattr(grid, part), getattr(found, part)) for part in ("scale", "zero"))
        found = Grid(found.format, scale, zero)
    return found


def whole_range(blocks: Float, fmt: Format, shrink: float = 1.0, lower: float = 1.0) -> Grid:
    """Zero points; levels from end to end of a block's range, zero included, times `shrink`, and `lower` below zero."""
    low, high = np.minimum(blocks.min(axis=-1), 0), np.maximum(blocks.max(axis=-1), 0)
    scale = usable((high - low) * np.float32(shrink / top(fmt)))
    return Grid(fmt, scale, np.clip(np.rint(-low * np.float32(lower) / scale), 0, top(fmt)))


def _symmetric(blocks: Float, fmt: Format) -> Iterator[Grid]:
    """The largest magnitude at the far level: there is one more below zero than above."""
    half = 1 << (fmt.bits - 1)
    at = np.abs(blocks).argmax(axis=-1)[..., None]
    extreme = np.take_along_axis(blocks, at, axis=-1)[..., 0]
    zero = np.full_like(extreme, half)
    return (Grid(fmt, usable(extreme * (sign * shrink / half)), zero) for shrink in SHRINKS for sign in (-1, 1))


def _asymmetric(blocks: Float, fmt: Format) -> Iterator[Grid]:
    """The range shrinks from above, or from both ends."""
    return (whole_range(blocks, fmt, shrink, lower) for shrink in SHRINKS for lower in (1.0, shrink))


def _refit(blocks: Float, grid: Grid, counts: Float | None) -> Grid:
    """The least-squares scale of the levels that the grid gives."""
    steps = grid.steps(blocks)
    weighted = steps if counts is None else steps * counts
    square = np.einsum("nbi,nbi->nb", weighted, steps)
    scale = np.einsum("nbi,nbi->nb", weighted, blocks) / np.where(square > 0, square, 1)
    return Grid(grid.format, usable(np.where(square > 0, scale, grid.scale)), grid.zero)


def _error(blocks: Float, grid: Grid, counts: Float | None, power: float) -> Float:
    """[n, blocks]"""
    off = grid.steps(blocks)
    off *= grid.scale[..., None]
    off -= blocks
    off = off * off if power == 2 else np.power(np.abs(off, out=off), power)
    if counts is not None:
        off *= counts
    total: Float = off.sum(axis=-1)
    return total
