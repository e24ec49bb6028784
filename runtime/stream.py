"""A running generation: the loop's rounds become chunks of text, and then the result with its stats."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from inspect import GEN_CLOSED, getgeneratorstate
from threading import Lock, get_ident
from time import perf_counter
from typing import TypeVar

from pard_onnx.models.errors import Failure
from pard_onnx.models.logs import logger

from .asynchronous import WORKERS, in_worker
from .decoding.loop import FinishReason, PromptLogprobs, Step
from .forks import Process, never_free_in_children
from .result import Chunk, Facts, Result, Round, Tally
from .sampling.logprobs import TokenLogprob
from .text.reply import Reply
from .text.writer import Writer
from .turns import Abandoned, Ticket

LOG = logger(__name__)
Generation = Generator[Chunk, None, Result]
Found = TypeVar("Found")


def chunks(
    rounds: Generator[Step, None, None],
    writer: Writer[Reply],
    facts: Facts,
    start: float,
    *,
    logprobs: bool = False,
) -> Generation:
    """Turn rounds into chunks and return the result. The last chunk includes the text that was held back.

    start: perf_counter() when the request came. logprobs: whether the rounds have log probabilities.
    """
    tally, reply = Tally(), writer.reply
    found: list[TokenLogprob] = []
    of_prompt: PromptLogprobs | None = None
    first = paused = 0.0
    begun = False  # whether there was a chunk
    reason: FinishReason = "length"
    with closing(rounds):
        for step in rounds:
            tally.add(step)
            of_prompt = of_prompt or step.prompt_logprobs
            pieces = writer.write(step.tokens)
            first = first or perf_counter() - start
            ended = "stop" if writer.stopped or writer.ended else step.finish_reason
            if ended and (rest := writer.finish(step.end)):
                pieces = [*pieces[:-1], pieces[-1] + rest] if pieces else [rest]
            if pieces or (reply and reply.found):
                before = perf_counter()
                made = chunk(step, pieces, reply, is_round=bool(tally.accepted and step.accepted), logprobs=logprobs)
                if not begun:
                    begun, made = True, replace(made, facts=facts)
                found += made.logprobs or ()
                yield made
                paused += perf_counter() - before
            if ended:
                reason = ended
                break
    total = perf_counter() - start - paused
    stats = tally.stats(facts, len(writer.tokens), total, first)
    text, tokens = "".join(writer.parts), tuple(writer.tokens)
    known = tuple(found) if logprobs else None
    result = Result(text, tokens, reason, stats, known, of_prompt, stop_string=writer.stop)
    if reply:
        reason = "tool_calls" if reply.calls and reason == "stop" else reason
        result = replace(result, finish_reason=reason, reasoning=reply.reasoning, tool_calls=reply.calls)
    LOG.info(
        "%d tokens after %d (%d cached) in %.2f s, %.1f a second, %.2f a round: %s",
        *(stats.new_tokens, stats.prompt_tokens, stats.cached_tokens, total, stats.tokens_per_second),
        *(stats.mean_accepted, reason),
    )
    return result


def chunk(step: Step, pieces: list[str], reply: Reply | None, *, is_round: bool, logprobs: bool = False) -> Chunk:
    """The chunk of a round.

    pieces: the text of each of the round's first tokens; one more than tokens if EOS ends the text while text is held
    back. reply: has the rest of what the round brought. is_round: whether the step is one, and not the prompt's.
    logprobs: whether the round has log probabilities.
    """
    tokens = step.tokens[: len(pieces)]
    drafted = tuple(i < step.matched for i in range(len(tokens)))
    reasoning, calls = reply.take() if reply else ("", ())
    known = step.logprobs[: len(tokens)] if logprobs else None
    cost = None
    if is_round:
        seconds = step.draft_seconds, step.verify_seconds
        cost = Round(step.drafted, step.matched, step.accepted, *seconds, step.source)
    return Chunk("".join(pieces), tokens, drafted, tuple(pieces), known, reasoning, calls, cost)


class EndOfStream(StopIteration):
    """The end of a stream. asyncio's futures refuse exactly StopIteration, and whoever awaits one then waits for ever:
    with this subclass `await asyncio.to_thread(next, stream)` ends, with None on Python 3.11. Later versions of Python
    make a RuntimeError of both."""


class Stream(Iterator[Chunk]):
    """The chunks of one generation, for a loop in a thread (`for`) or in a task of asyncio (`async for`).

    A stream that is closed early leaves the pair ready for the next generation.
    """

    _asynchronous = False  # whether a task has read it

    def __init__(self, generation: Generation, ticket: Ticket) -> None:
        self._generation = generation
        self._ticket = ticket
        self._result: Result | None = None
        self._process = Process()
        self._reading = Lock()  # while a worker thread reads, for a task
        never_free_in_children(generation)  # closing it would wait for locks and threads of the parent

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        self._ticket.reader = get_ident()
        return self._advance()

    def _advance(self) -> Chunk:
        self._process.require()
        try:
            return next(self._generation)
        except StopIteration as end:
            self._result = self._result or end.value
            raise EndOfStream from None
        except ValueError as error:
            refuse_second_reader(error)
            raise

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Chunk:
        chunk = await self._in_worker(self._next_or_none)
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    def _next_or_none(self) -> Chunk | None:
        try:
            return self._advance()
        except (EndOfStream, Abandoned):
            return None

    async def aread(self) -> Result:
        """As `read`, for asyncio. Failure if another task closes the stream meanwhile."""

        def read() -> Result:
            try:
                while self._next_or_none():
                    pass
                return self.result
            finally:
                self.close()

        return await self._in_worker(read)

    async def _in_worker(self, read: Callable[[], Found]) -> Found:
        """What `read` returns, which reads the stream in a worker thread, for this task."""
        from asyncio import current_task  # imported late, as most programs do without it

        self._process.require()
        self._asynchronous = True
        self._ticket.reader = "task", id(current_task())

        def read_alone() -> Found:
            if not self._reading.acquire(blocking=False):
                raise Failure("another task is reading this stream; leave its loop there, or cancel() the stream")
            try:
                return read()
            finally:
                self._reading.release()

        return await in_worker(read_alone, self._abandon)

    @property
    def _ended(self) -> bool:
        return getgeneratorstate(self._generation) == GEN_CLOSED

    def _abandon(self) -> None:
        """Nobody waits for the next chunk any more: end before the next step. Waits for nothing."""
        self._ticket.abandon()
        close_in_worker(self._generation, self._reading)

    async def aclose(self) -> None:
        """End the generation, also while another task waits for its next chunk. In a forked child it does nothing."""
        if not self._process.is_current or self._ended:
            return
        self._ticket.abandon()
        await in_worker(lambda: close_after_reading(self._generation, self._reading))

    async def __aenter__(self) -> Stream:
        self._process.require()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        """A stream that a task has left half-read is closed in a worker: closing may wait for a step of the models."""
        if self._asynchronous and self._process.is_current and not self._ended:
            self._abandon()

    def __enter__(self) -> Stream:
        self._process.require()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def telling_dropped(self, dropped: int) -> Stream:
        """The same stream, whose stats say how many messages of the conversation were left out."""
        if not dropped:
            return self

        def told(generation: Generation) -> Generation:
            result = yield from generation
            return replace(result, stats=replace(result.stats, dropped_messages=dropped))

        return self.within(told)

    def within(self, wrap: Callable[[Generation], Generation]) -> Stream:
        """A stream of the same chunks, whose generator is wrapped to act before the first chunk and after the last."""
        return Stream(wrap(self._generation), self._ticket)

    def read(self) -> Result:
        """Read the stream to its end and return the whole generation."""
        self._process.require()
        with self:  # otherwise an interruption between rounds would leave it open as long as the traceback is kept
            for _ in self:
                pass
        return self.result

    def cancel(self) -> None:
        """End the generation before its next step, or its wait for a place. Any thread, task or signal handler may call
        this.

        The thread that reads the stream gets the result so far, with the finish_reason "cancelled".
        """
        self._process.require()
        self._ticket.cancel()

    def close(self) -> None:
        """End the generation: there are no more chunks. For the thread that reads; other threads call `cancel`, tasks
        `aclose`.

        In a forked child it does nothing.
        """
        if not self._process.is_current:
            return
        try:
            self._generation.close()
        except ValueError as error:
            refuse_second_reader(error)
            raise

    @property
    def result(self) -> Result:
        """The whole generation; Failure before the last chunk was read."""
        self._process.require()
        if self._result is None:
            raise Failure("the stream has no result: it was not read to its end")
        return self._result


def close_after_reading(generation: Generation, reading: Lock) -> None:
    """Close the generation as soon as no worker reads it."""
    with reading:
        generation.close()


def close_in_worker(generation: Generation, reading: Lock) -> None:
    WORKERS.submit(lambda: close_after_reading(generation, reading))


def refuse_second_reader(error: ValueError) -> None:
    """Raise Failure if `error` is Python's error for a generator that is used while it runs in another thread."""
    if "already executing" in str(error):
        raise Failure("another thread is reading this stream; leave its loop there, or cancel() the stream") from None
