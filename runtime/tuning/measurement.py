"""Measures on a loaded session which step widths give equal rows on this machine, and what steps cost.

The same steps serve both: some tokens are run in one step, then again in steps of other widths, whose logits and KV
rows are compared bit for bit with those of the first step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from math import inf
from time import perf_counter, process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pard_onnx.runtime.sessions.session import DraftSession, TargetSession

from .steps import ANY, CANDIDATES, EVEN, PREFILL_CHUNK, StepCosts, Widths

WIDTH = 16  # of the reference step
# Widths into which the reference step's tokens are split, beginning with the last tokens. Together the splits try the
# widths 1 to 8, and 12.
SPLITS = ((2, 3, 1, 4, 6), (8, 2, 5, 1), (4, 7, 3, 2), (12, 4))
CONTEXT = 256  # rows of the cache before the tokens that are run; their values do not matter
DRAFT_WIDTHS = (1, 2, 4, 8, 12, 16, 24, 48)
TIME_LIMIT = 1.2  # seconds of processor time, of all cores together, after which no further repetition begins
MOST_REPEATS = 8
CHUNKS = (64, 128, 256, 512)  # tokens in a step of prefill; each a multiple of every step width
CHUNK_ROUNDS = 2
# A larger chunk is taken only if the smaller one takes more than this many times as long: a step cannot be cancelled,
# so short steps are better.
CHUNK_GAIN = 1.02
PROBED_CHUNK = 64  # tokens, which take half the time of most chunks
PROBED_WIDTHS = (1, 2, 4, 8)
MOST_SECONDS = 3600.0  # that a step may cost
MOST_WIDTH = 4096  # of a step that is measured
# By set of widths: a reference step of so many tokens, and a step that computes the last ones again. The reference's
# width belongs to the smaller sets too, the other one to none of them: it shows whether a smaller set is the true one.
CONFIRMATIONS = {ANY: (8, 1), Widths(1, 2): (8, 3), EVEN: (8, 2), Widths(4, 4): (8, 4), Widths(8, 8): (16, 8)}


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a model's steps cost on this machine and, of a target, which widths are exact."""

    costs: StepCosts
    widths: Widths | None = None  # the step widths whose rows are bitwise equal; None if no such set is known
    tried: tuple[int, ...] = ()  # the widths that were compared
    chunk: int = PREFILL_CHUNK  # tokens in a step of prefill
    chunks: bool = False  # whether a step of prefill leaves the rows that steps of those widths leave, bit for bit

    def __post_init__(self) -> None:
        """ValueError for what no measurement gives. A tuning may come from a file."""
        seconds = [cost for _, cost in self.costs.points]
        if not 0 < seconds[0] <= seconds[-1] <= MOST_SECONDS or seconds != sorted(seconds):
            raise ValueError(f"the costs of wider and wider steps rise from above 0, not {seconds}")
        widths = (*self.tried, *(width for width, _ in self.costs.points))
        if not all(0 < width <= MOST_WIDTH for width in widths):
            raise ValueError(f"widths are from 1 to {MOST_WIDTH}, not {widths}")
        if self.widths is not None and (self.widths not in CANDIDATES or not self.tried):
            raise ValueError(f"{self.widths} after steps of {self.tried} tokens is no set of widths that is tried")
        if self.chunk not in (PREFILL_CHUNK, *CHUNKS):
            raise ValueError(f"a chunk is one of {CHUNKS}, not {self.chunk}")


def measure_target(session: TargetSession) -> Tuning:
    """Measure a target's session. Its cache is empty before and after."""
    seconds: dict[int, list[float]] = defaultdict(list)
    unequal: dict[Widths, bool] = dict.fromkeys(CANDIDATES, False)
    tried: set[int] = set()
    random = np.random.default_rng(0)
    context = min(CONTEXT, session.cache.rows - WIDTH)

    def split(widths: tuple[int, ...]) -> None:
        ids = random.integers(session.manifest.spec.vocabulary.size, size=WIDTH).tolist()
        for width, same in compare(session, context, ids, widths, seconds):
            tried.add(width)
            for candidate in CANDIDATES:
                unequal[candidate] |= width in candidate and not same

    repeat(split, SPLITS)
    session.rollback(0)
    widths = next((candidate for candidate in CANDIDATES if not unequal[candidate]), None)
    same = widths is not None and chunks_are_exact(session, widths)
    return Tuning(cheapest(seconds), widths, tuple(sorted(tried | {WIDTH})), chunks=same)


def confirms(session: TargetSession, tuning: Tuning) -> bool:
    """Whether steps of a few widths still give equal rows, or unequal ones where no set of widths is exact, as the
    tuning says. The cache is empty before and after.

    A tuning that was kept is checked so: exactness is a promise, and another driver, a moved virtual machine or a
    changed file may have broken it. It takes two steps, of 9 tokens together where every width is exact.
    """
    reference, width = CONFIRMATIONS[tuning.widths or CANDIDATES[-1]]
    context = min(CONTEXT, session.cache.rows - reference)
    ids = np.random.default_rng(1).integers(session.manifest.spec.vocabulary.size, size=reference).tolist()
    same = all(equal for _, equal in compare(session, context, ids, (width,), defaultdict(list)))
    session.rollback(0)
    return same == (tuning.widths is not None)


def compare(
    session: TargetSession,
    context: int,
    ids: list[int],
    widths: tuple[int, ...],
    seconds: dict[int, list[float]],
) -> Iterator[tuple[int, bool]]:
    """Run the tokens in one step, then the last ones again in steps of these widths, beginning with the last tokens.

    Gives each width, and whether its rows are bitwise equal to those of the one step. seconds: of each step, by width.
    """
    logits, rows = timed_step(session, context, ids, seconds)
    end = len(ids)
    for width in widths:
        end -= width
        other_logits, other_rows = timed_step(session, context + end, ids[end : end + width], seconds)
        same = np.array_equal(other_logits, logits[end : end + width])
        yield width, same and np.array_equal(other_rows, rows[:, :, end : end + width])


def timed_step(
    session: TargetSession, context: int, ids: list[int], seconds: dict[int, list[float]]
) -> tuple[NDArray[np.float32], NDArray[np.floating]]:
    """Run and time one step after `context` rows; returns copies of all its logits and of the KV rows that it wrote."""
    session.cache.set_length(context)
    start = perf_counter()
    logits = session.step(ids, len(ids)).logits
    seconds[len(ids)].append(perf_counter() - start)
    return logits.copy(), session.cache.read(context, context + len(ids))


def chunks_are_exact(session: TargetSession, widths: Widths) -> bool:
    """Whether a chunk of a prompt leaves the rows that steps of a few tokens leave, bit for bit: its KV rows, and the
    logits of the last token. widths: the exact ones.

    The cache is empty before and after.
    """
    chunk = min(PROBED_CHUNK, session.cache.rows)
    context, kept = min(CONTEXT, session.cache.rows - chunk), widths.width_for(1)
    ids = np.random.default_rng(2).integers(session.manifest.spec.vocabulary.size, size=chunk).tolist()
    end = context + chunk

    def last_rows(count: int) -> tuple[NDArray[np.float32], NDArray[Any]]:
        session.cache.set_length(end - count)
        logits = session.step(ids[-count:], kept).logits[-1].copy()
        return logits, session.cache.read(end - count, end)

    logits, rows = last_rows(chunk)
    same = True
    for width in (width for width in PROBED_WIDTHS if width in widths):
        other_logits, other_rows = last_rows(width)
        same = same and np.array_equal(other_logits, logits) and np.array_equal(other_rows, rows[:, :, -width:])
    session.cache.set_length(0)
    return same


def measure_prefill_chunk(session: TargetSession) -> int:
    """The number of tokens in a step with which the session reads a long prompt fastest.

    It takes some seconds on a large model, so `load` does not do it.
    """
    prompt = min(max(CHUNKS), session.cache.rows)
    seconds = dict.fromkeys((chunk for chunk in CHUNKS if chunk <= prompt), inf)
    for chunk in list(seconds) * CHUNK_ROUNDS:
        session.cache.set_length(0)
        start = perf_counter()
        for first in range(0, prompt, chunk):
            session.step([0] * min(chunk, prompt - first), 1)
        seconds[chunk] = min(seconds[chunk], perf_counter() - start)
    session.rollback(0)
    return fastest_chunk(seconds)


def fastest_chunk(seconds: Mapping[int, float]) -> int:
    """The smallest chunk that is nearly as fast as the fastest; PREFILL_CHUNK if the cache was too small for any."""
    best = min(seconds.values(), default=inf)
    return min((chunk for chunk, time in seconds.items() if time <= CHUNK_GAIN * best), default=PREFILL_CHUNK)


def measure_draft(session: DraftSession) -> Tuning:
    """Measure a draft's session, by the tokens in a step, masks included. Its cache is empty before and after."""
    seconds: dict[int, list[float]] = defaultdict(list)
    context = max(0, min(CONTEXT, session.cache.rows - max(DRAFT_WIDTHS)))

    def step(width: int) -> None:
        session.cache.set_length(context)
        real = min(width, 4)  # a round's usual number of new tokens; the rest are masks
        if width > WIDTH:
            real = width - WIDTH + 1  # a step that reads many new tokens asks for no more drafts than other steps do
        start = perf_counter()
        session.step([0] * real, width - real + 1)
        seconds[width].append(perf_counter() - start)

    for width in DRAFT_WIDTHS:  # the first run of a shape allocates memory; a later one may be faster
        step(width)
    repeat(step, DRAFT_WIDTHS)
    session.rollback(0)
    return Tuning(cheapest(seconds))


def repeat(run: Callable[[Any], object], items: tuple[Any, ...]) -> None:
    """Run each item once, then all of them again, MOST_REPEATS times at most, until TIME_LIMIT is reached.

    The limit is on processor time, so that a busy machine makes as many comparisons as an idle one.
    """
    start = process_time()
    for done, item in enumerate(cycle(items), 1):
        run(item)
        spent = process_time() - start
        if done >= MOST_REPEATS * len(items) or spent + spent / done > TIME_LIMIT:
            break


def cheapest(seconds: dict[int, list[float]]) -> StepCosts:
    """By width, the shortest time of a step of this width or of any larger width: what disturbs a step only makes it
    longer, and a wider step does more work."""
    out: list[tuple[int, float]] = []
    least = inf
    for width in sorted(seconds, reverse=True):
        least = min(least, *seconds[width])
        out.append((width, least))
    return StepCosts(tuple(reversed(out)))
