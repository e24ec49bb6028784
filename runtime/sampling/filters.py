"""One row of logits to one id: temperature, filters, softmax and draw.

Behind every filter stands one order: logit descending, then id ascending. Each keeps a first part of it, so that
their intersection is the shortest of those parts. Nothing sorts the vocabulary: top_k partitions it once, top_p
narrows it around the cut.
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

BLOCK = 1024  # weights that one step of a draw sums
FEW = 4096  # weights that are sorted rather than narrowed
SAMPLE = 1024  # weights that a bracket is taken from
LIGHTEST = np.finfo(np.float32).smallest_subnormal
COLDEST = 1e-30  # in float32 a smaller temperature would be 0, and 0 / 0 is no number


@dataclass(frozen=True, slots=True)
class Candidates:
    """The ids that the filters have left, and their probabilities up to a factor.

    ids: ascending, [n]; None: the whole row's, 0..n-1. weights: [n], the most probable id's is 1.
    """

    ids: Indexes | None
    weights: Floats

    def draw(self, u: float) -> int:
        """The id at u of the cumulative distribution over ascending ids; u in [0, 1)."""
        at = pick(self.weights, u)
        return at if self.ids is None else int(self.ids[at])


def candidates(logits: Floats, sampling: Sampling, scratch: Floats) -> Candidates:
    """Temperature, then top_k, top_p, min_p; temperature above 0.

    logits: [vocabulary], their maximum finite. scratch: [vocabulary], overwritten; the result may lie in it.
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
    """Indexes of the `count` largest values, ascending; of equal ones the first. count < len(values)."""
    cut = np.partition(values, values.size - count)[values.size - count]
    kept = np.flatnonzero(values >= cut)
    surplus = kept.size - count
    return np.delete(kept, np.flatnonzero(values[kept] == cut)[-surplus:]) if surplus else kept


def heaviest(weights: Floats, logits: Floats, share: float) -> NDArray[np.bool_]:
    """Which are the fewest weights that sum to `share` (below 1) of all, as a mask.

    Of equal weights those of larger logits, then the first: rounding may give two logits one weight.
    """
    total = float(block_sums(weights).sum())
    cut, above = mass_cut(weights, total, share)
    cut = max(cut, LIGHTEST)  # 0 if rounding asks for more than there is
    kept = weights >= cut
    ties = np.flatnonzero(weights == cut)
    wanted = ceil((share * total - above) / float(cut))
    if wanted < ties.size:
        ties = ties[np.argsort(-logits[ties], kind="stable")]
        kept[ties[wanted:]] = False
    return kept


def mass_cut(weights: Floats, total: float, share: float) -> tuple[np.float32, float]:
    """The lightest of the fewest weights that sum to share * total; and the sum of all heavier than it.

    n weights below (1 - share) * total / n sum to less than 1 - share of all, so the cut is not among them. What is
    left is narrowed between two weights that a sample puts around the cut (Floyd and Rivest's selection, with sums
    in the place of counts); where the sample misled, the side that has the cut is narrowed instead.
    """
    need, above, upto, margin = share * total, 0.0, total, SAMPLE // 16  # sums without and with weights
    likely = weights >= np.float32((1 - share) * total / weights.size)
    if 2 * np.count_nonzero(likely) < weights.size:  # else a copy gains nothing
        weights = weights[np.flatnonzero(likely)]
        upto = float(weights.sum(dtype=np.float64))
    while weights.size > FEW:
        heavy, light = bracket(weights, (need - above) / max(upto - above, need - above), margin)
        margin //= 2  # at 0 they are one weight, and each step shrinks or ends
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
        else:  # if mass < need it is so by rounding
            weights, above, upto = inside, over, mass
    weights = np.sort(weights)[::-1]
    sums = above + np.cumsum(weights, dtype=np.float64)
    cut = weights[min(int(np.searchsorted(sums, need)), weights.size - 1)]
    count = np.count_nonzero(weights > cut)
    return cut, float(sums[count - 1]) if count else above


def bracket(weights: Floats, share: float, margin: int) -> tuple[np.float32, np.float32]:
    """A weight likely not below that at which the heaviest sum to `share` of all, and one likely not above it."""
    sample = np.sort(weights[:: weights.size // SAMPLE])[::-1]
    sums = np.cumsum(sample, dtype=np.float64)
    at = int(np.searchsorted(sums, share * float(sums[-1])))
    return sample[max(at - margin, 0)], sample[min(at + margin, sample.size - 1)]


def block_sums(weights: Floats) -> NDArray[np.float64]:
    """Sums of BLOCK weights each, the last of what is left; numpy's pairwise float32 sums, right to about 1e-7."""
    return np.add.reduceat(weights, np.arange(0, weights.size, BLOCK)).astype(np.float64)


def pick(weights: Floats, u: float) -> int:
    """The first index at which the running sum of weights exceeds u times their sum; u in [0, 1).

    Sums of blocks first, then one block's own: rounding may leave u past a block's end, which means its last.
    """
    ends = np.cumsum(block_sums(weights))
    block, rest = exceeding(ends, u * float(ends[-1]))
    inside = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    return block * BLOCK + exceeding(inside, rest)[0]


def exceeding(sums: NDArray[np.float64], mass: float) -> tuple[int, float]:
    """The first index whose running sum exceeds mass, and mass less the sum before; never one of weight 0."""
    last = float(sums[-1])
    mass = min(mass, nextafter(last, 0.0))
    at = int(np.searchsorted(sums, mass, side="right"))
    return at, mass - float(sums[at - 1]) if at else mass
