"""The results of a generation: chunks, the text, and the stats."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from .decoding.loop import FinishReason, PromptLogprobs, Step
from .sampling.logprobs import TokenLogprob
from .text.tool_calls import ToolCall, ToolCallDelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a generation before its first round."""

    prompt_tokens: int
    # Whether plain decoding and decoding with any draft give the same tokens: every step then has one of `widths`.
    exact: bool
    # The numbers of tokens that a step of the target may have. If exact, their rows are bitwise equal on this machine.
    # (1,) alone means that the provider does not compute wider steps correctly.
    widths: tuple[int, ...]
    provider: str  # where the target runs
    draft_provider: str | None  # where the draft runs; None without one
    provider_reason: str  # why they run there
    kernel: str  # what computes quantized matmuls: the instruction set of this package's kernels, or "onnxruntime"
    seed: int | None = None  # of the random draws; None where tokens are not drawn
    cached_tokens: int = 0  # tokens of the prompt whose KV rows were there already (see `Chat` and `PrefixCache`)
    queued: float = 0.0  # seconds that the generation waited for its place before it began


@dataclass(frozen=True, slots=True)
class Seconds:
    """Where the time of a generation went."""

    prefill: float  # the target's and the draft's first call, which read the prompt
    draft: float  # the draft's later calls
    verify: float  # the target's later calls, with the acceptance of drafts
    other: float  # the rest of `total`
    total: float  # from the request to the last token, without the time that the reader of a stream takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats(Facts):
    """The `Facts` of a generation, with its counts and times. The step that reads the prompt and gives the first token
    does not count as a round."""

    new_tokens: int
    rounds: int
    accepted: tuple[int, ...]  # by round: tokens that were committed, with the target's own and EOS (at most K + 1)
    proposed: tuple[int, ...]  # by round: drafts that were verified
    matched: tuple[int, ...]  # by round: drafts that were accepted
    accepted_per_position: tuple[float, ...]  # by position: the share of its drafts that was accepted
    mean_accepted: float  # mean of `accepted`
    seconds: Seconds
    # The number of tokens after the first one, divided by the time after it, in which the draft reads the prompt, too.
    tokens_per_second: float
    time_to_first_token: float  # seconds
    # By round, what drafted: "pard", "pard2" (with the target's hidden states), "pard2-independent" (without them),
    # "p-eagle" and "p-eagle-independent", "lookup", "grammar" or "none"
    sources: tuple[str, ...]
    ahead: int  # rounds in which the next round was drafted while the target verified, on a device of the draft's own
    ahead_used: int  # of these rounds, those whose guess of the target's next token was right
    dropped_messages: int = 0  # of the conversation, which the model did not read: see the option `overflow`


@dataclass(frozen=True, slots=True)
class Result:
    """A whole generation."""

    text: str  # what follows the prompt, up to the first stop string, without reasoning and calls of tools
    # Without EOS and tokens of stop_token_ids, and up to the token that completes a stop string
    tokens: tuple[int, ...]
    # "stop" for EOS, stop_token_ids and stop strings, or "tool_calls" if the reply then has calls of tools; "length"
    # for max_new_tokens and the capacity, "cancelled" and "timeout".
    finish_reason: FinishReason
    stats: Stats
    logprobs: tuple[TokenLogprob, ...] | None = None  # of `tokens`; None if they were not asked for
    # Of each token of the prompt given those before it, None for the first. None if they were not asked for, and if
    # the generation was cancelled or timed out before all were there.
    prompt_logprobs: PromptLogprobs | None = None
    reasoning: str = ""  # what a chat's model thought before it answered
    tool_calls: tuple[ToolCall, ...] = ()
    stop_string: str | None = None  # which of the strings of `stop` ended the text; None: none of them


@dataclass(frozen=True, slots=True)
class Round:
    """What a round cost, and what became of its drafts."""

    proposed: int  # drafts that were verified
    matched: int  # of those, accepted
    accepted: int  # tokens that were committed, with the target's own and EOS
    draft_seconds: float
    verify_seconds: float
    source: str  # what drafted, as in `Stats.sources`


@dataclass(frozen=True, slots=True)
class Chunk:
    """One round of a stream."""

    text: str
    tokens: tuple[int, ...]
    drafted: tuple[bool, ...]  # by token: whether it was an accepted draft
    pieces: tuple[str, ...]  # by token: the text that it completes; joined, they are `text`
    logprobs: tuple[TokenLogprob, ...] | None = None  # of `tokens`; None if they were not asked for
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()  # parts of calls
    # None for the step that reads the prompt, which is no round. Equal chunks may have cost different times.
    round: Round | None = field(default=None, compare=False)
    facts: Facts | None = field(default=None, compare=False, repr=False)  # of the generation, in its first chunk alone


@dataclass(slots=True)
class Tally:
    """The counts and times of a running generation."""

    # By round, and sums over rounds, as in `Stats`:
    accepted: list[int] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)
    matched: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    ahead: int = 0
    ahead_used: int = 0
    # Seconds, as in `Seconds`:
    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    prompt_counted: bool = False  # whether the prompt's step was added

    def add(self, step: Step) -> None:
        """Count a round, or the prompt's step, which comes first."""
        if not step.accepted:  # the generation was halted
            return
        if not self.prompt_counted:
            self.prompt_counted = True
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

    def accepted_per_position(self) -> tuple[float, ...]:
        """By position: the share of its drafts that was accepted."""
        rounds = list(zip(self.proposed, self.matched, strict=True))
        return tuple(
            sum(matched > i for _, matched in rounds) / sum(proposed > i for proposed, _ in rounds)
            for i in range(max(self.proposed, default=0))
        )

    def stats(self, facts: Facts, new: int, total: float, first: float) -> Stats:
        """The stats of a generation that has ended.

        new: the number of new tokens; total, first: seconds to the end, and to the first token.
        """
        rounds = len(self.accepted)
        later = total - first
        return Stats(
            **{field.name: getattr(facts, field.name) for field in fields(facts)},
            new_tokens=new,
            rounds=rounds,
            accepted=tuple(self.accepted),
            proposed=tuple(self.proposed),
            matched=tuple(self.matched),
            accepted_per_position=self.accepted_per_position(),
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
