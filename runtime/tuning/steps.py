"""A model's steps: the widths (tokens in a step) whose rows are bitwise equal, and what a step of each width costs.

A kernel may sum in another order for another number of rows, and a quantized model turns a difference of 1e-7 into a
visible one where the difference crosses a rounding boundary. Within one set of widths every row is the same, bit for
bit, so that greedy tokens cannot depend on how they were drafted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

PREFILL_CHUNK = 256  # tokens in a step of prefill; a multiple of every step width
FOLLOW_RATE = 0.1  # the share of a step's deviation by which live costs change
OUTLIER = 2.0  # a step that takes more than this many times its expected time, or less, counts as this many times


@dataclass(frozen=True, slots=True)
class Widths:
    """A set of step widths: the multiples of `step`, from `least` on."""

    step: int = 1
    least: int = 1

    def __post_init__(self) -> None:
        if self.step < 1 or self.least < 1:
            raise ValueError(f"a set of step widths has a step and a least width of at least 1, not {self}")

    def width_for(self, tokens: int) -> int:
        """The smallest width of the set that holds so many tokens."""
        return max(self.least, -(-tokens // self.step) * self.step)

    def __contains__(self, width: int) -> bool:
        return width == self.width_for(width)

    def up_to(self, most: int) -> tuple[int, ...]:
        """The widths of the set that are at most `most`."""
        return tuple(width for width in range(1, most + 1) if width in self)


ANY = Widths()
EVEN = Widths(2, 2)
# From the most to the least general. A set is taken if the widths of it that were tried are bitwise equal.
CANDIDATES = (ANY, Widths(1, 2), EVEN, Widths(4, 4), Widths(8, 8))


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of a step by its width: linear between the measured points, and beyond the last one."""

    points: tuple[tuple[int, float], ...]  # (width, seconds), widths rising

    def __post_init__(self) -> None:
        widths = [width for width, _ in self.points]
        if not widths or widths != sorted(set(widths)) or widths[0] < 1:
            raise ValueError(f"the widths of a cost curve rise from 1 or more, not {widths}")
        if not all(0 <= seconds < inf for _, seconds in self.points):
            raise ValueError("the seconds of a cost curve are finite numbers of at least 0")

    def __call__(self, width: float) -> float:
        """Seconds of a step of so many tokens; a mean width need not be a whole number."""
        if width <= self.points[0][0] or len(self.points) == 1:
            return self.points[0][1]
        pieces = list(pairwise(self.points))
        low, high = next((piece for piece in pieces if width <= piece[1][0]), pieces[-1])
        slope = (high[1] - low[1]) / (high[0] - low[0])
        return max(0.0, low[1] + slope * (width - low[0]))


class LiveCosts:
    """Step costs that follow the machine while it decodes.

    Steps take longer as contexts grow and as other programs run. The measured curve keeps its form; one factor, which
    follows the steps that were timed, scales it.
    """

    def __init__(self, costs: StepCosts, widest: int) -> None:
        """widest: costs of widths up to this one are kept in a table."""
        self._costs = costs
        self._table = [costs(width) for width in range(widest + 1)]
        self.factor = 1.0
        self._observed = 0

    def __call__(self, width: int) -> float:
        """Seconds that a step of so many tokens takes at present."""
        return self.factor * (self._table[width] if width < len(self._table) else self._costs(width))

    def observe(self, width: int, seconds: float) -> None:
        """Follow a step that was timed. The first steps count most: the machine may have been busy when the curve was
        measured."""
        self._observed += 1
        ratio = min(OUTLIER, max(1 / OUTLIER, seconds / self(width)))
        self.factor *= 1 + max(FOLLOW_RATE, 1 / self._observed) * (ratio - 1)


@dataclass(frozen=True, slots=True)
class RoundCosts:
    """What the steps of a round cost."""

    draft: StepCosts
    verify: StepCosts
    overhead: float = 0.0  # seconds outside of both models' steps
    widths: Widths = ANY  # that the target's steps may have

    def seconds(self, k: int, accepted: float) -> float:
        """Seconds of a round of k drafts. The draft reads `accepted` tokens of the round before, and k - 1 masks."""
        draft = self.draft(accepted + k - 1) if k else 0.0
        return draft + self.verify(self.widths.width_for(k + 1)) + self.overhead


def tokens_per_round(acceptance: Sequence[float], k: int) -> float:
    """The expected number of tokens that a round of k drafts commits; acceptance: by position, [at least k]."""
    if len(acceptance) < k:
        raise ValueError(f"acceptance of {len(acceptance)} positions says nothing of {k} drafts")
    return 1.0 + sum(acceptance[:k])


def throughput(costs: RoundCosts, acceptance: Sequence[float], k: int) -> float:
    """The expected tokens per second with k drafts in every round; k = 0 is plain decoding."""
    tokens = tokens_per_round(acceptance, k)
    return tokens / costs.seconds(k, tokens)
