"""Who proposes tokens: a parallel draft model, or nobody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

PREFILL_CHUNK = 256  # tokens a call; a multiple of every step width


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that may follow, the drafter's probability of each given those before it, and who the drafter is;
    ahead: it was made while the target verified the tokens before."""

    ids: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    source: str = "none"
    ahead: bool = False

    def first(self, k: int) -> Proposal:
        """At most the first k tokens."""
        if len(self.ids) <= k:
            return self
        return replace(self, ids=self.ids[:k], probabilities=self.probabilities[:k])


NOTHING = Proposal()


class Drafter(Protocol):
    """What the loop asks of a drafter; `length` and `rollback` speak of its cache, in real tokens."""

    @property
    def length(self) -> int: ...

    def propose(self, committed: Sequence[int], k: int) -> Proposal:
        """Up to k >= 1 tokens to follow `committed`, the whole conversation so far."""
        ...

    def run_ahead(self, committed: Sequence[int], proposal: Proposal, k: int) -> bool:
        """The target verifies `proposal` from now on; True if the next round is drafted meanwhile, k tokens at most."""
        ...

    def observe(self, drafted: int, matched: int) -> None:
        """What became of the last proposal: how many of its tokens were verified, and how many of them matched."""
        ...

    def rollback(self, length: int) -> None: ...


class DraftModel(Protocol):
    """What PardDrafter asks of a session (`DraftSession`)."""

    @property
    def length(self) -> int: ...

    def step(self, ids: Sequence[int], draft_length: int) -> tuple[Any, Any]: ...

    def rollback(self, length: int) -> None: ...


class NoDraft:
    """Plain decoding: nothing is ever proposed."""

    length = 0

    def propose(self, committed: Sequence[int], k: int) -> Proposal:
        return NOTHING

    def run_ahead(self, committed: Sequence[int], proposal: Proposal, k: int) -> bool:
        return False

    def observe(self, drafted: int, matched: int) -> None: ...

    def rollback(self, length: int) -> None: ...


class PardDrafter:
    """One forward pass a round: the real tokens that its cache lacks, then K-1 masks (reference: AMD-AGI/PARD).

    The cache holds committed[start:length]; start is 0 unless a proposal was asked for after a window of context.
    """

    def __init__(self, model: DraftModel, chunk: int = PREFILL_CHUNK, start: int = 0) -> None:
        self._model = model
        self._chunk = chunk
        self.start = start

    @property
    def length(self) -> int:
        return self.start + self._model.length

    def rollback(self, length: int) -> None:
        if length <= self.start:
            self._model.rollback(0)  # first, so that an interruption in between finds no row in the wrong place
            self.start = 0
        else:
            self._model.rollback(length - self.start)

    def lag(self, committed: Sequence[int]) -> int:
        """Tokens that the cache lacks."""
        return len(committed) - self.length

    def run_ahead(self, committed: Sequence[int], proposal: Proposal, k: int) -> bool:
        return False  # nothing here works while the target does: see AheadDrafter

    def observe(self, drafted: int, matched: int) -> None: ...

    def propose(self, committed: Sequence[int], k: int, window: int | None = None) -> Proposal:
        """See `Drafter`. window: if the cache lacks more tokens than this, it begins anew with the last ones."""
        if window is not None and self.lag(committed) > window:
            self._model.rollback(0)
            self.start = len(committed) - window
        # The first draft is read off the last real token's row, so at least that token is fed.
        self.rollback(min(self.length, len(committed) - 1))
        while len(committed) - self.length > self._chunk:
            self._feed(committed[self.length : self.length + self._chunk], 1)
        ids, probabilities = self._feed(committed[self.length :], k)
        return Proposal(tuple(ids.tolist()), tuple(probabilities.tolist()), "pard")

    def _feed(self, ids: Sequence[int], k: int) -> tuple[Any, Any]:
        real = self._model.length + len(ids)
        drafts = self._model.step(ids, k)
        self._model.rollback(real)  # the k - 1 masks leave the cache: it holds real tokens only
        return drafts
