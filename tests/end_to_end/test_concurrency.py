"""Many requests on the shipped pair: each text as alone, none starves, memory is bounded; prefixes of conversations."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pard_onnx import Chat, Failure, Pair, Result, load
from pard_onnx.runtime.sequence import Sequence
from pard_onnx.runtime.tuning.measurement import CHUNKS
from pard_onnx.runtime.turns import Ticket

COUNT, LIVE, PATIENCE = 50, 3, 120.0
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 5},
    {"draft_length": 7},
    {"draft_length": 0},
    {"top_k": 9, "temperature": 1.1, "seed": 1},
]


@dataclass(frozen=True)
class Request:
    prompt: str
    options: dict[str, Any]


def request(number: int) -> Request:
    prompt = f"def f{number % 17}(items):\n    return " + "items + " * (number % 5)
    return Request(prompt, {"max_new_tokens": 6 + number % 20, **WAYS[number % len(WAYS)]})


REQUESTS = [request(number) for number in range(COUNT)]


@pytest.fixture(scope="module")
def folders(demo_folder: Callable[[str, str], Path]) -> tuple[Path, Path]:
    return demo_folder("demo-target", "int4"), demo_folder("demo-draft", "int8")


@pytest.fixture(scope="module")
def alone(folders: tuple[Path, Path]) -> list[Result]:
    """What the requests give one after the other, without a cache."""
    with load(*folders, cache_bytes=0) as pair:
        return [pair.generate(one.prompt, **one.options) for one in REQUESTS]


@pytest.fixture
def pair(folders: tuple[Path, Path]) -> Iterator[Pair]:
    with load(*folders, max_live=LIVE) as opened:
        yield opened


def texts(results: list[Any]) -> list[Any]:
    return [(one.text, one.tokens, one.finish_reason) for one in results]


def in_threads(work: Callable[[int], None], count: int = COUNT) -> None:
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


class Line(deque[Ticket]):
    """Those who wait for their turn, which counts the rounds of others that each of them waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds = 0
        self.asked: dict[Ticket, int] = {}
        self.waits: list[int] = []

    def append(self, ticket: Ticket) -> None:
        self.asked[ticket] = self.rounds
        super().append(ticket)

    def popleft(self) -> Ticket:  # when a round has ended
        self.rounds += 1
        ticket = super().popleft()
        self.waits.append(self.rounds - self.asked[ticket])
        return ticket


@pytest.fixture
def line(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Line:
    found = Line()
    monkeypatch.setattr(pair.engine._turns, "_next", found)
    return found


@pytest.fixture
def most_live(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of sequences that requests held, whenever one got its own."""
    held: set[int] = set()
    found: list[int] = []
    take, keep = pair.engine.prefixes.take, pair.engine.prefixes.keep

    def taken(ids: Any) -> Sequence:
        sequence = take(ids)
        held.add(id(sequence))
        found.append(len(held))
        return sequence

    def kept(sequence: Sequence, *, failed: bool = False) -> None:
        held.discard(id(sequence))
        keep(sequence, failed=failed)

    monkeypatch.setattr(pair.engine.prefixes, "take", taken)
    monkeypatch.setattr(pair.engine.prefixes, "keep", kept)
    return found


def test_fifty_threads(pair: Pair, alone: list[Result], line: Line, most_live: list[int]) -> None:
    found: list[Any] = [None] * COUNT

    def work(number: int) -> None:
        found[number] = pair.generate(REQUESTS[number].prompt, **REQUESTS[number].options)

    in_threads(work)
    assert texts(found) == texts(alone)
    assert max(most_live) <= LIVE
    assert max(one.stats.queued for one in found) > 0
    assert len(line.waits) > COUNT and max(line.waits) <= LIVE - 1  # each of the others has one round at most
    assert pair.engine._turns.idle


def test_fifty_tasks(pair: Pair, alone: list[Result], most_live: list[int]) -> None:
    async def one(number: int) -> tuple[str, tuple[int, ...], str]:
        request = REQUESTS[number]
        if number % 3 == 0:
            result = await pair.agenerate(request.prompt, **request.options)
            return result.text, result.tokens, result.finish_reason
        stream = pair.stream(request.prompt, **request.options)
        text = "".join([chunk.text async for chunk in stream])
        return text, stream.result.tokens, stream.result.finish_reason

    async def work() -> None:
        async with asyncio.timeout(PATIENCE):
            assert await asyncio.gather(*map(one, range(COUNT))) == texts(alone)

    asyncio.run(work())
    assert max(most_live) <= LIVE and pair.engine._turns.idle


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX systems do")
def test_ctrl_c_ends_a_wait(folders: tuple[Path, Path], alone: list[Result], monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with load(*folders, max_live=1) as pair:
        step, entered, allowed = pair.engine.models[0].session.step, threading.Event(), threading.Event()

        def blocked(ids: list[int], keep: int) -> Any:
            entered.set()
            assert allowed.wait(PATIENCE)
            return step(ids, keep)

        monkeypatch.setattr(pair.engine.models[0].session, "step", blocked)
        other: list[Any] = []
        thread = threading.Thread(target=lambda: other.append(pair.generate(REQUESTS[0].prompt, **REQUESTS[0].options)))
        thread.start()
        try:
            assert entered.wait(PATIENCE)
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            start = time.perf_counter()
            with pytest.raises(KeyboardInterrupt):
                pair.generate("def f(x):")
            assert time.perf_counter() - start < PATIENCE / 2
        finally:
            signal.signal(signal.SIGINT, before)
            allowed.set()
            thread.join(PATIENCE)
        assert texts(other) == texts(alone[:1])
        assert pair.generate("def f(x):", max_new_tokens=3).finish_reason == "length"


def test_conversations_and_requests_together(pair: Pair, alone: list[Result]) -> None:
    def turns(chat: Chat) -> list[Any]:
        return [chat.send(text, max_new_tokens=9).tokens for text in ("def f(x):", "class A:")]

    expected, found = turns(pair.chat()), []

    def work(number: int) -> None:
        if number % 2:
            found.append(turns(pair.chat()) == expected)
        else:
            request = REQUESTS[number]
            found.append(pair.generate(request.prompt, **request.options).text == alone[number].text)

    in_threads(work, 16)
    assert found == [True] * 16


def test_a_short_request_is_not_stuck_behind_a_long_prompt(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt's chunks take turns with its rounds."""
    ids = [10 + number % 400 for number in range(pair.capacity - 10)]
    # The size that was measured here may be so large that the prompt has fewer chunks than the request has rounds.
    target, *others = pair.engine.models
    in_small_chunks = replace(target, tuning=replace(target.tuning, chunk=min(CHUNKS)))
    monkeypatch.setattr(pair.engine, "_models", (in_small_chunks, *others))
    session, chunks, ready = target.session, [], threading.Event()
    step = session.step

    def watched(tokens: list[int], keep: int) -> Any:
        if len(tokens) > 20:  # a chunk of the long prompt
            chunks.append(len(tokens))
            ready.set()
        return step(tokens, keep)

    session.step = watched  # type: ignore[method-assign]
    first: list[float] = []
    stream = pair.stream(ids, max_new_tokens=3)
    thread = threading.Thread(target=lambda: (next(stream), first.append(time.perf_counter())), daemon=True)
    thread.start()
    assert ready.wait(PATIENCE)
    before = len(chunks)
    result = pair.generate("def f(x):", max_new_tokens=5, draft_length=0)
    assert result.finish_reason == "length" and not first
    assert len(chunks) - before <= 2 * 5  # a chunk before each round, and as many that were asked for first
    thread.join(PATIENCE)
    assert first
    list(stream)


def test_streams_that_one_thread_left_half_read_lose_their_places_and_go_on(
    pair: Pair, alone: list[Result], most_live: list[int]
) -> None:
    numbers = [number for number in range(COUNT) if len(alone[number].tokens) > 12][:8]
    streams = [pair.stream(REQUESTS[number].prompt, **REQUESTS[number].options) for number in numbers]
    tokens: list[tuple[int, ...]] = [()] * len(streams)
    start = time.perf_counter()
    for _ in range(3):
        for at, stream in enumerate(streams):
            chunk = next(stream, None)
            tokens[at] += chunk.tokens if chunk else ()
    with pytest.raises(Failure, match="close its stream first"):
        pair.close()
    for at, stream in enumerate(streams):
        tokens[at] += tuple(token for chunk in stream for token in chunk.tokens)
    assert tokens == [alone[number].tokens for number in numbers]
    assert texts([stream.result for stream in streams]) == texts([alone[number] for number in numbers])
    assert max(most_live) <= LIVE
    assert time.perf_counter() - start < PATIENCE / 4


@pytest.mark.parametrize("cache", [0, 1 << 29])
def test_streams_that_nobody_reads_do_not_block_others(
    folders: tuple[Path, Path], alone: list[Result], cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pard_onnx.runtime.turns.PATIENCE", 0.02)
    with load(*folders, max_live=2, cache_bytes=cache) as pair:
        slow = [pair.stream("def f(x):", max_new_tokens=24, temperature=1.0, seed=seed) for seed in range(4)]
        found: list[Any] = [None] * len(slow)

        def read_slowly(number: int) -> None:
            pieces = []
            for chunk in slow[number]:
                pieces.append(chunk.text)
                time.sleep(0.025)
            found[number] = "".join(pieces)

        in_threads(read_slowly, len(slow))
        expected = [pair.generate("def f(x):", max_new_tokens=24, temperature=1.0, seed=seed).text for seed in range(4)]
        assert found == expected


def test_cancellations_at_random_leave_nothing_stuck(pair: Pair, alone: list[Result]) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        chance, request = random.Random(number), REQUESTS[number]
        for _ in range(3):
            stream = pair.stream(request.prompt, **request.options, timeout=chance.choice([None, None, 0.05]))
            timer = threading.Timer(chance.random() * 0.3, stream.cancel)
            if chance.random() < 0.5:
                timer.start()
            tokens: tuple[int, ...] = ()
            for chunk in stream:
                tokens += chunk.tokens
                if chance.random() < 0.05:
                    stream.close()
                    break
            timer.cancel()
            if tokens != alone[number].tokens[: len(tokens)]:
                wrong.append(number)

    in_threads(work, 30)
    turns = pair.engine._turns
    assert wrong == [] and turns.idle
    assert not (turns._live or turns._waiting or turns._next or turns._holder)
    result = pair.generate(REQUESTS[0].prompt, **REQUESTS[0].options)
    assert result.text == alone[0].text


@pytest.mark.parametrize("kernel", ["", pytest.param("off", marks=pytest.mark.slow)])
def test_the_second_turn_of_a_long_conversation_sent_whole_computes_only_what_is_new(
    folders: tuple[Path, Path], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearly 2,000 tokens, as many as the pair holds, through `generate`. Without this package's kernels a prompt
    starts from whole chunks alone, if longer steps leave other rows."""
    monkeypatch.setenv("PARD_ONNX_KERNEL", kernel)
    messages = [{"role": "user", "content": "def f(x):\n    return x + 1\n" * 150}]
    with load(*folders) as pair, load(*folders, cache_bytes=0) as without:
        long = pair.encode(messages)
        assert 1500 < len(long) < pair.capacity - 80
        first = pair.generate(messages, max_new_tokens=24)
        messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "def g(x):"}]
        second = pair.generate(messages, max_new_tokens=24)
        expected = without.generate(messages, max_new_tokens=24)
        assert (second.text, second.tokens) == (expected.text, expected.tokens)
        chunk = pair.engine.models[0].tuning.chunk
        kept = len(long) // chunk * chunk if not pair.engine.prefixes._exact else len(long)
        assert expected.stats.cached_tokens == 0 and second.stats.cached_tokens >= kept - 2
        assert pair.engine.prefixes.bytes < 2 * 4096 * 15_000
        assert kernel or Counter(second.stats.widths)[1]
