"""`Registry`: the models that a server has, by name, which are loaded when a request asks for them."""

from __future__ import annotations

import asyncio
from time import perf_counter, time
from typing import Any

from pard_onnx.models.checks import nearest_name
from pard_onnx.models.errors import Failure, shown
from pard_onnx.models.library import Library
from pard_onnx.models.logs import logger
from pard_onnx.runtime.asynchronous import in_worker
from pard_onnx.runtime.doctor import memory_limit
from pard_onnx.runtime.pair import Pair

from .errors import ApiError
from .settings import MEMORY_SHARE, Settings
from .sources import Source, open_source, required_bytes, sources_of

LOG = logger(__name__)


class OpenModel:
    """A loaded model, and how many requests use it."""

    def __init__(self, source: Source, pair: Pair, required: int) -> None:
        self.name, self.pair, self.required = source.name, pair, required
        # The options that every generation starts from: the model's own sampling, where its makers recommend one
        self.defaults: dict[str, Any] = {"sampling": "model"} if pair.own_sampling is not None else {}
        self.weight_bytes = pair.info().weight_bytes
        self.created = int(time())
        self.users = 0
        self.used = perf_counter()
        self.leaving = False  # whether it is unloaded as soon as nobody uses it
        self.unused = asyncio.Event()
        self.unused.set()
        self._loop = asyncio.get_running_loop()

    def take(self) -> OpenModel:
        self.users += 1
        self.used = perf_counter()
        self.unused.clear()
        return self

    def release(self) -> None:
        self.users -= 1
        self.used = perf_counter()
        if not self.users:
            self.unused.set()

    def release_from_thread(self) -> None:
        """As `release`, in any thread."""
        try:
            self._loop.call_soon_threadsafe(self.release)
        except RuntimeError:  # the loop is closed, and the server with it
            return


class Registry:
    """Loads one model at a time, on demand, and unloads the least recently used ones within `Settings.memory`.

    Without that setting the models together take at most MEMORY_SHARE of the memory that this process may have. A model
    that takes more by itself is then loaded alone, since what it takes is an upper bound.

    All methods are for the event loop's thread.
    """

    def __init__(self, sources: tuple[Source, ...], settings: Settings, library: Library | None = None) -> None:
        """sources: models that are always there; library: a folder of further ones, which is read again and again."""
        self._fixed, self._settings, self._library = sources, settings, library
        self._open: dict[str, OpenModel] = {}
        self._opening: dict[str, asyncio.Task[OpenModel]] = {}
        self._one_at_a_time = asyncio.Lock()

    @property
    def open(self) -> tuple[OpenModel, ...]:
        """The models that are loaded."""
        return tuple(self._open.values())

    def add(self, source: Source, pair: Pair) -> None:
        """A model that is loaded already."""
        self._open[source.name] = OpenModel(source, pair, required_bytes(source, self._settings))

    async def sources(self) -> tuple[Source, ...]:
        """All models, by name."""
        if self._library is None:
            return self._fixed
        library = self._library
        return (*self._fixed, *await in_worker(lambda: sources_of(library)))

    async def find(self, name: str | None) -> Source:
        """The model of this name; without one, a loaded model, or the first. Raises ApiError (404)."""
        known = await self.sources()
        if not known:
            raise ApiError(404, "this server has no model; pard-models pull brings one", code="model_not_found")
        if name is None:
            latest = max(self._open.values(), key=lambda one: one.used, default=None)
            return next((one for one in known if latest and one.name == latest.name), known[0])
        for one in known:
            if name == one.name or name in one.aliases:
                return one
        names = [one.name for one in known]
        nearest = nearest_name(name, names)
        hint = f"did you mean {nearest}?" if nearest else f"there are {', '.join(names[:10])}"
        message = f"model: there is no model {shown(name)}; {hint}"
        raise ApiError(404, message, code="model_not_found", param="model")

    async def take(self, name: str | None) -> OpenModel:
        """The model of this name, loaded; the caller calls `release` once. Requests for a model that is being loaded
        wait for it. Raises ApiError, PardError."""
        source = await self.find(name)
        while True:
            found = self._open.get(source.name)
            if found and not found.leaving:
                return found.take()
            task = self._opening.get(source.name)
            if task is None:
                task = asyncio.create_task(self._load(source))
                self._opening[source.name] = task
                task.add_done_callback(lambda done: self._loaded(source.name, done))
            # A client that goes away does not stop what others wait for
            model = await asyncio.shield(task)
            if not model.leaving:
                return model.take()

    def _loaded(self, name: str, task: asyncio.Task[OpenModel]) -> None:
        del self._opening[name]
        if not task.cancelled():
            task.exception()  # was read, also where all who waited went away

    async def _load(self, source: Source) -> OpenModel:
        async with self._one_at_a_time:
            if old := self._open.get(source.name):  # it was leaving
                await self._unload(old)
            required = await in_worker(lambda: required_bytes(source, self._settings))
            await self._make_room(source, required)
            start = perf_counter()
            pair = await in_worker(lambda: open_source(source, self._settings))
            model = OpenModel(source, pair, required)
            self._open[source.name] = model
            LOG.info("model %r loaded in %.2f s", source.name, perf_counter() - start)
            return model

    async def _make_room(self, source: Source, required: int) -> None:
        most = self._settings.memory
        if most is None:
            limit = memory_limit()
            if limit is None:
                return
            most = int(MEMORY_SHARE * limit)
        elif required > most:
            raise Failure(
                f"{source.name}: takes {required / 2**30:.1f} GiB with its KV caches, more than --memory allows "
                f"({most / 2**30:.1f} GiB); allow more, or lower --max-live or --cache-bytes"
            )
        while self._open and sum(one.required for one in self.open) + required > most:
            await self._unload(min(self.open, key=lambda one: one.used))

    async def _unload(self, model: OpenModel) -> None:
        """Requests that come now wait until the model is loaded again, so a busy model leaves too."""
        model.leaving = True
        await model.unused.wait()
        await in_worker(model.pair.close)
        del self._open[model.name]
        LOG.info("model %r unloaded", model.name)

    async def close(self) -> None:
        """Unload all models."""
        for task in self._opening.values():
            task.cancel()
        for model in self.open:
            await self._unload(model)
