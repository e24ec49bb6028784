"""Draft, verify, accept: one generator for plain and speculative decoding.

`committed` is the conversation's tokens, prompt included; the loop appends to it. However the loop ends, each
cache holds a prefix of `committed`; the target's lacks at least the last token, whose row is not computed yet.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, Protocol

from pard_onnx.models.errors import BadInput, TooLong

from .accept import accept
from .drafter import PREFILL_CHUNK, Drafter
from .limits import require_whole

DRAFT_LIMIT = 32  # with it masks and padding fit the margin of the KV buffers (KV_MARGIN)
FinishReason = Literal["stop", "length"]


class TargetModel(Protocol):
    """What the loop asks of a target (`TargetSession`)."""

    @property
    def length(self) -> int: ...

    def step(self, ids: Sequence[int], keep: int) -> Any:
        """Append ids; logits of the last `keep`, numpy [keep, vocabulary]."""
        ...

    def rollback(self, length: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """draft_length: 0 is plain decoding; capacity: tokens, prompt included; even: only even widths and row
    counts, for bitwise equal rows."""

    max_new_tokens: int
    draft_length: int
    capacity: int
    eos_ids: frozenset[int] = frozenset()
    even: bool = False
    chunk: int = PREFILL_CHUNK

    def __post_init__(self) -> None:
        require_whole("max_new_tokens", self.max_new_tokens, 1)
        require_whole("draft_length", self.draft_length, 0, DRAFT_LIMIT)

    def room(self, prompt: int) -> int:
        """The most tokens that may follow a prompt of so many; TooLong if none, BadInput if it is empty."""
        if not prompt:
            raise BadInput("the prompt is empty")
        if prompt >= self.capacity:
            raise TooLong(
                f"the prompt has {prompt} tokens, but the capacity is {self.capacity} with at least one of them new; "
                "shorten it or export with a larger --context-length"
            )
        return min(self.max_new_tokens, self.capacity - prompt)


@dataclass(frozen=True, slots=True)
class Step:
    """One round; the first (drafted 0) is the prompt's.

    tokens: new ones, none past EOS and EOS itself left out; drafted: proposed; matched: of those, accepted
    up to EOS; accepted: committed by the target, bonus and EOS included; seconds of this round.
    """

    tokens: tuple[int, ...]
    drafted: int
    matched: int
    accepted: int
    finish_reason: FinishReason | None
    draft_seconds: float
    verify_seconds: float


def decode(
    target: TargetModel, drafter: Drafter, committed: list[int], settings: Settings
) -> Generator[Step, None, None]:
    """Greedy decoding. Steps until one has a finish_reason; no token beyond max_new_tokens or capacity."""
    remaining = settings.room(len(committed))
    try:
        start = perf_counter()
        first = prefill(target, committed, settings)
        step = commit(committed, (), [first], remaining, settings.eos_ids, (0.0, perf_counter() - start))
        yield step
        while step.finish_reason is None:
            remaining -= len(step.tokens)
            start = perf_counter()
            k = min(settings.draft_length, remaining - 1)  # the target always adds one of its own
            drafts = drafter.propose(committed, k).ids[:k] if k else ()
            drafted = perf_counter()
            chosen = choose(target, [committed[-1], *drafts], len(drafts) + 1, settings.even)
            seconds = (drafted - start, perf_counter() - drafted)
            step = commit(committed, drafts, chosen, remaining, settings.eos_ids, seconds)
            target.rollback(len_cached(target.length, committed))
            yield step
    finally:
        target.rollback(len_cached(target.length, committed))
        drafter.rollback(min(drafter.length, len(committed)))


def len_cached(length: int, committed: Sequence[int]) -> int:
    """The rows of a target's cache that are certain: not those of rejected drafts, nor the newest token's."""
    return min(length, len(committed) - 1)


def prefill(target: TargetModel, committed: Sequence[int], settings: Settings) -> int:
    """Bring the target's cache up to `committed`, a chunk at a time; the token it chooses next."""
    target.rollback(len_cached(target.length, committed))  # one row must be computed to choose from
    while len(committed) - target.length > settings.chunk:
        target.step(committed[target.length : target.length + settings.chunk], 1)
    return choose(target, committed[target.length :], 1, settings.even)[0]


def choose(target: TargetModel, ids: Sequence[int], keep: int, even: bool) -> list[int]:
    """The target's greedy ids after each of the last `keep` of ids, which its cache then holds."""
    real = target.length + len(ids)
    padding = len(ids) % 2 if even else 0
    rows = keep + padding
    rows += rows % 2 if even else 0  # the LM head's matmul has a width, too
    logits = target.step([*ids, ids[-1]] if padding else ids, rows)
    target.rollback(real)  # the padding token's row is not kept
    last = rows - padding
    chosen: list[int] = logits[last - keep : last].argmax(axis=-1).tolist()
    return chosen


def commit(
    committed: list[int],
    drafts: Sequence[int],
    chosen: Sequence[int],
    remaining: int,
    eos_ids: frozenset[int],
    seconds: tuple[float, float],
) -> Step:
    """Append what the target accepts to `committed`, up to EOS."""
    accepted = accept(drafts, chosen)
    end = next((i for i, token in enumerate(accepted.tokens) if token in eos_ids), None)
    tokens = accepted.tokens[:end]
    committed.extend(tokens)
    reason: FinishReason | None = "length" if len(tokens) == remaining else None
    return Step(
        tokens=tokens,
        drafted=len(drafts),
        matched=accepted.matched if end is None else min(accepted.matched, end + 1),
        accepted=len(tokens) + (end is not None),
        finish_reason="stop" if end is not None else reason,
        draft_seconds=seconds[0],
        verify_seconds=seconds[1],
    )
