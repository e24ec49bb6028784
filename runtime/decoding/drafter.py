"""Who proposes tokens: a parallel draft model, or nobody."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from pard_onnx.runtime.sessions.session import do_nothing
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
    # The target's hidden states of consecutive tokens, [width] each; None for a token that they are not known of
    features: list[Any] = field(default_factory=list)
    first: int = 0  # the token that `features` begin with; those of the tokens before it are not kept any more

    @property
    def seen(self) -> int:
        """The tokens before this one were seen, with their features or without."""
        return self.first + len(self.features)

    @property
    def bytes(self) -> int:
        """The memory of the features."""
        return sum(row.nbytes for row in self.features if row is not None)

    def feature(self, token: int) -> Any:
        """The features of the token at this position; None where they are not known, or not kept any more."""
        return self.features[token - self.first] if self.first <= token < self.seen else None

    def add(self, features: Iterable[Any]) -> None:
        """The features of the next tokens, in rows of their own memory."""
        self.features += features

    def drop_before(self, first: int) -> None:
        """Free the features of the tokens before this one, which was seen."""
        if first > self.first:
            del self.features[: first - self.first]
            self.first = first

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        del self.features[max(0, length - self.first) :]
        self.first = min(self.first, length)

    def copy(self) -> DraftMemory:
        return DraftMemory(self.start, list(self.features), self.first)


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

        None for a drafter that reads none. For any other the target computes once more what the drafter lacks: a
        drafter never misses a token, unless it does without (`begin`).
        """
        return None

    @abstractmethod
    def propose(self, committed: Sequence[int], k: int) -> Proposal:
        """Up to k >= 1 tokens to follow `committed`, the whole conversation so far."""

    def begin(self, computed: int) -> None:  # noqa: B027
        """A generation begins, in which the target has the rows of the first `computed` tokens already.

        A drafter that reads features and lacks those of some of these tokens decides here whether the target shall
        compute them again (`seen` is then the first of them) or whether it does without them (`seen` is `computed`).
        """

    def keep_up(self, committed: Sequence[int]) -> None:  # noqa: B027
        """A chunk of a long prompt has been computed, after which `saw` was called: a drafter that cannot keep what it
        was told of the whole prompt may read the chunk now."""

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

    def step(self, ids: Sequence[int], draft_length: int, features: Any = None) -> tuple[Any, Any]:
        """Append ids and masks; features: what is added to each id, [len(ids), columns], None for nothing."""
        ...

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
        between_chunks: Callable[[], None] = do_nothing,
        source: str = "pard",
    ) -> None:
        """memory: of the sequence that the model's cache belongs to. shared: where the target has other ids. source:
        as `Proposal.source`.

        between_chunks: is called between two chunks of a prompt, when other sequences may use the models.
        """
        self._model = model
        self._chunk = chunk
        self._memory = memory or DraftMemory()
        self._shared = shared
        self._between_chunks = between_chunks
        self._source = source

    @property
    def start(self) -> int:
        return self._memory.start

    @property
    def length(self) -> int:
        return self._memory.start + self._model.length

    def rollback(self, length: int) -> None:
        self._rollback_model(length)

    def _rollback_model(self, length: int) -> None:
        """Forget the rows of the draft's KV cache from token `length` on."""
        if length <= self.start:
            self._model.rollback(0)  # first, so that an interruption in between finds no row in the wrong place
            self._memory.start = 0
        else:
            self._model.rollback(min(length - self.start, self._model.length))

    def lag(self, committed: Sequence[int]) -> int:
        """Tokens that the cache lacks."""
        return len(committed) - self.length

    def propose(self, committed: Sequence[int], k: int, window: int | None = None, whole: bool = False) -> Proposal:
        """See `Drafter`. window: if the cache lacks more tokens than this, it begins anew with the last ones. whole: if
        it began with a window, it begins anew with the first token."""
        if whole and self.start:
            self._rollback_model(0)
        if window is not None and self.lag(committed) > window:
            self._model.rollback(0)
            self._memory.start = len(committed) - window
        # The first draft is read off the last real token's row, so at least that token is fed.
        self._rollback_model(min(self.length, len(committed) - 1))
        self._read(committed, len(committed) - self._chunk)
        ids, probabilities = self._feed(committed[self.length :], k)
        proposal = Proposal(tuple(ids.tolist()), tuple(probabilities.tolist()), self._source)
        return proposal.first(self._shared.proposable(proposal.ids)) if self._shared else proposal

    def _read(self, committed: Sequence[int], end: int) -> None:
        """Feed whole chunks of tokens until the cache reaches `end`, if it does not yet."""
        while self.length < end:
            self._feed(committed[self.length : self.length + self._chunk], 1)
            self._between_chunks()

    def _feed(self, ids: Sequence[int], k: int) -> tuple[Any, Any]:
        real = self._model.length + len(ids)
        if self._shared:
            ids = self._shared.for_draft(ids)
        drafts = self._step(ids, k)
        self._model.rollback(real)  # the k - 1 masks leave the cache: it holds real tokens only
        return drafts

    def _step(self, ids: Sequence[int], k: int) -> tuple[Any, Any]:
        """The draft model's step on these tokens, the next ones after its cache."""
        return self._model.step(ids, k)
