"""What a trial's results say, as numbers: one record a way of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np

from pard_onnx.runtime.result import Result

from .trial import PLAIN, Trial, Way, disagreements


@dataclass(frozen=True, slots=True)
class Shares:
    """Of the time after both prefills."""

    draft: float
    verify: float
    other: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Rates are tokens a second over all prompts.

    decode: without prefills; overall: from the prompt's arrival to the last token, with the target's prefill
    and the draft's; time_to_first_token: median seconds. speed_up: of decode, against plain decoding at its
    fastest (single-token steps); agreement: the share of prompts whose tokens equal exact plain decoding's.
    acceptance: by position, the share of the drafts there that were accepted. round_seconds: mean.
    """

    name: str
    draft_length: int | Literal["auto"]
    exact: bool
    new_tokens: int
    decode_tokens_per_second: float
    overall_tokens_per_second: float
    time_to_first_token: float
    speed_up: Ratio
    overall_speed_up: Ratio
    mean_accepted: float
    acceptance: tuple[float, ...]
    round_seconds: float
    shares: Shares
    agreement: float


def decode_work(result: Result) -> Work:
    """The tokens after the first, which the prefill gives."""
    seconds = result.stats.seconds
    return Work(max(0, result.stats.new_tokens - 1), seconds.total - seconds.prefill)


def overall_work(result: Result) -> Work:
    return Work(result.stats.new_tokens, result.stats.seconds.total)


def summary(trial: Trial, way: Way) -> Summary:
    results, base = trial.results[way], trial.results[PLAIN]
    decoded = [decode_work(r) for r in results]
    accepted = [count for r in results for count in r.stats.accepted]
    return Summary(
        name=way.name,
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
    """By position, over the rounds of all prompts that proposed so many."""
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
SEED = 0  # the interval is a function of the measurements alone


@dataclass(frozen=True, slots=True)
class Work:
    """What one prompt took: tokens, and the seconds that they took."""

    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """value, and the bounds of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def rate(works: Sequence[Work]) -> float:
    """Tokens a second over all prompts: tokens over seconds, not a mean of rates."""
    seconds = sum(work.seconds for work in works)
    return sum(work.tokens for work in works) / seconds if seconds else 0.0


def speed_up(ours: Sequence[Work], base: Sequence[Work]) -> Ratio:
    """rate(ours) / rate(base), both over the same prompts in the same order.

    Prompts are drawn again with replacement, each with both of its measurements (Efron & Tibshirani 1993):
    prompts differ in acceptance, and that is what the interval speaks of.
    """
    if len(ours) != len(base):
        raise ValueError(f"{len(ours)} measurements cannot be paired with {len(base)}")
    table = np.array([[a.tokens, a.seconds, b.tokens, b.seconds] for a, b in zip(ours, base, strict=True)])
    if not len(table) or not table.sum(axis=0).all():
        return Ratio(0.0, 0.0, 0.0)
    drawn = np.random.default_rng(SEED).integers(len(table), size=(RESAMPLES, len(table)))
    sums = table[drawn].sum(axis=1)  # [resamples, 4]
    sums = sums[sums.all(axis=1)]  # where EOS came first everywhere there is no rate
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(ratios(sums), [tail, 100 - tail])
    return Ratio(float(ratios(table.sum(axis=0, keepdims=True))[0]), float(low), float(high))


def ratios(sums: np.ndarray) -> np.ndarray:
    """[n, (tokens, seconds, tokens, seconds)] to [n]: the first pair's rate over the second's."""
    out: np.ndarray = sums[:, 0] / sums[:, 1] / (sums[:, 2] / sums[:, 3])
    return out
