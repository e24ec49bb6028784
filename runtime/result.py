"""What a generation gives back."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from .decoding.loop import FinishReason, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a generation before its first round."""

    prompt_tokens: int
    # Plain decoding and any draft give the same tokens under this setting: every step has one of `widths`.
    exact: bool
    # Numbers of tokens in a target's step. If exact, their rows were found to be bitwise equal on this machine; (1,)
    # alone: the provider computes no wider steps correctly.
    widths: tuple[int, ...]
    provider: str  # where the target runs
    draft_provider: str | None  # where the draft runs; None without one
    provider_reason: str  # why they run there
    kernel: str  # of the quantized matmuls: an instruction set of this package's own kernels, or "onnxruntime"
    seed: int | None = None  # of the tokens that were drawn; None where none are
    cached_tokens: int = 0  # of the prompt's: those that the target had computed before (see `Chat`)


@dataclass(frozen=True, slots=True)
class Seconds:
    """Where the time of a generation went."""

    prefill: float  # the prompt through the target, and the draft's first call, which reads the prompt too
    draft: float  # the draft's later calls
    verify: float  # the target's later calls, acceptance included
    other: float  # the rest of `total`
    total: float  # from the prompt as text or ids; without the time that a stream's consumer takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats(Facts):
    """Counts and times of a generation, beside the `Facts`. The prompt's step, which gives the first token, is no
    round."""

    new_tokens: int
    rounds: int
    accepted: tuple[int, ...]  # by round: tokens that the target committed, its own and EOS included (at most K + 1)
    proposed: tuple[int, ...]  # by round: drafts that were verified
    matched: tuple[int, ...]  # by round: drafts that were accepted
    accepted_per_position: tuple[float, ...]  # of the drafts at each position, the accepted share
    mean_accepted: float  # mean of `accepted`
    seconds: Seconds
    # Of the tokens after the first, over the time after the first: the draft's prefill counts against it.
    tokens_per_second: float
    time_to_first_token: float  # seconds
    sources: tuple[str, ...]  # by round, who drafted: "pard", "lookup" or "none"
    ahead: int  # rounds during whose verification the next one was drafted, on a device of the draft's own
    ahead_used: int  # of those, the rounds whose guess of the target's next token came true


@dataclass(frozen=True, slots=True)
class Result:
    """A whole generation."""

    text: str  # what follows the prompt, cut in front of a stop string
    tokens: tuple[int, ...]  # without EOS, and up to the one that completed a stop string
    # "stop" for EOS and stop strings, "length" for limits, "cancelled" and "timeout" where it was ended from outside.
    finish_reason: FinishReason
    stats: Stats


@dataclass(frozen=True, slots=True)
class Chunk:
    """One round of a stream."""

    text: str
    tokens: tuple[int, ...]
    drafted: tuple[bool, ...]  # by token: whether the draft had proposed it
    pieces: tuple[str, ...]  # the text that each token made certain; `text` when joined


@dataclass(slots=True)
class Tally:
    """Counts of a generation while it runs."""

    accepted: list[int] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)
    matched: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    ahead: int = 0
    ahead_used: int = 0
    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    prompt_seen: bool = False

    def add(self, step: Step) -> None:
        if not step.accepted:  # a halt
            return
        if not self.prompt_seen:
            self.prompt_seen = True
            self.prefill = step.verify_seconds
            return
        if self.accepted:
            self.draft += step.draft_seconds
        else:
            self.prefill += step.draft_seconds
        self.verify += step.verify_seconds
        self.accepted.append(step.accepted)
        self.proposed.append(step.drafted)
        self.matched.append(step.matched)
        self.sources.append(step.source)
        self.ahead += step.ran_ahead
        self.ahead_used += step.ahead

    def per_position(self) -> tuple[float, ...]:
        rounds = list(zip(self.proposed, self.matched, strict=True))
        return tuple(
            sum(matched > i for _, matched in rounds) / sum(proposed > i for proposed, _ in rounds)
            for i in range(max(self.proposed, default=0))
        )

    def stats(self, facts: Facts, new: int, total: float, first: float) -> Stats:
        """new: tokens; total, first: seconds to the end, and to the first token."""
        rounds = len(self.accepted)
        later = total - first
        return Stats(
            **{field.name: getattr(facts, field.name) for field in fields(facts)},
            new_tokens=new,
            rounds=rounds,
            accepted=tuple(self.accepted),
            proposed=tuple(self.proposed),
            matched=tuple(self.matched),
            accepted_per_position=self.per_position(),
            mean_accepted=sum(self.accepted) / rounds if rounds else 0.0,
            seconds=Seconds(
                self.prefill, self.draft, self.verify, total - self.prefill - self.draft - self.verify, total
            ),
            tokens_per_second=(new - 1) / later if new > 1 and later > 0 else 0.0,
            time_to_first_token=first,
            sources=tuple(self.sources),
            ahead=self.ahead,
            ahead_used=self.ahead_used,
        )
