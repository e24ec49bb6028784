"""Magnitudes of activations: a histogram whose range grows, the clipping threshold of least error, and the scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 2048
CHUNK = 1 << 16  # values that are counted at a time
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ActivationScales:
    """The scales by which activations are quantized, by the names of the matrices that they are multiplied by."""

    inputs: Mapping[str, np.float32]  # of the product's input
    outputs: Mapping[str, np.float32]  # of the product


class Magnitudes:
    """Counts of |x| in bins of equal width from 0 to `limit`, a power of two that doubles when a value reaches it.

    The memory does not depend on how many values are added, and the counts do not depend on their order: widths are
    powers of two, so a value's bin is computed without rounding, and two bins become exactly one when `limit` doubles.
    """

    def __init__(self) -> None:
        self.largest = np.float32(0)
        self.limit = 0.0  # until the first value that is not zero; zeros are in the first bin for any limit
        self.counts = np.zeros(BINS)

    def add(self, x: Floats) -> None:
        """Count the values of an array of any shape. Raises ValueError if one of them is not finite."""
        size = np.abs(x)
        largest = size.max()
        if not np.isfinite(largest):
            raise ValueError("not finite")
        self.largest = max(self.largest, largest)
        if largest and largest >= self.limit:
            self._grow(2.0 ** (np.floor(np.log2(np.float64(largest))) + 1))
        flat, exponent = size.reshape(-1), int(np.log2(BINS / (self.limit or 1.0)))
        for start in range(0, len(flat), CHUNK):
            bins = np.ldexp(flat[start : start + CHUNK], exponent).astype(np.int64)
            self.counts += np.bincount(bins, minlength=BINS)

    def _grow(self, limit: float) -> None:
        while 0 < self.limit < limit:  # two bins become one; without a limit only the first bin is filled
            self.counts = np.append(self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2))
            self.limit *= 2
        self.limit = limit

    def clip(self, bits: int) -> np.float32:
        """The threshold t of the least squared error when x is clipped to [-t, t] and rounded to 2^bits - 1 levels.

        A value below half a step becomes 0; between half a step and t, rounding errors are assumed to be uniformly
        distributed within a step.
        """
        if not self.limit:
            return self.largest
        width = self.limit / BINS
        centers = (np.arange(BINS) + 0.5) * width
        edges = np.arange(1, BINS + 1) * width
        n, first, second = (_sums(self.counts * centers**power) for power in (0, 1, 2))  # below each edge
        steps = 2 * edges / (2**bits - 2)
        zeros = np.minimum(steps / 2 / width, BINS).astype(int)  # bins that become 0
        inside = second[zeros] + (n[1:] - n[zeros]) * steps**2 / 12
        above = (second[-1] - second[1:]) - 2 * edges * (first[-1] - first[1:]) + edges**2 * (n[-1] - n[1:])
        best = edges[np.argmin(inside + above)]
        return min(np.float32(best), self.largest)


def _sums(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums of the first 0, 1, 2, ... items, [n + 1]."""
    return np.concatenate([[0.0], np.cumsum(x)])
