"""What a generation gives back."""

from __future__ import annotations

from dataclasses import dataclass, field

from pard_onnx.runtime.decoding.loop import FinishReason, Step


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a generation before its first round; start: perf_counter() when the request came;
    cached_tokens: of the prompt, whose rows a conversation's cache holds already."""

    prompt_tokens: int
    start: float
    exact: bool
    widths: tuple[int, ...]
    provider: str
    draft_provider: str | None
    provider_reason: str
    kernel: str
    seed: int | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Seconds:
    """prefill: the prompt through the target, and the draft's first call, which carries it too; draft and
    verify: the later rounds' calls, acceptance in verify; other: the rest of total, which begins with the
    prompt as text or ids and leaves out the time that a stream's consumer takes."""

    prefill: float
    draft: float
    verify: float
    other: float
    total: float


@dataclass(frozen=True, slots=True)
class Stats:
    """accepted: tokens that the target committed in each round, its own included (K + 1 at most); EOS counts,
    and so does what a stop string cut off. The prompt's step, which gives the first token, is no round.

    proposed: drafts of each round; matched: of those, the accepted ones; accepted_per_position: of the drafts
    at each position, the accepted share.
    tokens_per_second: of the tokens after the first, over the time after the first (the draft's prefill
    counts against it). sources: who drafted, by round: "pard", "lookup" or "none". ahead: rounds during whose
    verification the next one was drafted, on a device of the draft's own; ahead_used: of those, the ones whose guess
    came true. exact: plain decoding and any draft give the same tokens under this setting: every step had one of
    `widths`, whose rows were found to be bitwise equal on this machine; (1,) alone: the provider computes no others
    right. provider, draft_provider, provider_reason: where the models run, and why there. kernel: of the quantized
    matmuls, an instruction set of this package's own or "onnxruntime". seed: of the tokens drawn, None where none are.
    cached_tokens: of the prompt's, those that the target did not read anew (see `Chat`).
    """

    prompt_tokens: int
    new_tokens: int
    rounds: int
    accepted: tuple[int, ...]
    proposed: tuple[int, ...]
    matched: tuple[int, ...]
    accepted_per_position: tuple[float, ...]
    mean_accepted: float
    seconds: Seconds
    tokens_per_second: float
    time_to_first_token: float
    sources: tuple[str, ...]
    ahead: int
    ahead_used: int
    exact: bool
    widths: tuple[int, ...]
    provider: str
    draft_provider: str | None
    provider_reason: str
    kernel: str
    seed: int | None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """text: what follows the prompt, cut in front of a stop string; tokens: without EOS, and up to the one that
    completed a stop string; finish_reason: "stop" for EOS and stop strings, "length" for limits, "cancelled" and
    "timeout" where it was ended from outside."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats


@dataclass(frozen=True, slots=True)
class Chunk:
    """One round of a stream. pieces: the text that each token made certain, `text` when joined; drafted: which
    tokens the draft had proposed."""

    text: str
    tokens: tuple[int, ...]
    drafted: tuple[bool, ...]
    pieces: tuple[str, ...]


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
            prompt_tokens=facts.prompt_tokens,
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
            exact=facts.exact,
            widths=facts.widths,
            provider=facts.provider,
            draft_provider=facts.draft_provider,
            provider_reason=facts.provider_reason,
            kernel=facts.kernel,
            seed=facts.seed,
            cached_tokens=facts.cached_tokens,
        )
