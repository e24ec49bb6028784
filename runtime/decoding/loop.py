"""Draft, verify, accept: one generator for plain and speculative decoding.

`committed` is the conversation's tokens, prompt included; the loop appends to it. However the loop ends, each
cache holds a prefix of `committed`; the target's lacks at least the last token, whose row is not computed yet.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Literal, Protocol

from pard_onnx.models.checks import require_whole
from pard_onnx.models.errors import BadInput, TooLong
from pard_onnx.runtime.sampling.sampler import Chooser, Greedy
from pard_onnx.runtime.tuning.widths import ANY, Widths

from .drafter import NOTHING, PREFILL_CHUNK, Drafter, Proposal

DRAFT_LIMIT = 32  # with it masks and padding fit the margin of the KV buffers (KV_MARGIN)
FinishReason = Literal["stop", "length", "cancelled", "timeout"]


class TargetModel(Protocol):
    """What the loop asks of a target (`TargetSession`)."""

    @property
    def length(self) -> int: ...

    def step(self, ids: Sequence[int], keep: int) -> Any:
        """Append ids; logits of the last `keep`, numpy [keep, vocabulary]."""
        ...

    def rollback(self, length: int) -> None: ...


class Halted(Exception):
    """Raised between two steps by whoever watches the models: the generation ends with what it has."""

    def __init__(self, reason: FinishReason) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Settings:
    """draft_length: the most drafts a round, 0 is plain decoding; capacity: tokens, prompt included; widths: of
    the target's steps, and numbers of rows of its LM head; chunk: tokens a step in prefill."""

    max_new_tokens: int
    draft_length: int
    capacity: int
    eos_ids: frozenset[int] = frozenset()
    widths: Widths = ANY
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
    """One round; the first (drafted 0) is the prompt's. A halt gives a last one in which nothing was accepted.

    tokens: new ones, none past EOS and EOS itself left out; drafted: proposed; matched: of those, accepted
    up to EOS; accepted: committed by the target, bonus and EOS included; seconds of this round; source: who drafted;
    ahead: drafted during the round before; ran_ahead: the next round was drafted during this one.
    """

    tokens: tuple[int, ...]
    drafted: int
    matched: int
    accepted: int
    finish_reason: FinishReason | None
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    source: str = NOTHING.source
    ahead: bool = False
    ran_ahead: bool = False


def decode(
    target: TargetModel,
    drafter: Drafter,
    committed: list[int],
    settings: Settings,
    chooser: Chooser | None = None,
) -> Generator[Step, None, None]:
    """Steps until one has a finish_reason; no token beyond max_new_tokens or capacity. Greedy without a chooser."""
    remaining = settings.room(len(committed))
    chooser = chooser or Greedy()
    try:
        start = perf_counter()
        prefill(target, committed, settings)
        chosen = choose(target, committed, NOTHING, settings, chooser)
        step = commit(committed, NOTHING, chosen, remaining, settings.eos_ids, (0.0, perf_counter() - start))
        yield step
        while step.finish_reason is None:
            remaining -= len(step.tokens)
            start = perf_counter()
            k = min(settings.draft_length, remaining - 1)  # the target always adds one of its own
            proposal = drafter.propose(committed, k).first(k) if k else NOTHING
            after = min(settings.draft_length, remaining - len(proposal.ids) - 2)  # of use if all of it is accepted
            ran_ahead = drafter.run_ahead(committed, proposal, after)
            drafted = perf_counter()
            chosen = choose(target, committed, proposal, settings, chooser)
            seconds = (drafted - start, perf_counter() - drafted)
            step = commit(committed, proposal, chosen, remaining, settings.eos_ids, seconds)
            step = replace(step, ran_ahead=ran_ahead)
            target.rollback(len_cached(target.length, committed))
            drafter.observe(len(proposal.ids), len(chosen) - 1)
            yield step
    except Halted as halt:
        yield Step((), 0, 0, 0, halt.reason)
    finally:
        target.rollback(len_cached(target.length, committed))
        drafter.rollback(min(drafter.length, len(committed)))


def len_cached(length: int, committed: Sequence[int]) -> int:
    """The rows of a target's cache that are certain: not those of rejected drafts, nor the newest token's."""
    return min(length, len(committed) - 1)


def prefill(target: TargetModel, committed: Sequence[int], settings: Settings) -> None:
    """Bring the target's cache up to `committed` but for its last tokens, at most a chunk of them."""
    target.rollback(len_cached(target.length, committed))  # one row must be computed to choose from
    while len(committed) - target.length > settings.chunk:
        target.step(committed[target.length : target.length + settings.chunk], 1)


def choose(
    target: TargetModel, committed: Sequence[int], proposal: Proposal, settings: Settings, chooser: Chooser
) -> list[int]:
    """The target's tokens after `committed`, the drafts that they match and one more; its cache then holds the
    drafts, right or wrong."""
    ids = [*committed[target.length :], *proposal.ids]
    keep = len(proposal.ids) + 1
    real = target.length + len(ids)
    padding = settings.widths.fit(len(ids)) - len(ids)
    rows = settings.widths.fit(keep + padding)  # the LM head's matmul has a width, too
    logits = target.step([*ids, *[ids[-1]] * padding], rows)
    target.rollback(real)  # the padding tokens' rows are not kept
    last = rows - padding
    return chooser.choose(logits[last - keep : last], committed, proposal.ids)


def commit(
    committed: list[int],
    proposal: Proposal,
    chosen: Sequence[int],
    remaining: int,
    eos_ids: frozenset[int],
    seconds: tuple[float, float],
) -> Step:
    """Append what the target chose to `committed`, up to EOS."""
    end = next((i for i, token in enumerate(chosen) if token in eos_ids), None)
    tokens = tuple(chosen[:end])
    committed.extend(tokens)
    matched = len(chosen) - 1
    reason: FinishReason | None = "length" if len(tokens) == remaining else None
    return Step(
        tokens=tokens,
        drafted=len(proposal.ids),
        matched=matched if end is None else min(matched, end + 1),
        accepted=len(tokens) + (end is not None),
        finish_reason="stop" if end is not None else reason,
        draft_seconds=seconds[0],
        verify_seconds=seconds[1],
        source=proposal.source,
        ahead=proposal.ahead,
    )
