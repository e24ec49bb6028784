"""What a loaded model does on this machine: which step widths give equal rows, and what its steps cost.

Both come from the same steps, on the live session: some tokens in one step, then again in steps of other widths,
whose logits and KV rows are compared with the first ones bit for bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from math import inf
from time import perf_counter, process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pard_onnx.runtime.sessions.session import DraftSession, TargetSession

from .costs import PREFILL_CHUNK, StepCosts
from .widths import CANDIDATES, Widths

WIDTH = 16  # of the reference step
# Each splits the reference's tokens, last ones first; all together try the widths 1 to 8 and one more.
SPLITS = ((2, 3, 1, 4, 6), (8, 2, 5, 1), (4, 7, 3, 2), (12, 4))
CONTEXT = 256  # rows before the reference's tokens; what they hold is of no importance
DRAFT_WIDTHS = (1, 2, 4, 8, 12, 16, 24, 48)
PATIENCE = 1.2  # seconds of all cores together, after which no further repetition begins
MOST_REPEATS = 8
CHUNKS = (64, 128, 256, 512)  # of prefill; each a multiple of every step width
CHUNK_ROUNDS = 2
CHUNK_GAIN = 1.02  # a larger chunk pays if the smaller one takes so many times as long: a step cannot be cancelled


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a model's steps cost on this machine and, of a target, which widths are exact."""

    costs: StepCosts
    widths: Widths | None = None  # whose rows are bitwise equal; None if no set of them is known
    tried: tuple[int, ...] = ()  # the widths that were compared
    chunk: int = PREFILL_CHUNK  # tokens a step in prefill


def measure_target(session: TargetSession) -> Tuning:
    """Some steps on the session, whose cache is empty before and after."""
    seconds: dict[int, list[float]] = defaultdict(list)
    unequal: dict[Widths, bool] = dict.fromkeys(CANDIDATES, False)
    tried: set[int] = set()
    random = np.random.default_rng(0)
    context = min(CONTEXT, session.cache.rows - WIDTH)

    def split(widths: tuple[int, ...]) -> None:
        ids = random.integers(session.manifest.spec.vocabulary.size, size=WIDTH).tolist()
        logits, rows = timed_step(session, context, ids, seconds)
        end = WIDTH
        for width in widths:
            tried.add(width)
            end -= width
            found, written = timed_step(session, context + end, ids[end : end + width], seconds)
            same = np.array_equal(found, logits[end : end + width])
            same = same and np.array_equal(written, rows[:, :, end : end + width])
            for candidate in CANDIDATES:
                unequal[candidate] |= width in candidate and not same

    repeat(split, SPLITS)
    session.rollback(0)
    widths = next((candidate for candidate in CANDIDATES if not unequal[candidate]), None)
    return Tuning(cheapest(seconds), widths, tuple(sorted(tried | {WIDTH})))


def timed_step(
    session: TargetSession, context: int, ids: list[int], seconds: dict[int, list[float]]
) -> tuple[NDArray[np.float32], NDArray[np.floating]]:
    """One timed step after so many rows: copies of all its logits, and of the KV rows that it wrote."""
    session.cache.set_length(context)
    start = perf_counter()
    logits = session.step(ids, len(ids)).logits
    seconds[len(ids)].append(perf_counter() - start)
    return logits.copy(), session.cache.read(context, context + len(ids))


def measure_prefill_chunk(session: TargetSession) -> int:
    """The tokens a step with which the session reads a long prompt fastest. It takes some seconds on a large model, so
    it is not done at load."""
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
    """The smallest chunk that is nearly as fast as the fastest; the usual one for a cache too small for any."""
    best = min(seconds.values(), default=inf)
    return min((chunk for chunk, taken in seconds.items() if taken <= CHUNK_GAIN * best), default=PREFILL_CHUNK)


def measure_draft(session: DraftSession) -> Tuning:
    """Seconds by rows of a draft step, masks included, as the first column of `DRAFT_WIDTHS` says."""
    seconds: dict[int, list[float]] = defaultdict(list)
    context = max(0, min(CONTEXT, session.cache.rows - max(DRAFT_WIDTHS)))

    def step(width: int) -> None:
        session.cache.set_length(context)
        real = min(width, 4)  # a round's usual number of new tokens; the rest are masks
        if width > WIDTH:
            real = width - WIDTH + 1  # catching up reads many tokens, and asks for as many drafts as ever
        start = perf_counter()
        session.step([0] * real, width - real + 1)
        seconds[width].append(perf_counter() - start)

    for width in DRAFT_WIDTHS:  # the first run of a shape allocates, so there is a second one if patience allows
        step(width)
    repeat(step, DRAFT_WIDTHS)
    session.rollback(0)
    return Tuning(cheapest(seconds))


def repeat(once: Callable[[Any], object], over: tuple[Any, ...]) -> None:
    """Once for each, and again and again while there is patience left: of processor time, since on a busy machine as
    many comparisons are needed as on an idle one."""
    start = process_time()
    for done, item in enumerate(cycle(over), 1):
        once(item)
        spent = process_time() - start
        if done >= MOST_REPEATS * len(over) or spent + spent / done > PATIENCE:
            break


def cheapest(seconds: dict[int, list[float]]) -> StepCosts:
    """The least of each width's times, and of all wider ones': what disturbs a step only ever makes it longer."""
    out: list[tuple[int, float]] = []
    least = inf
    for width in sorted(seconds, reverse=True):
        least = min(least, *seconds[width])
        out.append((width, least))
    return StepCosts(tuple(reversed(out)))
