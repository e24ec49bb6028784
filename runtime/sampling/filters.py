"""Chooses one id from a row of logits: temperature, filters, softmax and a random draw.

All filters rank the ids in one order: by logit, the largest first, then by id, the lowest first. Each filter keeps the
first ids of this order, so all filters together keep what the strictest filter keeps. The vocabulary is never sorted:
top_k partitions it once, and top_p narrows it down to the weights around the cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import ceil, nextafter
from operator import and_

import numpy as np
from numpy.typing import NDArray

from .settings import Sampling

Floats = NDArray[np.float32]
Indexes = NDArray[np.int64]

BLOCK = 1024  # weights that are summed together in a draw
FEW = 4096  # so many weights or fewer are sorted instead of narrowed down
SAMPLE = 1024  # weights in the sample that estimates where the cut is
LIGHTEST = np.finfo(np.float32).smallest_subnormal
COLDEST = 1e-30  # the lowest temperature: a lower one would be 0 in float32, and 0 / 0 is NaN


@dataclass(frozen=True, slots=True)
class Candidates:
    """The ids that the filters have kept, with weights in proportion to their probabilities."""

    ids: Indexes | None  # ascending, [n]; None for all ids of the row, 0..n-1
    weights: Floats  # [n]; the weight of the most probable id is 1

    def draw(self, u: float) -> int:
        """The id at which the cumulative distribution over ascending ids exceeds u; u in [0, 1)."""
        at = pick(self.weights, u)
        return at if self.ids is None else int(self.ids[at])


def candidates(logits: Floats, sampling: Sampling, scratch: Floats) -> Candidates:
    """The ids that top_k, top_p and min_p keep at this temperature, which is above 0.

    logits: [vocabulary], with a finite maximum. scratch: [vocabulary], is overwritten; the weights may be a view of it.
    """
    top, ids = logits.max(), None
    if 0 < sampling.top_k < logits.size:
        ids = largest(logits, sampling.top_k)
        logits = logits[ids]
    weights = scratch[: logits.size]
    with np.errstate(over="ignore"):  # to -inf, whose weight is 0
        np.subtract(logits, top, out=weights)
        np.divide(weights, np.float32(max(sampling.temperature, COLDEST)), out=weights)
    np.exp(weights, out=weights)
    masks: list[NDArray[np.bool_]] = []
    if sampling.top_p < 1:
        masks.append(heaviest(weights, logits, sampling.top_p))
    if sampling.min_p > 0:
        masks.append(weights >= np.float32(sampling.min_p))
    if not masks:
        return Candidates(ids, weights)
    kept = np.flatnonzero(reduce(and_, masks))
    return Candidates(kept if ids is None else ids[kept], weights[kept])


def largest(values: Floats, count: int) -> Indexes:
    """The indexes of the `count` largest values, ascending; of equal values, the first. count < len(values)."""
    cut = np.partition(values, values.size - count)[values.size - count]
    kept = np.flatnonzero(values >= cut)
    surplus = kept.size - count
    return np.delete(kept, np.flatnonzero(values[kept] == cut)[-surplus:]) if surplus else kept


def heaviest(weights: Floats, logits: Floats, share: float) -> NDArray[np.bool_]:
    """The fewest weights whose sum is at least `share` (below 1) of the sum of all, as a mask.

    Of equal weights, those with larger logits come first, then those with lower ids: two different logits may have the
    same weight by rounding.
    """
    total = float(block_sums(weights).sum())
    cut, above = mass_cut(weights, total, share)
    cut = max(cut, LIGHTEST)  # the cut is 0 if, by rounding, all weights sum to less than the share
    kept = weights >= cut
    ties = np.flatnonzero(weights == cut)
    wanted = ceil((share * total - above) / float(cut))
    if wanted < ties.size:
        ties = ties[np.argsort(-logits[ties], kind="stable")]
        kept[ties[wanted:]] = False
    return kept


def mass_cut(weights: Floats, total: float, share: float) -> tuple[np.float32, float]:
    """The cut: the smallest of the fewest weights that sum to share * total; and the sum of all weights above it.

    n weights below (1 - share) * total / n sum to less than 1 - share of all, so the cut is not among them. The other
    weights are narrowed down to those between two bounds, which a sample estimates to lie on both sides of the cut
    (Floyd and Rivest's selection algorithm, with sums instead of counts). If the cut is not between the bounds, the
    side with the cut is narrowed down instead.
    """
    need, above, upto, margin = share * total, 0.0, total, SAMPLE // 16  # sums of the weights above, and with `weights`
    likely = weights >= np.float32((1 - share) * total / weights.size)
    if 2 * np.count_nonzero(likely) < weights.size:  # otherwise a copy saves no time
        weights = weights[np.flatnonzero(likely)]
        upto = float(weights.sum(dtype=np.float64))
    while weights.size > FEW:
        heavy, light = bracket(weights, (need - above) / max(upto - above, need - above), margin)
        margin //= 2  # at 0 both bounds are the same weight, so each turn removes weights or returns
        heavier = weights > heavy
        over = above + float((weights * heavier).sum(dtype=np.float64))
        if over >= need:
            weights, upto = weights[np.flatnonzero(heavier)], over
            continue
        inside = weights[np.flatnonzero((weights >= light) & ~heavier)]
        mass = over + float(inside.sum(dtype=np.float64))
        lighter = weights[np.flatnonzero(weights < light)] if mass < need else inside[:0]
        if lighter.size:
            weights, above = lighter, mass
        elif heavy == light:
            return heavy, over
        else:  # mass < need is possible here, by rounding
            weights, above, upto = inside, over, mass
    weights = np.sort(weights)[::-1]
    sums = above + np.cumsum(weights, dtype=np.float64)
    cut = weights[min(int(np.searchsorted(sums, need)), weights.size - 1)]
    count = np.count_nonzero(weights > cut)
    return cut, float(sums[count - 1]) if count else above


def bracket(weights: Floats, share: float, margin: int) -> tuple[np.float32, np.float32]:
    """Two weights of a sample that probably lie on both sides of the cut, the heavier one first.

    share: the largest weights above the cut sum to this share of all weights. margin: positions in the sample.
    """
    sample = np.sort(weights[:: weights.size // SAMPLE])[::-1]
    sums = np.cumsum(sample, dtype=np.float64)
    at = int(np.searchsorted(sums, share * float(sums[-1])))
    return sample[max(at - margin, 0)], sample[min(at + margin, sample.size - 1)]


def block_sums(weights: Floats) -> NDArray[np.float64]:
    """Sums of BLOCK weights each; the last sum may have fewer. numpy sums float32 pairwise, exact to about 1e-7."""
    return np.add.reduceat(weights, np.arange(0, weights.size, BLOCK)).astype(np.float64)


def pick(weights: Floats, u: float) -> int:
    """The first index at which the cumulative sum of the weights exceeds u times their sum; u in [0, 1).

    The block is found first, then the index in it. If by rounding the index is behind the block's end, it is the last
    index of the block.
    """
    ends = np.cumsum(block_sums(weights))
    block, rest = exceeding(ends, u * float(ends[-1]))
    inside = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    return block * BLOCK + exceeding(inside, rest)[0]


def exceeding(sums: NDArray[np.float64], mass: float) -> tuple[int, float]:
    """The first index whose cumulative sum exceeds mass, and mass minus the sum before it.

    The index never belongs to a weight of 0.
    """
    last = float(sums[-1])
    mass = min(mass, nextafter(last, 0.0))
    at = int(np.searchsorted(sums, mass, side="right"))
    return at, mass - float(sums[at - 1]) if at else mass
