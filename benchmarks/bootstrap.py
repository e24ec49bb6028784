"""A ratio of two rates with its confidence interval, by resampling prompts (paired bootstrap)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
LEVEL = 0.95
SEED = 0  # the interval is a function of the measurements alone


@dataclass(frozen=True, slots=True)
class Work:
    """What one prompt took: tokens, and the seconds that they took."""

    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """value, and the bounds of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def rate(works: Sequence[Work]) -> float:
    """Tokens a second over all prompts: tokens over seconds, not a mean of rates."""
    seconds = sum(work.seconds for work in works)
    return sum(work.tokens for work in works) / seconds if seconds else 0.0


def speed_up(ours: Sequence[Work], base: Sequence[Work]) -> Ratio:
    """rate(ours) / rate(base), both over the same prompts in the same order.

    Prompts are drawn again with replacement, each with both of its measurements (Efron & Tibshirani 1993):
    prompts differ in acceptance, and that is what the interval speaks of.
    """
    if len(ours) != len(base):
        raise ValueError(f"{len(ours)} measurements cannot be paired with {len(base)}")
    table = np.array([[a.tokens, a.seconds, b.tokens, b.seconds] for a, b in zip(ours, base, strict=True)])
    if not len(table) or not table.sum(axis=0).all():
        return Ratio(0.0, 0.0, 0.0)
    drawn = np.random.default_rng(SEED).integers(len(table), size=(RESAMPLES, len(table)))
    sums = table[drawn].sum(axis=1)  # [resamples, 4]
    sums = sums[sums.all(axis=1)]  # where EOS came first everywhere there is no rate
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(ratios(sums), [tail, 100 - tail])
    return Ratio(float(ratios(table.sum(axis=0, keepdims=True))[0]), float(low), float(high))


def ratios(sums: np.ndarray) -> np.ndarray:
    """[n, (tokens, seconds, tokens, seconds)] to [n]: the first pair's rate over the second's."""
    out: np.ndarray = sums[:, 0] / sums[:, 1] / (sums[:, 2] / sums[:, 3])
    return out
