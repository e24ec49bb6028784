"""How likely drafts are to be accepted, learned while generating, with the drafter's own word for it.

All estimates are exponential windows: counts that fade, begun with a prior worth a few observations.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

KEEP = 0.97  # of a count, at each observation of its cell: a window of about 33
PRIOR = 2.0  # observations that a prior is worth
LOOKUP_PRIOR = 8.0  # of a lookup's: one long repetition says little about the next match
CERTAIN = 0.99  # no estimate is above: a long draft is never free of doubt


class Cell:
    """A faded ratio: what happened over what was expected to."""

    __slots__ = ("expected", "happened")

    def __init__(self, ratio: float, prior: float = PRIOR) -> None:
        self.happened, self.expected = prior * ratio, prior

    def add(self, happened: float, expected: float = 1.0) -> None:
        self.happened = KEEP * self.happened + happened
        self.expected = KEEP * self.expected + expected

    @property
    def ratio(self) -> float:
        return self.happened / self.expected if self.expected else 0.0


class DraftAcceptance:
    """Of a draft model, by position: how often a draft whose predecessors were accepted is accepted, and how
    that compares with the probabilities that the model gave."""

    def __init__(self, positions: int, prior: float = 0.8) -> None:
        self._rates = [Cell(prior) for _ in range(positions)]
        self._trust = [Cell(1.0) for _ in range(positions)]

    def profile(self) -> list[float]:
        """Of each position's draft, the chance that it and all before it are accepted."""
        return cumulated([cell.ratio for cell in self._rates])

    def estimate(self, probabilities: Sequence[float]) -> list[float]:
        """The chance of each draft of a round, and all before it, given the model's own probabilities."""
        return cumulated([p * cell.ratio for p, cell in zip(probabilities, self._trust, strict=False)])

    def observe(self, probabilities: Sequence[float], verified: int, matched: int) -> None:
        """A round: of the drafts, `verified` were checked and `matched` accepted."""
        for i in range(min(matched + 1, verified)):
            accepted = float(i < matched)
            self._rates[i].add(accepted)
            self._trust[i].add(accepted, probabilities[i])
        if matched == verified:  # nobody looked further; what the model says stands in
            for i in range(verified, len(probabilities)):
                self._rates[i].add(min(CERTAIN, probabilities[i] * self._trust[i].ratio))


class LookupAcceptance:
    """Of lookup proposals, by the length of the match: each token accepted makes the match one longer."""

    BOUNDS = (2, 3, 4, 6, 10, 18)
    PRIORS = (0.15, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95)

    def __init__(self) -> None:
        self._cells = [Cell(ratio, LOOKUP_PRIOR) for ratio in self.PRIORS]

    def _cell(self, length: int) -> Cell:
        return self._cells[bisect_right(self.BOUNDS, length)]

    def estimate(self, length: int, count: int) -> list[float]:
        """The chance of each of `count` tokens after a match of so many, and all before it."""
        return cumulated([self._cell(length + i).ratio for i in range(count)])

    def observe(self, length: int, verified: int, matched: int) -> None:
        for i in range(min(matched + 1, verified)):
            self._cell(length + i).add(float(i < matched))


def cumulated(conditional: Sequence[float]) -> list[float]:
    """Products of the first i, each factor at most CERTAIN."""
    out, product = [], 1.0
    for chance in conditional:
        product *= min(CERTAIN, chance)
        out.append(product)
    return out
