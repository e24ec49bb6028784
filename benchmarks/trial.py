"""One pair on one set of prompts: all ways of decoding, interleaved prompt by prompt, and their summary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from pard_onnx.models.checks import AUTO
from pard_onnx.models.errors import BadInput
from pard_onnx.models.json_files import text_lines
from pard_onnx.runtime.pair import Pair
from pard_onnx.runtime.result import Result

WARM_UP_TOKENS = 16
SEED = 0  # of drawn tokens, unless the request has one
Progress = Callable[[int, int], None]  # (done, total)
OWN = ""  # the drafter of a trial's only pair, and of plain decoding


@dataclass(frozen=True, slots=True)
class Way:
    """A way of decoding."""

    name: str
    draft_length: int | Literal["auto"]  # 0: plain decoding
    exact: bool  # whether the tokens are guaranteed to be those of exact plain decoding
    drafter: str = OWN  # which pair of a trial of several decodes so


PLAIN = Way("plain", 0, exact=False)  # the fastest way without drafts: steps of one token
REFERENCE = Way("plain, exact", 0, exact=True)  # PARD's tokens must equal these
TUNED = Way("auto", AUTO, exact=True)


def pard_way(draft_length: int, drafter: str = OWN) -> Way:
    return Way(f"{drafter or 'PARD'} K={draft_length}", draft_length, exact=True, drafter=drafter)


@dataclass(frozen=True, slots=True)
class Trial:
    """What a pair, or several of one target, wrote for a set of prompts."""

    prompts: tuple[str, ...]
    results: dict[Way, tuple[Result, ...]]  # in the order of the prompts


@dataclass(frozen=True, slots=True)
class DecodingRequest:
    """The options of `Pair.generate` that all ways of decoding share."""

    max_new_tokens: int
    chat: bool = False
    # Keyword arguments; none: greedy decoding. With the same seed plain decoding and PARD draw the same tokens, so
    # that sampled outputs can be compared too.
    sampling: Mapping[str, Any] = field(default_factory=dict)


def accepted_length(pair: Pair, prompts: Sequence[str], max_new_tokens: int, draft_length: int) -> float:
    """Mean accepted length over all rounds of all prompts, with the bonus token."""
    accepted: list[int] = []
    for prompt in prompts:
        result = pair.generate(prompt, max_new_tokens=max_new_tokens, draft_length=draft_length)
        accepted += result.stats.accepted
    return sum(accepted) / len(accepted)


def run_trial(
    pairs: Mapping[str, Pair],
    prompts: Sequence[str],
    ways: Sequence[Way],
    request: DecodingRequest,
    progress: Progress | None = None,
) -> Trial:
    """Decode with all ways, after a warm-up.

    pairs: by the drafters of the ways; all of one target. Every way decodes a prompt before any decodes the next one,
    so that a slow minute of the machine affects all ways.
    """
    short = replace(request, max_new_tokens=min(WARM_UP_TOKENS, request.max_new_tokens))
    for way in ways:
        decode(pairs[way.drafter], prompts[0], way, short)
    results: dict[Way, list[Result]] = {way: [] for way in ways}
    turns = list(interleaved(prompts, ways))
    for done, (prompt, way) in enumerate(turns, 1):
        results[way].append(decode(pairs[way.drafter], prompt, way, request))
        if progress:
            progress(done, len(turns))
    return Trial(tuple(prompts), {way: tuple(found) for way, found in results.items()})


def interleaved(prompts: Sequence[str], ways: Sequence[Way]) -> Iterator[tuple[str, Way]]:
    """All ways for each prompt, starting with the next way at each prompt, so that effects of the order average out."""
    for i, prompt in enumerate(prompts):
        first = i % len(ways)
        for way in (*ways[first:], *ways[:first]):
            yield prompt, way


def decode(pair: Pair, prompt: str, way: Way, request: DecodingRequest) -> Result:
    try:
        return pair.generate(
            prompt,
            max_new_tokens=request.max_new_tokens,
            draft_length=way.draft_length,
            exact=way.exact,
            chat=request.chat,
            **({"seed": SEED} | dict(request.sampling)),
        )
    except BadInput as error:
        raise BadInput(f"prompt {prompt[:40]!r}: {error}") from error


def disagreements(trial: Trial, way: Way) -> list[int]:
    """Indices of the prompts for which a way's tokens are not those of exact plain decoding."""
    pairs = zip(trial.results[REFERENCE], trial.results[way], strict=True)
    return [i for i, (expected, actual) in enumerate(pairs) if expected.tokens != actual.tokens]


SHIPPED = Path(__file__).parent / "prompts.jsonl"
FIELDS = ("data", "prompt")


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of a file."""

    name: str  # the file's, without its ending
    prompts: tuple[str, ...]


def read_prompts(path: Path, limit: int | None = None) -> PromptSet:
    """Read the first `limit` prompts of a file.

    Raises BadInput for a file that cannot be read or has no prompts, with the number of a broken line.
    """
    try:
        whole = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: the prompts cannot be read: {error}") from error
    prompts = tuple(text_lines(whole, str(path), FIELDS, empty=False))
    if not prompts:
        raise BadInput(f'{path}: has no prompts; one JSON object a line, the text under "data" or "prompt"')
    return PromptSet(path.stem, prompts[:limit])


@dataclass(frozen=True, slots=True)
class Shares:
    """Shares of the time after both prefills."""

    draft: float
    verify: float
    other: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One way of decoding in numbers, over all prompts of a trial."""

    name: str
    drafter: str
    draft_length: int | Literal["auto"]
    exact: bool
    new_tokens: int
    decode_tokens_per_second: float  # without prefills
    overall_tokens_per_second: float  # from the prompt's arrival to the last token, with both models' prefills
    time_to_first_token: float  # median, seconds
    speed_up: Ratio  # of the decode rate, against plain decoding with steps of one token
    overall_speed_up: Ratio  # of the overall rate, against the same
    mean_accepted: float  # tokens a round
    acceptance: tuple[float, ...]  # by position in the draft: the share of proposals there that were accepted
    round_seconds: float  # mean
    shares: Shares
    agreement: float  # the share of prompts whose tokens are those of exact plain decoding


def decode_work(result: Result) -> Work:
    """The tokens after the first, which the prefill yields."""
    seconds = result.stats.seconds
    return Work(max(0, result.stats.new_tokens - 1), seconds.total - seconds.prefill)


def overall_work(result: Result) -> Work:
    return Work(result.stats.new_tokens, result.stats.seconds.total)


def summarize(trial: Trial, way: Way) -> Summary:
    results, base = trial.results[way], trial.results[PLAIN]
    decoded = [decode_work(r) for r in results]
    accepted = [count for r in results for count in r.stats.accepted]
    return Summary(
        name=way.name,
        drafter=way.drafter,
        draft_length=way.draft_length,
        exact=way.exact,
        new_tokens=sum(r.stats.new_tokens for r in results),
        decode_tokens_per_second=rate(decoded),
        overall_tokens_per_second=rate([overall_work(r) for r in results]),
        time_to_first_token=median(r.stats.time_to_first_token for r in results),
        speed_up=speed_up(decoded, [decode_work(r) for r in base]),
        overall_speed_up=speed_up([overall_work(r) for r in results], [overall_work(r) for r in base]),
        mean_accepted=sum(accepted) / len(accepted) if accepted else 0.0,
        acceptance=acceptance(results),
        round_seconds=sum(work.seconds for work in decoded) / len(accepted) if accepted else 0.0,
        shares=shares(results),
        agreement=1 - len(disagreements(trial, way)) / len(trial.prompts),
    )


def acceptance(results: Sequence[Result]) -> tuple[float, ...]:
    """The share of accepted proposals at each position, over the rounds of all prompts that proposed so many."""
    rounds = [pair for r in results for pair in zip(r.stats.proposed, r.stats.matched, strict=True)]
    longest = max((proposed for proposed, _ in rounds), default=0)
    return tuple(
        sum(matched > i for _, matched in rounds) / sum(proposed > i for proposed, _ in rounds) for i in range(longest)
    )


def shares(results: Sequence[Result]) -> Shares:
    draft = sum(r.stats.seconds.draft for r in results)
    verify = sum(r.stats.seconds.verify for r in results)
    other = sum(r.stats.seconds.other for r in results)
    total = draft + verify + other
    return Shares(draft / total, verify / total, other / total) if total else Shares(0.0, 0.0, 0.0)


RESAMPLES = 4000
LEVEL = 0.95
BOOTSTRAP_SEED = 0  # fixed, so that the interval depends on the measurements alone


@dataclass(frozen=True, slots=True)
class Work:
    """The tokens of one prompt's generation, and the seconds that they took."""

    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio with the bounds of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def rate(works: Sequence[Work]) -> float:
    """Tokens a second over all prompts: all tokens divided by all seconds, not a mean of rates."""
    seconds = sum(work.seconds for work in works)
    return sum(work.tokens for work in works) / seconds if seconds else 0.0


def speed_up(ours: Sequence[Work], base: Sequence[Work]) -> Ratio:
    """rate(ours) / rate(base), both over the same prompts in the same order.

    The interval is a paired bootstrap (Efron & Tibshirani 1993): prompts are drawn again with replacement, each with
    both of its measurements. It shows how much the ratio depends on the choice of prompts, which differ in acceptance.
    """
    if len(ours) != len(base):
        raise ValueError(f"{len(ours)} measurements cannot be paired with {len(base)}")
    table = np.array([[a.tokens, a.seconds, b.tokens, b.seconds] for a, b in zip(ours, base, strict=True)])
    if not len(table) or not table.sum(axis=0).all():
        return Ratio(0.0, 0.0, 0.0)
    drawn = np.random.default_rng(BOOTSTRAP_SEED).integers(len(table), size=(RESAMPLES, len(table)))
    sums = table[drawn].sum(axis=1)  # [resamples, 4]
    sums = sums[sums.all(axis=1)]  # resamples without any decoded token have no rate
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(ratios(sums), [tail, 100 - tail])
    return Ratio(float(ratios(table.sum(axis=0, keepdims=True))[0]), float(low), float(high))


def ratios(sums: np.ndarray) -> np.ndarray:
    """The first rate divided by the second, of rows (tokens, seconds, tokens, seconds): [n, 4] to [n]."""
    out: np.ndarray = sums[:, 0] / sums[:, 1] / (sums[:, 2] / sums[:, 3])
    return out
