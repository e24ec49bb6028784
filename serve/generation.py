"""`Generation`: one text, made in a worker thread and read by a task of the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from threading import Semaphore
from time import perf_counter
from typing import Any

from pard_onnx.models.errors import Failure
from pard_onnx.models.logs import logger
from pard_onnx.runtime.asynchronous import WORKERS
from pard_onnx.runtime.result import Chunk, Result
from pard_onnx.runtime.stream import Stream

from .metrics import Metrics
from .registry import OpenModel

LOG = logger(__name__)
AHEAD = 256  # chunks that are made before the client takes them; then the stream counts as one that nobody reads


class Generation:
    """One text. The worker thread runs the models while the event loop sends what is there.

    Read `chunks()` to the end, then `result`. `cancel` may be called at any time, and ends the generation before the
    next step of a model, with what it has. The model is released when the worker has ended.
    """

    def __init__(self, model: OpenModel, prompt: Any, options: Mapping[str, Any], *, whole: bool = False) -> None:
        """prompt, options: of `Pair.stream`. whole: only the result is of interest; there are no chunks."""
        self.model = model.take()
        self.started = perf_counter()
        self.first: float | None = None  # seconds to the first chunk
        self._whole = whole
        self._prompt, self._options = prompt, {**model.defaults, **options}
        self._loop = asyncio.get_running_loop()
        self._arrived: deque[Chunk | Result | BaseException] = deque()
        self._news = asyncio.Event()
        self._room = Semaphore(AHEAD)
        self._stream: Stream | None = None
        self._cancelled = False
        self._result: Result | None = None
        WORKERS.submit(self._run, self.cancel)

    @property
    def ended(self) -> bool:
        """Whether the last chunk was read."""
        return self._result is not None

    @property
    def result(self) -> Result:
        """The whole text, after the last chunk."""
        if self._result is None:
            raise Failure("the generation has no result: it was not read to its end")
        return self._result

    def cancel(self) -> None:
        """End the generation before its next step, or its wait for a place. Any thread may call this."""
        self._cancelled = True
        if self._stream is not None:
            self._stream.cancel()
        self._room.release(AHEAD)  # nobody need wait for the client any more

    async def read(self) -> Result:
        """The result, once it is there. Raises as `chunks`."""
        async for _ in self.chunks():
            pass
        return self.result

    async def chunks(self) -> AsyncIterator[Chunk]:
        """The chunks, as they come. Raises what the library raises for the prompt and its options, and Busy."""
        while True:
            while not self._arrived:
                self._news.clear()
                await self._news.wait()
            found = self._arrived.popleft()
            if isinstance(found, BaseException):
                raise found
            if isinstance(found, Result):
                self._result = found
                return
            self._room.release()
            yield found

    def _run(self) -> None:
        """In the worker thread."""
        try:
            with self.model.pair.stream(self._prompt, **self._options) as stream:
                self._stream = stream
                if self._cancelled:
                    stream.cancel()
                for chunk in stream:
                    if self.first is None:
                        self.first = perf_counter() - self.started
                    if not self._whole:
                        self._tell(chunk)
                        self._room.acquire()
            self._tell(stream.result)
        except BaseException as error:
            self._tell(error)
        finally:
            self._stream = None
            self.model.release_from_thread()

    def _tell(self, found: Chunk | Result | BaseException) -> None:
        try:
            self._loop.call_soon_threadsafe(self._take, found)
        except RuntimeError:  # the loop is closed, and nobody waits
            self._cancelled = True
            if self._stream is not None:
                self._stream.cancel()

    def _take(self, found: Chunk | Result | BaseException) -> None:
        self._arrived.append(found)
        self._news.set()


class Generations:
    """The generations of a server that run or wait."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._alive: set[Generation] = set()

    @asynccontextmanager
    async def run(
        self, model: OpenModel, prompt: Any, options: Mapping[str, Any], *, whole: bool = False
    ) -> AsyncIterator[Generation]:
        """A generation that is cancelled where the body ends before it does. Arguments as of `Generation`."""
        generation = Generation(model, prompt, options, whole=whole)
        self._alive.add(generation)
        try:
            yield generation
        finally:
            self._alive.discard(generation)
            if generation.ended:
                self._metrics.count(generation.result, generation.first)
            else:
                generation.cancel()
                self._metrics.count_unfinished()

    @property
    def count(self) -> int:
        return len(self._alive)

    def cancel(self) -> None:
        """End all of them, with what they have."""
        for generation in tuple(self._alive):
            generation.cancel()
