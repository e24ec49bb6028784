"""Who proposes tokens: a parallel draft model, or nobody."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from pard_onnx.runtime.tuning.steps import PREFILL_CHUNK

from .shared_ids import SharedIds


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that may follow the conversation."""

    ids: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()  # the drafter's own, of each token given those before it
    source: str = "none"  # the drafter's name in `Stats.sources`
    ahead: bool = False  # whether it was made while the target verified the tokens before

    def first(self, k: int) -> Proposal:
        """At most the first k tokens."""
        if len(self.ids) <= k:
            return self
        return replace(self, ids=self.ids[:k], probabilities=self.probabilities[:k])


NOTHING = Proposal()


@dataclass(slots=True)
class DraftMemory:
    """What a drafter keeps of one sequence beside its KV cache; the sequence owns, truncates and copies it."""

    start: int = 0  # the first token whose row the draft's KV cache holds
    features: list[Any] = field(default_factory=list)  # of tokens 0, 1, ..: the target's hidden states, [width] each

    def truncate(self, length: int) -> None:
        """Forget the features of tokens from `length` on."""
        del self.features[length:]

    def copy(self) -> DraftMemory:
        return DraftMemory(self.start, list(self.features))


class Drafter(ABC):
    """What the decoding loop asks of a drafter. A subclass needs no more than `propose`.

    In a round the loop calls `propose` and `run_ahead`, runs the target, then calls `saw` and `observe`. When a
    generation ends, however it ends, it calls `rollback`. `pard_onnx.testing` has scripted targets to try a drafter on.
    """

    @property
    def length(self) -> int:
        """How far its KV cache reaches: all rows in it are of tokens before this one."""
        return 0

    @property
    def seen(self) -> int | None:
        """For a drafter that reads the target's hidden states: it has those of the first so many tokens.

        None for a drafter that reads none. For any other the target computes what the drafter lacks once more, and
        all rows of its steps: a drafter never misses a token.
        """
        return None

    @abstractmethod
    def propose(self, committed: Sequence[int], k: int) -> Proposal:
        """Up to k >= 1 tokens to follow `committed`, the whole conversation so far."""

    def run_ahead(self, committed: Sequence[int], proposal: Proposal, k: int) -> bool:
        """The target verifies `proposal` from now on; True if the next round is drafted meanwhile, k tokens at most."""
        return False

    def refuse(self, count: int) -> None:  # noqa: B027
        """The last proposal's token at index `count` is known to be wrong; the tokens before it are verified.

        Called after `propose`, where a grammar forbids a token; `observe` then counts the verified ones.
        """

    def saw(self, ids: Sequence[int], features: Any) -> None:  # noqa: B027
        """The target has computed these tokens, the next ones of the conversation after those of the last call.

        Only tokens that stay: the prompt's, chunk by chunk, and accepted ones. Never called where there are none.
        ids: the tokens; features: their hidden states, [len(ids), width] in a buffer that the next step overwrites, or
        None where the target's graph does not give them or `seen` is None.
        """

    def observe(self, drafted: int, matched: int) -> None:  # noqa: B027
        """What became of the last proposal: how many of its tokens were verified, and how many of them matched."""

    def rollback(self, length: int) -> None:  # noqa: B027
        """Forget what is known of tokens from `length` on, if anything is: rows of its KV cache, and features."""


class DraftModel(Protocol):
    """What `PardDrafter` asks of a draft model on one sequence."""

    @property
    def length(self) -> int: ...

    def step(self, ids: Sequence[int], draft_length: int) -> tuple[Any, Any]: ...

    def rollback(self, length: int) -> None: ...


class NoDraft(Drafter):
    """Plain decoding: nothing is ever proposed."""

    def propose(self, committed: Sequence[int], k: int) -> Proposal:
        return NOTHING


class PardDrafter(Drafter):
    """One forward pass a round: the real tokens that its cache lacks, then K-1 masks (reference: AMD-AGI/PARD).

    The cache holds committed[start:length]; start is 0 unless a proposal was asked for after a window of context.
    """

    def __init__(
        self,
        model: DraftModel,
        chunk: int = PREFILL_CHUNK,
        memory: DraftMemory | None = None,
        shared: SharedIds | None = None,
    ) -> None:
        """memory: of the sequence that the model's cache belongs to. shared: where the target has other ids."""
        self._model = model
        self._chunk = chunk
        self._memory = memory or DraftMemory()
        self._shared = shared

    @property
    def start(self) -> int:
        return self._memory.start

    @property
    def length(self) -> int:
        return self._memory.start + self._model.length

    def rollback(self, length: int) -> None:
        if length <= self.start:
            self._model.rollback(0)  # first, so that an interruption in between finds no row in the wrong place
            self._memory.start = 0
        else:
            self._model.rollback(min(length - self.start, self._model.length))

    def lag(self, committed: Sequence[int]) -> int:
        """Tokens that the cache lacks."""
        return len(committed) - self.length

    def propose(self, committed: Sequence[int], k: int, window: int | None = None) -> Proposal:
        """See `Drafter`. window: if the cache lacks more tokens than this, it begins anew with the last ones."""
        if window is not None and self.lag(committed) > window:
            self._model.rollback(0)
            self._memory.start = len(committed) - window
        # The first draft is read off the last real token's row, so at least that token is fed.
        self.rollback(min(self.length, len(committed) - 1))
        while len(committed) - self.length > self._chunk:
            self._feed(committed[self.length : self.length + self._chunk], 1)
        ids, probabilities = self._feed(committed[self.length :], k)
        proposal = Proposal(tuple(ids.tolist()), tuple(probabilities.tolist()), "pard")
        return proposal.first(self._shared.proposable(proposal.ids)) if self._shared else proposal

    def _feed(self, ids: Sequence[int], k: int) -> tuple[Any, Any]:
        real = self._model.length + len(ids)
        if self._shared:
            ids = self._shared.for_draft(ids)
        drafts = self._model.step(ids, k)
        self._model.rollback(real)  # the k - 1 masks leave the cache: it holds real tokens only
        return drafts
