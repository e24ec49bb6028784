"""Requests that start from what earlier ones left: the same text, less to compute, within a number of bytes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pard_onnx import BadInput, Failure, Pair, load
from pard_onnx.runtime.prefixes import MOST_KEPT, PrefixCache
from pard_onnx.runtime.sequence import Sequence
from pard_onnx.runtime.sessions.kv_cache import KvCache
from pard_onnx.runtime.tuning.measurement import chunks_are_exact
from pard_onnx.runtime.tuning.steps import ANY
from pard_onnx.testing import ScriptedDraft, ScriptedTarget

ROWS = 1024 + 64
PROMPT = [1 + number % 250 for number in range(300)]


@pytest.fixture(scope="module")
def folders(write_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("long toy pair")
    target = write_artifact(root / "target", "target", kv_rows=ROWS)
    return target, write_artifact(root / "draft", "draft", rows=284, kv_rows=ROWS)


@pytest.fixture
def pair(folders: tuple[Path, Path]) -> Iterator[Pair]:
    with load(*folders, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def without(folders: tuple[Path, Path]) -> Pair:
    return load(*folders, threads=1, cache_bytes=0)


class Rows(ScriptedTarget):
    """A cache that is the list of its tokens, a byte each."""

    can_be_copied = True

    def __init__(self) -> None:
        super().__init__(max)
        self.most = 0

    @property
    def bytes(self) -> int:
        self.most = max(self.most, len(self.cache))
        return self.most

    def copy_rows(self, other: Rows, count: int) -> None:
        self.cache[:] = other.cache[:count]


class DraftRows(ScriptedDraft):
    can_be_copied = True
    bytes = 0

    def __init__(self) -> None:
        super().__init__(max)

    def copy_rows(self, other: DraftRows, count: int) -> None:
        self.cache[:] = other.cache[:count]


def fresh() -> Sequence:
    return Sequence(Rows(), DraftRows())  # type: ignore[arg-type]


def compute(sequence: Sequence, written: list[int]) -> None:
    """As a run that writes these tokens: all rows but that of the last token."""
    sequence.tokens += written
    for cache in (sequence.target, sequence.draft):
        cache.cache[:] = sequence.tokens[:-1]  # type: ignore[union-attr]


def common(one: list[int], two: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, two, strict=False)))


IDS = st.lists(st.integers(0, 2), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(
    requests=st.lists(st.tuples(IDS, IDS, st.booleans()), min_size=1, max_size=12),
    budget=st.integers(0, 120),
    chunk=st.sampled_from([1, 4, 16]),
    exact=st.booleans(),
)
def test_a_request_starts_from_the_longest_usable_prefix(
    requests: list[tuple[list[int], list[int], bool]], budget: int, chunk: int, exact: bool
) -> None:
    spare = fresh()
    cache = PrefixCache(budget, chunk, fresh, spare, exact=exact)
    for ids, written, failed in requests:
        # What each kept sequence offers: its rows, or whole chunks of its prompts
        rows = [one.tokens[: min(one.target.length, len(ids) - 1)] for one in cache.kept]
        offers = [common(one, ids) for one in rows]
        if not exact:
            offers = [min(same, one.chunked) // chunk * chunk for same, one in zip(offers, cache.kept, strict=True)]
        sequence = cache.take(ids)
        assert sequence.tokens == ids
        assert sequence.target.length == max(offers, default=0)
        for held in (sequence.target, sequence.draft):
            assert held.cache == ids[: held.length]  # type: ignore[union-attr]
        for one in cache.kept:
            assert one is not sequence and one.tokens[: one.target.length] == one.target.cache  # type: ignore[attr-defined]
        whole = (len(ids) - 1) // chunk * chunk  # what a fresh run computes in whole chunks
        assert sequence.chunked <= whole
        compute(sequence, written)
        cache.keep(sequence, failed=failed)
        assert cache.bytes <= budget and len(cache.kept) <= MOST_KEPT
        assert (sequence in cache.kept) <= (not failed)


def test_what_goes_on_goes_on_in_place_and_what_forks_is_copied() -> None:
    cache = PrefixCache(1000, 4, fresh, fresh())
    first = cache.take([1] * 50)
    compute(first, [2, 3])
    cache.keep(first)
    assert cache.take([1] * 50 + [2, 3, 4]) is first
    compute(first, [5])
    cache.keep(first)
    fork = cache.take([1] * 50 + [2, 9, 9, 9] * 5)  # all but two rows of the first are lost, which is little
    assert fork is first
    compute(fork, [5] * 30)
    cache.keep(fork)
    other = cache.take([1] * 50 + [7])
    assert other is not fork and other.target.length == 50 and cache.kept == (fork,)


def test_the_least_recently_used_go_first_and_those_that_another_covers() -> None:
    cache = PrefixCache(30, 4, fresh, fresh())
    kept = []
    for start in (1, 2, 3):
        kept.append(cache.take([start] * 9))
        compute(kept[-1], [8, 8])
        cache.keep(kept[-1])
    assert cache.kept == tuple(kept) and cache.bytes == 30
    again = cache.take([1] * 5 + [4] * 5)
    compute(again, [8])
    cache.keep(again)  # a copy of a part of the first, which was used and is the newest but one now
    assert [one.tokens[0] for one in cache.kept] == [3, 1, 1]
    longer = cache.take([*again.tokens[:-1], 5])
    assert longer is again
    covering = fresh()
    covering.continue_with([3] * 9 + [8, 8, 8])
    compute(covering, [1])
    cache.keep(covering)
    assert [one.tokens[0] for one in cache.kept] == [1, 3]


def test_memory_that_runs_out_frees_what_is_kept() -> None:
    made: list[Sequence] = []

    def make() -> Sequence:
        if cache.kept:
            raise Failure("no memory for the KV cache")
        made.append(fresh())
        return made[-1]

    cache = PrefixCache(1000, 4, make)
    one = cache.take([1, 2, 3])
    compute(one, [4])
    cache.keep(one)
    assert cache.take([5, 6]) is made[1] and not cache.kept
    cache = PrefixCache(1000, 4, lambda: (_ for _ in ()).throw(Failure("none at all")))
    with pytest.raises(Failure, match="none at all"):
        cache.take([1])


def test_a_conversation_sent_whole_computes_only_what_is_new(pair: Pair, without: Pair) -> None:
    session, fed = pair.engine.models[0].session, []
    step = session.step
    first = pair.generate(PROMPT, max_new_tokens=20)
    session.step = lambda ids, keep: fed.append(len(ids)) or step(ids, keep)  # type: ignore[method-assign]
    prompt = [*PROMPT, *first.tokens, 4, 5, 6]
    second = pair.generate(prompt, max_new_tokens=20, draft_length=0)
    assert first.stats.cached_tokens == 0 and second.stats.cached_tokens == len(PROMPT) + 19
    assert sum(fed) == len(prompt) - second.stats.cached_tokens + 19
    assert second.tokens == without.generate(prompt, max_new_tokens=20).tokens
    assert [without.generate(PROMPT, max_new_tokens=2).stats.cached_tokens for _ in range(2)] == [0, 0]


def test_the_draft_starts_from_its_prefix_too(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pair.generate(PROMPT, max_new_tokens=20, draft_length=5)
    session, fed = pair.engine.models[1].session, []  # type: ignore[union-attr]
    step = session.step
    monkeypatch.setattr(session, "step", lambda ids, k: fed.append(len(ids)) or step(ids, k))
    pair.generate([*PROMPT, *first.tokens, 7], max_new_tokens=20, draft_length=5)  # goes on
    pair.generate([*PROMPT[:200], 9], max_new_tokens=20, draft_length=5)  # a copy
    assert max(fed) < 30


@pytest.mark.parametrize("widths_known", [True, False])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_texts_are_those_without_a_cache(
    folders: tuple[Path, Path], without: Pair, widths_known: bool, data: Any
) -> None:
    """Prompts that share beginnings with one another and with texts, greedy and drawn, with any drafts."""
    with load(*folders, threads=1, cache_bytes=data.draw(st.sampled_from([1 << 30, 200_000]))) as pair:
        if not widths_known:
            pair.engine.prefixes._exact = False
        texts: list[list[int]] = [PROMPT]
        reused = 0
        for _ in range(6):
            base = data.draw(st.sampled_from(texts))
            ids = base[: data.draw(st.integers(1, len(base)))] + data.draw(st.lists(st.integers(1, 250), max_size=60))
            options = {"max_new_tokens": data.draw(st.integers(1, 30)), **data.draw(st.sampled_from(WAYS))}
            found, expected = pair.generate(ids, **options), without.generate(ids, **options)
            assert (found.tokens, found.finish_reason) == (expected.tokens, expected.finish_reason)
            assert found.stats.cached_tokens < len(ids)
            assert widths_known or found.stats.cached_tokens % pair.engine.models[0].tuning.chunk == 0
            reused += found.stats.cached_tokens
            texts.append([*ids, *found.tokens][:900])


WAYS: list[dict[str, Any]] = [{}, {"draft_length": 0}, {"draft_length": 5}, {"temperature": 1.2, "seed": 3}]


def test_kept_rows_are_those_of_a_fresh_prompt(pair: Pair) -> None:
    """Bit for bit, whatever steps have written them."""
    assert pair.engine.prefixes._exact
    text = pair.generate(PROMPT, max_new_tokens=40).tokens
    pair.generate([*PROMPT, *text, 3, 4, 5], max_new_tokens=40, draft_length=7)
    (kept,) = pair.engine.prefixes.kept
    sequence = pair.engine.new_sequence()
    session = pair.engine.models[0].session
    session.attach(sequence.target)
    for first in range(0, kept.target.length, 128):
        session.step(kept.tokens[first : min(first + 128, kept.target.length)], 1)
    session.detach()
    np.testing.assert_array_equal(kept.target.read(0, kept.target.length), sequence.target.read(0, kept.target.length))


@pytest.mark.parametrize("what", ["logits", "rows"])
def test_chunks_that_leave_other_rows_are_found_out(pair: Pair, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    session = pair.engine.models[0].session
    assert chunks_are_exact(session, ANY) and session.length == 0
    step = session.step

    def other(ids: list[int], keep: int) -> Any:
        found = step(ids, keep)
        if len(ids) > 16:
            wrong = found.logits[-1] if what == "logits" else session.cache._arrays[0][0, 0, session.length - 1]
            wrong[0] = np.nextafter(wrong[0], np.float32(9))
        return found

    monkeypatch.setattr(session, "step", other)
    assert not chunks_are_exact(session, ANY) and session.length == 0


def test_a_failed_generation_leaves_nothing_for_others(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    session = pair.engine.models[0].session
    step, calls = session.step, []

    def broken(ids: list[int], keep: int) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise Failure("the device is gone")
        return step(ids, keep)

    monkeypatch.setattr(session, "step", broken)
    with pytest.raises(Failure, match="the device is gone"):
        pair.generate(PROMPT, max_new_tokens=50, draft_length=0)
    assert pair.engine.prefixes.kept == ()
    assert pair.generate(PROMPT, max_new_tokens=2).stats.cached_tokens == 0


def test_cancelled_and_closed_generations_are_kept_as_far_as_they_came(pair: Pair, without: Pair) -> None:
    with pair.stream(PROMPT, max_new_tokens=50) as stream:
        next(stream)
    assert pair.generate(PROMPT, max_new_tokens=5).stats.cached_tokens == len(PROMPT) - 1
    cut = pair.generate(PROMPT[:150], max_new_tokens=5, timeout=1e-9)
    assert cut.finish_reason == "timeout"
    found = pair.generate([*PROMPT[:150], 8, 8], max_new_tokens=5)
    assert found.tokens == without.generate([*PROMPT[:150], 8, 8], max_new_tokens=5).tokens


def test_a_closed_pair_frees_what_was_kept(folders: tuple[Path, Path]) -> None:
    pair = load(*folders, threads=1)
    for start in (1, 2):
        pair.generate([start, 3, 4], max_new_tokens=5)
    memory = [weakref.ref(one.target._arrays[0]) for one in pair.engine.prefixes.kept]
    assert len(memory) == 2
    pair.close()
    assert pair.engine.prefixes.kept == ()
    del pair
    gc.collect()
    assert [array() for array in memory] == [None, None]


def test_a_pair_that_is_dropped_needs_no_garbage_collection(folders: tuple[Path, Path]) -> None:
    """The weights of a large model would stay in memory until one comes."""
    pair = load(*folders, threads=1)
    pair.generate([1, 3, 4], max_new_tokens=5)
    list(pair.stream([1, 3, 4], max_new_tokens=5))
    session = weakref.ref(pair.engine.models[0].session)
    gc.disable()
    try:
        del pair
        assert session() is None
    finally:
        gc.enable()


def test_memory_is_counted_by_rows_that_were_written(pair: Pair) -> None:
    cache = pair.engine.new_sequence().target
    assert cache.bytes == 0
    row = cache.read(0, 1).nbytes
    cache.length = 10
    assert cache.bytes == 10 * row
    cache.rollback(3)
    cache.length = 7
    assert cache.bytes == 10 * row
    draft = pair.engine.models[1]
    assert draft is not None
    assert pair.sequence_bytes == (row + draft.session.cache.read(0, 1).nbytes) * ROWS


def test_copied_rows_are_the_other_caches(pair: Pair) -> None:
    one, two = pair.engine.new_sequence().target, pair.engine.new_sequence().target
    rows = np.random.default_rng(0).normal(size=one.read(0, 9).shape).astype(np.float32)
    one.write(rows)
    for array in two._arrays:
        array[:] = 7
    two.copy_rows(one, 5)
    assert two.length == 5
    np.testing.assert_array_equal(two.read(0, 5), rows[:, :, :5])
    assert (two.read(5, 9) == 7).all()


def test_caches_of_a_device_are_taken_in_place_only(
    folders: tuple[Path, Path], device: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    device("CUDAExecutionProvider")
    with load(*folders, provider="cuda", threads=1) as pair:
        pair.engine.prefixes._exact = True
        monkeypatch.setattr(KvCache, "copy_rows", None)
        first = pair.generate(PROMPT, max_new_tokens=40)
        again = pair.generate([*PROMPT[:100], 5], max_new_tokens=5)
        assert (first.stats.cached_tokens, again.stats.cached_tokens) == (0, 100)
        (kept,) = pair.engine.prefixes.kept
        assert kept.bytes == pair.sequence_bytes  # whole buffers


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"cache_bytes": -1}, "cache_bytes must be at least 0, not -1"),
        ({"cache_bytes": "1 GB"}, "cache_bytes must be a whole number, not '1 GB'"),
        ({"cache_bytes": None}, "cache_bytes must be a whole number, not None"),
        ({"max_live": 0}, "max_live must be at least 1, not 0"),
        ({"max_live": 1.5}, "max_live must be a whole number, not 1.5"),
        ({"queue": -1}, "queue must be at least 0, not -1"),
        ({"queue": "all"}, "queue must be a whole number, not 'all'"),
    ],
)
def test_bad_arguments_of_load(folders: tuple[Path, Path], arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadInput, match=problem):
        load(*folders, **arguments)


def test_a_sequence_above_the_budget_drops_no_other() -> None:
    def fresh() -> Sequence:
        return Sequence(Rows(), DraftRows())

    def ended(length: int, first: int) -> Sequence:
        sequence = cache.take([first] * length)
        sequence.target.cache[:] = sequence.tokens
        return sequence

    cache = PrefixCache(100, 8, fresh)
    cache.keep(ended(60, 1))
    cache.keep(ended(101, 2))
    assert [one.target.length for one in cache.kept] == [60]
