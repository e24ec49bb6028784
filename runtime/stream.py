"""A running generation: the loop's rounds become chunks of text, and then the result with its stats."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from threading import Event
from time import perf_counter

from pard_onnx.models.errors import Failure
from pard_onnx.models.logs import logger

from .decoding.loop import FinishReason, Step
from .forks import Process, never_free_in_children
from .result import Chunk, Facts, Result, Tally
from .text.writer import Writer

LOG = logger(__name__)
Generation = Generator[Chunk, None, Result]


def chunks(rounds: Generator[Step, None, None], writer: Writer, facts: Facts, start: float) -> Generation:
    """Turn rounds into chunks and return the result. The last chunk includes the text that was held back.

    start: perf_counter() when the request came.
    """
    tally = Tally()
    first = paused = 0.0
    reason: FinishReason = "length"
    with closing(rounds):
        for step in rounds:
            tally.add(step)
            pieces = writer.write(step.tokens)
            first = first or perf_counter() - start
            ended = "stop" if writer.stopped or writer.ended else step.finish_reason
            if ended and (rest := writer.finish(step.end)):
                pieces = [*pieces[:-1], pieces[-1] + rest] if pieces else [rest]
            if pieces:
                before = perf_counter()
                yield chunk(step, pieces)
                paused += perf_counter() - before
            if ended:
                reason = ended
                break
    total = perf_counter() - start - paused
    stats = tally.stats(facts, len(writer.tokens), total, first)
    LOG.info(
        "%d tokens after %d (%d cached) in %.2f s, %.1f a second, %.2f a round: %s",
        *(stats.new_tokens, stats.prompt_tokens, stats.cached_tokens, total, stats.tokens_per_second),
        *(stats.mean_accepted, reason),
    )
    return Result("".join(writer.parts), tuple(writer.tokens), reason, stats)


def chunk(step: Step, pieces: list[str]) -> Chunk:
    """The chunk of a round.

    pieces: the text of each of the round's first tokens; one more than tokens if EOS ends the text while text is held
    back.
    """
    tokens = step.tokens[: len(pieces)]
    drafted = tuple(i < step.matched for i in range(len(tokens)))
    return Chunk("".join(pieces), tokens, drafted, tuple(pieces))


def telling_dropped(generation: Generation, dropped: int) -> Generation:
    """The same generation, whose stats say how many messages of the conversation were left out."""
    result = yield from generation
    return replace(result, stats=replace(result.stats, dropped_messages=dropped))


class Stream(Iterator[Chunk]):
    """The chunks of one generation. A stream that is closed early leaves the pair ready for the next generation."""

    def __init__(self, generation: Generation, cancelled: Event) -> None:
        self._generation = generation
        self._cancelled = cancelled
        self._result: Result | None = None
        self._process = Process()
        never_free_in_children(generation)  # closing it would wait for locks and threads of the parent

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        self._process.require()
        try:
            return next(self._generation)
        except StopIteration as end:
            self._result = self._result or end.value
            raise StopIteration from None
        except ValueError as error:
            refuse_second_reader(error)
            raise

    def __enter__(self) -> Stream:
        self._process.require()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def within(self, wrap: Callable[[Generation], Generation]) -> Stream:
        """A stream of the same chunks, whose generator is wrapped to act before the first chunk and after the last."""
        return Stream(wrap(self._generation), self._cancelled)

    def read(self) -> Result:
        """Read the stream to its end and return the whole generation."""
        self._process.require()
        with self:  # otherwise an interruption between rounds would leave it open as long as the traceback is kept
            for _ in self:
                pass
        return self.result

    def cancel(self) -> None:
        """End the generation before its next step. Any thread may call this.

        The thread that reads the stream gets the result so far, with the finish_reason "cancelled".
        """
        self._process.require()
        self._cancelled.set()

    def close(self) -> None:
        """End the generation: there are no more chunks. For the thread that reads; other threads call `cancel`.

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


def refuse_second_reader(error: ValueError) -> None:
    """Raise Failure if `error` is Python's error for a generator that is used while it runs in another thread."""
    if "already executing" in str(error):
        raise Failure("another thread is reading this stream; leave its loop there, or cancel() the stream") from None
