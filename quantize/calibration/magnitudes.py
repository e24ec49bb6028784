"""A histogram of magnitudes that grows with them, and where to clip so that rounding errs least."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BINS = 2048
Floats = NDArray[np.float32]


class Magnitudes:
    """How often which |x| occurred: bins of equal width from 0 to a power of two, which doubles when one is larger.

    The memory is the same however much is added, and the order does not matter.
    """

    def __init__(self) -> None:
        self.largest = np.float32(0)
        self.limit = 0.0
        self.counts = np.zeros(BINS)

    def add(self, x: Floats) -> None:
        """Raises ValueError for what is not finite."""
        size = np.abs(x)
        largest = size.max()
        if not np.isfinite(largest):
            raise ValueError("not finite")
        self.largest = max(self.largest, largest)
        if largest and largest >= self.limit:
            self._grow(2.0 ** (np.floor(np.log2(np.float64(largest))) + 1))
        if self.limit:
            self.counts += np.histogram(size, BINS, range=(0, self.limit))[0]

    def _grow(self, limit: float) -> None:
        while 0 < self.limit < limit:  # two bins become one
            self.counts = np.append(self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2))
            self.limit *= 2
        self.limit = limit

    def clip(self, bits: int) -> np.float32:
        """The t for which x, clipped to [-t, t] and rounded to 2^bits - 1 levels in it, has the least squared error.

        What lies below half a step becomes 0; between that and t the error is taken to be even within a step.
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
    """Of the first 0, 1, .. items."""
    return np.concatenate([[0.0], np.cumsum(x)])
