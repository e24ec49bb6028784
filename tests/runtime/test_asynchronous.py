"""The pair in asyncio: chunks and results as in a thread, cancellation within a step, and nothing that stays behind."""

from __future__ import annotations

import asyncio
import gc
import random
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from pard_onnx import BadInput, Busy, Failure, Pair, Stream, load
from pard_onnx.runtime.asynchronous import WORKERS, in_worker

TEXT = "the quick brown"
PATIENCE = 30.0
Found = TypeVar("Found")


@pytest.fixture(scope="module")
def pair(pair_folders: tuple[Path, Path]) -> Iterator[Pair]:
    with load(*pair_folders, threads=1, cache_bytes=0) as opened:
        yield opened


@pytest.fixture
def steps(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(pair, monkeypatch)


class Steps:
    """Counts the target's steps; each waits until it may run."""

    def __init__(self, pair: Pair, patch: pytest.MonkeyPatch) -> None:
        session = pair.engine.models[0].session
        step = session.step
        self.count, self.allowed = 0, threading.Event()
        self.allowed.set()

        def counted(ids: list[int], keep: int) -> Any:
            self.count += 1
            assert self.allowed.wait(PATIENCE)
            return step(ids, keep)

        patch.setattr(session, "step", counted)

    async def next(self) -> None:
        """Until another step has begun."""
        before = self.count
        while self.count == before:
            await asyncio.sleep(0.001)


def run(work: Awaitable[Found]) -> Found:
    async def limited() -> Found:
        async with asyncio.timeout(PATIENCE):
            return await work

    return asyncio.run(limited())


async def free(pair: Pair) -> None:
    """Until nothing runs or waits any more."""
    while not pair.engine._turns.idle:
        await asyncio.sleep(0.001)


def test_a_stream_in_a_task_is_the_stream_in_a_thread(pair: Pair) -> None:
    expected = list(pair.stream(TEXT, max_new_tokens=30, draft_length=4))

    async def work() -> None:
        stream = pair.stream(TEXT, max_new_tokens=30, draft_length=4)
        assert [chunk async for chunk in stream] == expected
        assert stream.result.tokens == tuple(token for chunk in expected for token in chunk.tokens)
        assert [chunk async for chunk in stream] == []
        async with pair.stream(TEXT, max_new_tokens=30, draft_length=4) as again:
            assert await anext(again) == expected[0]
            assert next(again) == expected[1]  # both ways mix
            assert [chunk async for chunk in again] == expected[2:]
        assert (await pair.stream(TEXT, max_new_tokens=30).aread()).tokens == stream.result.tokens
        found = await pair.agenerate(TEXT, max_new_tokens=30)
        assert (found.tokens, found.text) == (stream.result.tokens, stream.result.text)

    run(work())


def test_a_conversation_in_a_task(pair: Pair) -> None:
    async def work() -> list[Any]:
        with pair.chat() as chat:
            replies = [(await chat.asend(text, max_new_tokens=8)).tokens for text in ("the fox", "jumps")]
            return [replies, chat.messages]

    with pair.chat() as chat:
        expected = [chat.send(text, max_new_tokens=8).tokens for text in ("the fox", "jumps")]
        assert run(work()) == [expected, chat.messages]


def test_errors_arrive_in_the_task(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        with pytest.raises(BadInput, match="unknown option temprature"):
            await pair.agenerate(TEXT, temprature=1)  # type: ignore[call-arg]
        with pytest.raises(BadInput, match="the prompt is empty"):
            await pair.agenerate("")
        monkeypatch.setattr(pair.engine.models[0].session, "step", broken)
        with pytest.raises(Failure, match="the device is gone"):
            await pair.agenerate(TEXT)
        with pytest.raises(Failure, match="the device is gone"):
            async for _ in pair.stream(TEXT):
                raise AssertionError

    def broken(ids: list[int], keep: int) -> Any:
        raise Failure("the device is gone")

    run(work())
    assert pair.engine._turns.idle


def test_the_event_loop_is_never_blocked(pair: Pair, steps: Steps) -> None:
    """Not by steps, not by waiting for a place, not by streams that are closed or dropped in the midst of a step."""

    async def work() -> None:
        steps.allowed.clear()
        tasks = [asyncio.create_task(pair.agenerate(TEXT, max_new_tokens=4)) for _ in range(10)]
        dropped = pair.stream(TEXT)
        reading = asyncio.create_task(anext(dropped))
        await steps.next()
        for _ in range(20):
            start = time.perf_counter()
            await asyncio.sleep(0)
            assert time.perf_counter() - start < 0.5
        for task in (*tasks[:3], reading):
            task.cancel()
        found = await asyncio.gather(*tasks[:3], reading, return_exceptions=True)  # although no step can end
        assert all(isinstance(one, asyncio.CancelledError) for one in found)
        del dropped, reading
        gc.collect()
        steps.allowed.set()
        assert {one.finish_reason for one in await asyncio.gather(*tasks[3:])} == {"length"}
        await free(pair)

    run(work())


LEAVE: dict[str, Callable[[Pair, Steps], Awaitable[None]]] = {}


def way(work: Callable[[Pair, Steps], Awaitable[None]]) -> Callable[[Pair, Steps], Awaitable[None]]:
    LEAVE[work.__name__] = work
    return work


@way
async def cancelled_in_a_loop(pair: Pair, steps: Steps) -> None:
    async def consume() -> None:
        async for _ in pair.stream(TEXT, max_new_tokens=90):
            pass

    task = asyncio.create_task(consume())
    await steps.next()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@way
async def cancelled_in_generate(pair: Pair, steps: Steps) -> None:
    task = asyncio.create_task(pair.agenerate(TEXT, max_new_tokens=90))
    await steps.next()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@way
async def out_of_time(pair: Pair, steps: Steps) -> None:
    steps.allowed.clear()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(pair.agenerate(TEXT, max_new_tokens=90), 0.05)


@way
async def closed_early(pair: Pair, steps: Steps) -> None:
    async with pair.stream(TEXT, max_new_tokens=90) as stream:
        async for _ in stream:
            break
    assert [chunk async for chunk in stream] == []
    with pytest.raises(Failure, match="not read to its end"):
        _ = stream.result


@way
async def left_and_collected(pair: Pair, steps: Steps) -> None:
    async for _ in pair.stream(TEXT, max_new_tokens=90):
        break
    gc.collect()


@way
async def closed_while_another_task_reads(pair: Pair, steps: Steps) -> None:
    stream = pair.stream(TEXT, max_new_tokens=90)
    reading = asyncio.create_task(stream.aread())
    chunks = pair.stream(TEXT, max_new_tokens=90)
    other = asyncio.create_task(anext(chunks, None))
    await steps.next()
    await stream.aclose()
    await chunks.aclose()
    with pytest.raises(Failure, match="not read to its end"):
        await reading
    await other
    assert await anext(chunks, None) is None


@way
async def its_generator_collected(pair: Pair, steps: Steps) -> None:
    async def pieces() -> Any:
        async for chunk in pair.stream(TEXT, max_new_tokens=90):
            yield chunk.text

    async for _ in pieces():
        break
    gc.collect()
    await asyncio.sleep(0)  # asyncio closes the generator


@way
async def cancelled_when_the_chunk_is_on_its_way(pair: Pair, steps: Steps) -> None:
    KEPT.append(pair.stream(TEXT, max_new_tokens=90, draft_length=0))
    steps.allowed.clear()
    reading = asyncio.create_task(anext(KEPT[-1]))
    await steps.next()
    steps.allowed.set()
    time.sleep(0.3)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


KEPT: list[Stream] = []  # streams that nothing collects


@way
async def cancelled_by_name(pair: Pair, steps: Steps) -> None:
    stream = pair.stream(TEXT, max_new_tokens=90)
    await anext(stream)
    stream.cancel()
    assert [chunk.tokens async for chunk in stream] in ([], [()])
    assert stream.result.finish_reason == "cancelled"


@pytest.mark.parametrize("name", LEAVE)
def test_a_consumer_that_goes_away_ends_its_generation_within_a_step(pair: Pair, steps: Steps, name: str) -> None:
    expected = pair.generate(TEXT, max_new_tokens=20).tokens

    async def work() -> None:
        await LEAVE[name](pair, steps)
        before = steps.count
        steps.allowed.set()
        await free(pair)
        assert steps.count - before <= 1
        assert (await pair.agenerate(TEXT, max_new_tokens=20)).tokens == expected

    run(work())


def test_one_stream_is_not_for_two_tasks(pair: Pair, steps: Steps) -> None:
    async def work() -> None:
        stream = pair.stream(TEXT, max_new_tokens=20)
        steps.allowed.clear()
        reading = asyncio.create_task(anext(stream))
        await steps.next()
        for second in (anext(stream), stream.aread()):
            with pytest.raises(Failure, match="another task is reading this stream"):
                await second
        steps.allowed.set()
        first = await reading
        assert first.tokens + tuple([token async for chunk in stream for token in chunk.tokens]) == stream.result.tokens

    run(work())


def test_a_cancelled_turn_leaves_the_conversation_as_it_was(pair: Pair, steps: Steps) -> None:
    async def work() -> None:
        chat = pair.chat()
        await chat.asend("the fox", max_new_tokens=5)
        before = [dict(message) for message in chat.messages]
        task = asyncio.create_task(chat.asend("jumps", max_new_tokens=90))
        await steps.next()
        await steps.next()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await free(pair)
        assert chat.messages == before
        assert (await chat.asend("over", max_new_tokens=5)).stats.cached_tokens > 5

    run(work())


def test_requests_that_wait_are_cancelled_at_once(pair_folders: tuple[Path, Path]) -> None:
    async def work() -> None:
        with load(*pair_folders, threads=1, max_live=1, queue=2) as pair:
            async with pair.stream(TEXT, max_new_tokens=90) as stream:
                await anext(stream)
                waiting = [asyncio.create_task(pair.agenerate(TEXT)) for _ in range(2)]
                while len(pair.engine._turns._waiting) < 2:
                    await asyncio.sleep(0.001)
                with pytest.raises(Busy):
                    await pair.agenerate(TEXT)
                waiting[0].cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting[0]
                while len(pair.engine._turns._waiting) == 2:
                    await asyncio.sleep(0.001)
                last = await pair.agenerate(TEXT, timeout=0.02)
                assert (last.finish_reason, last.tokens) == ("timeout", ())
                assert last.stats.queued >= 0.01
                waiting[1].cancel()
            await free(pair)

    run(work())


def test_a_pair_can_be_closed_after_its_tasks_were_cancelled(pair_folders: tuple[Path, Path]) -> None:
    """Their last steps are waited for."""

    async def work() -> None:
        for _ in range(10):
            with load(*pair_folders, threads=1) as pair:
                tasks = [asyncio.create_task(pair.agenerate(TEXT, max_new_tokens=100)) for _ in range(8)]
                await asyncio.sleep(random.random() * 0.01)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    run(work())


def test_a_stream_within_a_stream_of_one_task_does_not_wait_for_itself(pair_folders: tuple[Path, Path]) -> None:
    async def work() -> None:
        with load(*pair_folders, threads=1, max_live=1) as pair:
            expected = pair.generate(TEXT, max_new_tokens=30, draft_length=0).tokens
            tokens: list[int] = []
            async for chunk in pair.stream(TEXT, max_new_tokens=30, draft_length=0):
                tokens += chunk.tokens
                if len(tokens) % 10 == 5:
                    assert (await pair.agenerate(TEXT, max_new_tokens=30)).tokens == expected
            assert tuple(tokens) == expected

    start = time.perf_counter()
    run(work())
    assert time.perf_counter() - start < PATIENCE / 2


@pytest.mark.parametrize("thread", ["to_thread", "executor"])
def test_next_in_an_executor_ends(pair: Pair, thread: str) -> None:
    """asyncio's futures refuse StopIteration; whoever awaits one must not wait for ever."""
    expected = list(pair.stream(TEXT, max_new_tokens=10))

    async def read(stream: Stream, *default: object) -> Any:
        if thread == "to_thread":
            return await asyncio.to_thread(next, stream, *default)
        with ThreadPoolExecutor(1) as pool:
            return await asyncio.get_running_loop().run_in_executor(pool, next, stream, *default)

    async def work() -> None:
        stream = pair.stream(TEXT, max_new_tokens=10)
        found = [await read(stream, None) for _ in expected]
        assert found == expected and await read(stream, None) is None
        try:
            assert await read(stream) is None  # Python 3.11
        except RuntimeError as error:  # later versions
            assert isinstance(error.__cause__, StopIteration)
        assert stream.result.tokens

    run(work())


def test_many_requests_need_no_thread_of_the_default_executor(pair: Pair) -> None:
    expected = pair.generate(TEXT, max_new_tokens=3).tokens

    async def work() -> None:
        held = threading.Event()
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        blocked = loop.run_in_executor(None, held.wait)
        found = await asyncio.gather(*(pair.agenerate(TEXT, max_new_tokens=3) for _ in range(200)))
        assert {one.tokens for one in found} == {expected}
        held.set()
        await blocked

    run(work())


def test_idle_threads_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pard_onnx.runtime.asynchronous.IDLE", 0.02)

    async def work() -> None:
        assert await asyncio.gather(*(in_worker(lambda n=n: n) for n in range(50))) == list(range(50))

    for _ in range(3):
        run(work())
    end = time.perf_counter() + PATIENCE
    while WORKERS._idle and time.perf_counter() < end:
        time.sleep(0.01)
    assert WORKERS._idle == [] and not WORKERS._running


EXIT = """
import asyncio, sys, threading
import pard_onnx
pair = pard_onnx.load(sys.argv[1], sys.argv[2], threads=1)

async def main():
    tasks = [asyncio.create_task(pair.agenerate("the quick", max_new_tokens=100)) for _ in range(20)]
    stream = pair.stream("the quick", max_new_tokens=100)
    await anext(stream)
    if sys.argv[3] == "left":
        asyncio.get_running_loop().stop()  # the loop ends with tasks in it
        await asyncio.sleep(1)
    print("done", flush=True)

try:
    asyncio.run(main())
except RuntimeError:
    print("done", flush=True)
"""


@pytest.mark.parametrize("how", ["returned", "left"])
def test_a_program_that_ends_with_generations_under_way_ends_at_once(pair_folders: tuple[Path, Path], how: str) -> None:
    command = [sys.executable, "-c", EXIT, *map(str, pair_folders), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


DAEMONS = """
import sys, threading, time
from pard_onnx import load

pair = load(sys.argv[1], sys.argv[2], threads=2)
progress = [0] * 3

def answer(which):
    while True:
        for _ in pair.stream("the quick brown " * 4, max_new_tokens=60):
            progress[which] += 1

for which in range(len(progress)):
    threading.Thread(target=answer, args=(which,), daemon=True).start()
while min(progress) < 5:
    time.sleep(0.01)
print("done", flush=True)
"""


def test_a_program_ends_while_daemon_threads_of_its_own_generate(pair_folders: tuple[Path, Path]) -> None:
    """ONNX Runtime ends the process by SIGABRT where its session is freed while a step runs."""
    for _ in range(3):
        command = [sys.executable, "-c", DAEMONS, *map(str, pair_folders)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("seed", range(2))
def test_cancellations_at_random_leave_nothing_behind(pair_folders: tuple[Path, Path], seed: int) -> None:
    async def work() -> None:
        chance = random.Random(seed)
        with load(*pair_folders, threads=1, max_live=2) as pair:
            expected = pair.generate(TEXT, max_new_tokens=12).tokens
            chats = [pair.chat() for _ in range(5)]

            async def consume() -> None:
                kind = chance.randrange(4)
                options: dict[str, Any] = {
                    "max_new_tokens": chance.randint(1, 12),
                    "timeout": chance.choice([None, 0.01]),
                }
                if kind == 0:
                    await pair.agenerate(TEXT, **options)
                elif kind == 1:
                    try:
                        await chance.choice(chats).asend("fox", **options)
                    except Failure:  # another turn of the conversation
                        return
                else:
                    async for _ in pair.stream(TEXT, **options):
                        await asyncio.sleep(chance.random() * 0.003)
                        if kind == 3 and chance.random() < 0.2:
                            break

            tasks = [asyncio.create_task(consume()) for _ in range(60)]
            for task in chance.sample(tasks, 30):
                await asyncio.sleep(chance.random() * 0.005)
                task.cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(one is None or isinstance(one, asyncio.CancelledError) for one in found)
            await free(pair)
            turns = pair.engine._turns
            assert not (turns._live or turns._waiting or turns._next or turns._holder)
            assert (await pair.agenerate(TEXT, max_new_tokens=12)).tokens == expected

    run(work())
