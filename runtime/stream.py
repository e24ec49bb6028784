"""A generation as it runs: rounds become text, stop strings end it, counts become stats."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from threading import Event
from time import perf_counter

from pard_onnx.models.errors import Failure

from .decoding.loop import FinishReason, Step
from .result import Chunk, Facts, Result, Tally
from .text.stop import scan
from .text.tokenizer import Detokenizer

Generation = Generator[Chunk, None, Result]


class Writer:
    """Tokens in, certain text out; `stopped` once a stop string was complete."""

    def __init__(self, detokenizer: Detokenizer, stops: tuple[str, ...]) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._hold = ""
        self.stopped = False
        self.tokens: list[int] = []
        self.parts: list[str] = []

    def write(self, tokens: Iterable[int]) -> list[str]:
        """The text of each token, up to the one that completes a stop string."""
        pieces: list[str] = []
        for token in tokens:
            self.tokens.append(token)
            pieces.append(self._release(self._detokenizer.push(token)))
            if self.stopped:
                break
        self.parts += pieces
        return pieces

    def finish(self) -> str:
        """What was held back, unless it belongs to a stop string."""
        if self.stopped:
            return ""
        rest = self._release(self._detokenizer.finish()) + self._hold
        self._hold = ""
        self.parts.append(rest)
        return rest

    def _release(self, text: str) -> str:
        seen = scan(self._hold + text, self._stops)
        self._hold, self.stopped = seen.hold, seen.stopped
        return seen.release


def chunks(rounds: Generator[Step, None, None], writer: Writer, facts: Facts, start: float) -> Generation:
    """Turn rounds into chunks, the last of which has all text that was held back; returns the result.

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
            ended = "stop" if writer.stopped else step.finish_reason
            if ended and (rest := writer.finish()):
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
    return Result("".join(writer.parts), tuple(writer.tokens), reason, stats)


def chunk(step: Step, pieces: list[str]) -> Chunk:
    """pieces: of the step's first tokens; one more than tokens where EOS let go of text held back."""
    tokens = step.tokens[: len(pieces)]
    drafted = tuple(i < step.matched for i in range(len(tokens)))
    return Chunk("".join(pieces), tokens, drafted, tuple(pieces))


class Stream(Iterator[Chunk]):
    """Chunks of one generation; closing it early leaves the pair ready for the next."""

    def __init__(self, generation: Generation, cancelled: Event) -> None:
        self._generation = generation
        self._cancelled = cancelled
        self._result: Result | None = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        try:
            return next(self._generation)
        except StopIteration as end:
            self._result = self._result or end.value
            raise StopIteration from None
        except ValueError as error:
            refuse_second_reader(error)
            raise

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def within(self, wrap: Callable[[Generation], Generation]) -> Stream:
        """This stream as part of something larger: `wrap` does what comes before its first chunk and after its last."""
        return Stream(wrap(self._generation), self._cancelled)

    def read(self) -> Result:
        """Read the stream to its end; the whole generation."""
        with self:  # an interruption between rounds must not leave it running as long as its traceback lives
            for _ in self:
                pass
        return self.result

    def cancel(self) -> None:
        """End the generation before its next step; for any thread. Its reader gets the result of what is there,
        with the finish_reason "cancelled"."""
        self._cancelled.set()

    def close(self) -> None:
        """End the generation; there will be no more chunks. For the thread that reads: see `cancel`."""
        try:
            self._generation.close()
        except ValueError as error:
            refuse_second_reader(error)
            raise

    @property
    def result(self) -> Result:
        """The whole generation, once the last chunk was taken; Failure before."""
        if self._result is None:
            raise Failure("the stream has no result: it was not read to its end")
        return self._result


def refuse_second_reader(error: ValueError) -> None:
    """Failure if `error` is what Python says of a generator that is asked while it runs."""
    if "already executing" in str(error):
        raise Failure("another thread is reading this stream; leave its loop there, or cancel() the stream") from None
