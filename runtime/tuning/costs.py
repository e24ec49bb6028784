"""What a step costs: seconds by the number of tokens in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .widths import ANY, Widths

FOLLOW = 0.1  # how far one step moves a live curve
PREFILL_CHUNK = 256  # tokens a step; a multiple of every step width
OUTLIER = 2.0  # a step that took more than so many times as long counts as that


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Points (tokens in the step, seconds), widths rising; linear between them and on beyond the last."""

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        widths = [width for width, _ in self.points]
        if not widths or widths != sorted(set(widths)) or widths[0] < 1:
            raise ValueError(f"the widths of a cost curve rise from 1 or more, not {widths}")

    def __call__(self, width: float) -> float:
        """Seconds of a step of so many tokens; a mean width may be no whole number."""
        if width <= self.points[0][0] or len(self.points) == 1:
            return self.points[0][1]
        pieces = list(pairwise(self.points))
        low, high = next((piece for piece in pieces if width <= piece[1][0]), pieces[-1])
        slope = (high[1] - low[1]) / (high[0] - low[0])
        return max(0.0, low[1] + slope * (width - low[0]))


class LiveCosts:
    """A curve that follows the machine: one factor for all widths, from what steps take now. Contexts grow, other
    programs come and go; the curve's form stays."""

    def __init__(self, costs: StepCosts, most: int) -> None:
        self._costs = costs
        self._table = [costs(width) for width in range(most + 1)]
        self.factor = 1.0
        self._seen = 0

    def __call__(self, width: int) -> float:
        """Seconds of a step of so many tokens, as of late."""
        return self.factor * (self._table[width] if width < len(self._table) else self._costs(width))

    def observe(self, width: int, seconds: float) -> None:
        """Follow a step that was timed; the first ones at once, since the curve may be of a busier hour."""
        self._seen += 1
        ratio = min(OUTLIER, max(1 / OUTLIER, seconds / self(width)))
        self.factor *= 1 + max(FOLLOW, 1 / self._seen) * (ratio - 1)


@dataclass(frozen=True, slots=True)
class RoundCosts:
    """The steps of a round; overhead: seconds outside of both models' steps; widths: that the target's may have."""

    draft: StepCosts
    verify: StepCosts
    overhead: float = 0.0
    widths: Widths = ANY

    def seconds(self, k: int, accepted: float) -> float:
        """A round of k drafts after rounds of `accepted` tokens: the draft reads those and k - 1 masks."""
        draft = self.draft(accepted + k - 1) if k else 0.0
        return draft + self.verify(self.widths.width_for(k + 1)) + self.overhead


def tokens_per_round(acceptance: Sequence[float], k: int) -> float:
    """Expected tokens that a round of k drafts commits; acceptance: [at least k], by position."""
    if len(acceptance) < k:
        raise ValueError(f"acceptance of {len(acceptance)} positions says nothing of {k} drafts")
    return 1.0 + sum(acceptance[:k])


def throughput(costs: RoundCosts, acceptance: Sequence[float], k: int) -> float:
    """Expected tokens a second with k drafts a round; k = 0 is plain decoding."""
    tokens = tokens_per_round(acceptance, k)
    return tokens / costs.seconds(k, tokens)
