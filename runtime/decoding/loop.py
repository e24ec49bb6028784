"""Draft, verify, accept: one generator for plain and speculative decoding.

`committed` is the conversation's tokens, prompt included; the loop appends to it. However the loop ends, each
cache holds a prefix of `committed`; the target's lacks at least the last token, whose row is not computed yet.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Literal, Protocol

from pard_onnx.models.checks import DRAFT_LIMIT, require_whole
from pard_onnx.models.errors import BadInput, TooLong
from pard_onnx.runtime.sampling.logprobs import TokenLogprob
from pard_onnx.runtime.sampling.sampler import Chooser, Greedy
from pard_onnx.runtime.sessions.session import Features, Rows, do_nothing
from pard_onnx.runtime.tuning.steps import ANY, PREFILL_CHUNK, Widths

from .drafter import NOTHING, Drafter, Proposal

FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "timeout"]
PromptLogprobs = tuple[TokenLogprob | None, ...]  # of each token given those before it; None for the first


class TargetModel(Protocol):
    """What the loop asks of the target on one sequence."""

    @property
    def length(self) -> int: ...

    def step(self, ids: Sequence[int], keep: int) -> Rows:
        """Append ids; the logits of the last `keep` of them, and the features of all where the drafter reads them."""
        ...

    def rollback(self, length: int) -> None: ...


class Halted(Exception):
    """Raised between two steps by whoever watches the models: the generation ends with what it has."""

    def __init__(self, reason: FinishReason) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Settings:
    """What a generation is bounded by, and the form of the target's steps."""

    max_new_tokens: int
    draft_length: int  # the most drafts a round; 0 is plain decoding
    capacity: int  # tokens, prompt included
    eos_ids: frozenset[int] = frozenset()
    widths: Widths = ANY  # of the target's steps, and numbers of rows of its LM head
    chunk: int = PREFILL_CHUNK  # tokens a step in prefill
    longer: str = "export with a larger --context-length"  # how to get a larger capacity

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
                f"shorten it, or {self.longer}"
            )
        return min(self.max_new_tokens, self.capacity - prompt)


@dataclass(frozen=True, slots=True)
class Step:
    """One round; the first (drafted 0) is the prompt's. A halt gives a last one in which nothing was accepted."""

    tokens: tuple[int, ...]  # new ones; none past EOS, and EOS itself left out
    drafted: int  # tokens that were proposed and verified
    matched: int  # of those, accepted up to EOS
    accepted: int  # tokens that the target committed, its own and EOS included
    finish_reason: FinishReason | None
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    source: str = NOTHING.source  # who drafted
    ahead: bool = False  # drafted during the round before
    ran_ahead: bool = False  # the next round was drafted during this one
    end: int | None = None  # the EOS token that ended the generation; None where nothing could follow the text
    logprobs: tuple[TokenLogprob, ...] = ()  # of `tokens`, where they were asked for
    prompt_logprobs: PromptLogprobs | None = None  # in the prompt's step, where they were asked for


def decode(
    target: TargetModel,
    drafter: Drafter,
    committed: list[int],
    settings: Settings,
    chooser: Chooser | None = None,
    is_complete: Callable[[Sequence[int]], bool] | None = None,
    between_chunks: Callable[[], None] = do_nothing,
) -> Generator[Step, None, None]:
    """Steps until one has a finish_reason; no token beyond max_new_tokens or capacity. Greedy without a chooser.

    is_complete: whether nothing may follow the conversation so far; the generation then ends without an EOS token.
    between_chunks: is called between two chunks of the prompt, when other sequences may use the models.
    """
    remaining = settings.room(len(committed))
    chooser = chooser or Greedy()
    try:
        start = perf_counter()
        prefill(target, drafter, committed, settings, between_chunks)
        found = verify(target, drafter, committed, NOTHING, settings, chooser)
        step = commit(committed, NOTHING, found.tokens, remaining, settings.eos_ids, (0.0, perf_counter() - start))
        step = ended(step, committed, is_complete)
        settle(target, drafter, committed, found)
        yield step
        while step.finish_reason is None:
            remaining -= len(step.tokens)
            start = perf_counter()
            k = min(settings.draft_length, remaining - 1)  # the target always adds one of its own
            proposal = drafter.propose(committed, k).first(k) if k else NOTHING
            after = min(settings.draft_length, remaining - len(proposal.ids) - 2)  # of use if all of it is accepted
            ran_ahead = drafter.run_ahead(committed, proposal, after)
            drafted = perf_counter()
            found = verify(target, drafter, committed, proposal, settings, chooser)
            seconds = (drafted - start, perf_counter() - drafted)
            step = commit(committed, proposal, found.tokens, remaining, settings.eos_ids, seconds)
            step = ended(replace(step, ran_ahead=ran_ahead), committed, is_complete)
            settle(target, drafter, committed, found)
            drafter.observe(len(proposal.ids), len(found.tokens) - 1)
            yield step
    except Halted as halt:
        yield Step((), 0, 0, 0, halt.reason)
    finally:
        target.rollback(certain_rows(target, drafter, committed))
        drafter.rollback(len(committed))


def ended(step: Step, committed: Sequence[int], is_complete: Callable[[Sequence[int]], bool] | None) -> Step:
    """The step, as the last one where the conversation is complete.

    The EOS token of a complete text is left out: whether the round had a row to choose it from depends on the drafts.
    """
    if is_complete and is_complete(committed):
        return replace(step, finish_reason="stop", end=None)
    return step


def certain_rows(target: TargetModel, drafter: Drafter, committed: Sequence[int]) -> int:
    """The rows of the target's cache that stay: not those of rejected drafts, nor the newest token's, nor those that a
    drafter that reads the target's features lacks."""
    return min(target.length, len(committed) - 1, target.length if drafter.seen is None else drafter.seen)


def go_on(target: TargetModel, drafter: Drafter, computed: int) -> None:
    """Begin where the target's cache has rows already, of which `computed` may stay: fewer do where the drafter wants
    the features of their tokens. `saw` goes on with the token at the cache's end."""
    drafter.begin(computed)
    target.rollback(computed if drafter.seen is None else min(computed, drafter.seen))
    if drafter.seen is not None and drafter.seen > target.length:
        drafter.rollback(target.length)  # `saw` repeats those tokens


def prefill(
    target: TargetModel,
    drafter: Drafter,
    committed: Sequence[int],
    settings: Settings,
    between_chunks: Callable[[], None] = do_nothing,
) -> None:
    """Bring the target's cache up to `committed` but for its last tokens, at most a chunk of them."""
    go_on(target, drafter, min(target.length, len(committed) - 1))  # one row must be computed to choose from
    while len(committed) - target.length > settings.chunk:
        first = target.length
        ids = committed[first : first + settings.chunk]
        rows = target.step(ids, 1)
        drafter.saw(ids, None if drafter.seen is None else features_of(rows))
        drafter.keep_up(committed)
        between_chunks()


@dataclass(frozen=True, slots=True)
class Verified:
    """What a step of the target found."""

    tokens: list[int]  # the drafts that match the target's own tokens, and one more of its own
    first: int  # the position of the first token that was fed
    features: Features | None  # of the tokens that were fed, [fed, width]; None where the drafter reads none


def verify(
    target: TargetModel,
    drafter: Drafter,
    committed: Sequence[int],
    proposal: Proposal,
    settings: Settings,
    chooser: Chooser,
) -> Verified:
    """Run the target over what it lacks of `committed` and over the drafts; its cache then holds the drafts, right or
    wrong."""
    first = target.length
    ids = [*committed[first:], *proposal.ids]
    needed = len(proposal.ids) + 1
    rows = padded_step(target, ids, needed, settings.widths)
    features = None if drafter.seen is None else features_of(rows)
    return Verified(chooser.choose(rows.logits, committed, proposal.ids), first, features)


def padded_step(target: TargetModel, ids: Sequence[int], keep: int, widths: Widths) -> Rows:
    """Append ids in a step of one of these widths; the rows of the last `keep` of them."""
    length, padding = target.length, widths.width_for(len(ids)) - len(ids)
    kept = widths.width_for(keep + padding)  # the LM head's matmul has a width, too
    rows = target.step([*ids, *[ids[-1]] * padding], kept)
    target.rollback(length + len(ids))  # the padding tokens' rows are not kept
    last = kept - padding
    features = None if rows.features is None else rows.features[: len(ids)]
    return Rows(rows.logits[last - keep : last], features)


def features_of(rows: Rows) -> Features:
    """ValueError where the target's graph does not give them; whoever pairs it with a drafter checks that."""
    if rows.features is None:
        raise ValueError("the drafter reads the target's hidden states, which this target does not give")
    return rows.features


def settle(target: TargetModel, drafter: Drafter, committed: Sequence[int], found: Verified) -> None:
    """Take rejected drafts out of the target's cache, and tell the drafter of the tokens that stay in it."""
    target.rollback(min(target.length, len(committed) - 1))
    ids = committed[found.first : target.length]
    if ids:
        drafter.saw(ids, None if found.features is None else found.features[: len(ids)])


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
        end=None if end is None else chosen[end],
    )
