"""`Registry`: the models that a server has, by name, which are loaded when a request asks for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
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

    def __init__(
        self, source: Source, pair: Pair, required: int, expire: Callable[[OpenModel], object] = lambda _: None
    ) -> None:
        """required: bytes that it takes; expire: is called when nobody has used the model for `keep_alive` seconds."""
        self.name, self.pair, self.required = source.name, pair, required
        # The options that every generation starts from: the model's own sampling, where its makers recommend one
        self.defaults: dict[str, Any] = {"sampling": "model"} if pair.own_sampling is not None else {}
        self.weight_bytes = pair.info().weight_bytes
        self.created = int(time())
        self.users = 0
        self.used = perf_counter()
        self.leaving = False  # whether it is unloaded as soon as nobody uses it
        self.keep_alive = inf  # seconds after its last use until it is unloaded; inf: when others need the memory
        self.expired = False  # whether that time is over
        self._expire = expire
        self._timer: asyncio.TimerHandle | None = None
        self.unused = asyncio.Event()
        self.unused.set()
        self._loop = asyncio.get_running_loop()

    def take(self) -> OpenModel:
        self.users += 1
        self.used = perf_counter()
        self.unused.clear()
        self.stop_timer()
        return self

    def release(self) -> None:
        self.users -= 1
        self.used = perf_counter()
        if not self.users:
            self.unused.set()
            if self.keep_alive < inf:
                self._timer = self._loop.call_later(self.keep_alive, self._end)

    @property
    def seconds_left(self) -> float:
        """Until it is unloaded, if nobody uses it from now on."""
        return self.keep_alive if self.users else max(0.0, self.keep_alive - (perf_counter() - self.used))

    def stop_timer(self) -> None:
        self.expired = False
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        self.expired = True
        self._expire(self)

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
        self._expiring: set[asyncio.Task[None]] = set()

    @property
    def open(self) -> tuple[OpenModel, ...]:
        """The models that are loaded."""
        return tuple(self._open.values())

    def add(self, source: Source, pair: Pair) -> None:
        """A model that is loaded already."""
        self._open[source.name] = OpenModel(source, pair, required_bytes(source, self._settings), self._expire)

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

    async def unload(self, name: str | None) -> None:
        """Unload the model of this name as soon as nobody uses it; it is gone if nobody does. Raises ApiError (404)."""
        source = await self.find(name)
        model = self._open.get(source.name)
        if model is None or model.leaving:
            return
        model.keep_alive = 0.0
        if not model.users:
            model.expired = True
            await asyncio.shield(self._expire(model))  # a client that goes away does not stop it half way

    def _expire(self, model: OpenModel) -> asyncio.Task[None]:
        async def expire() -> None:
            async with self._one_at_a_time:
                if self._open.get(model.name) is model and model.expired and not model.leaving:
                    await self._unload(model)

        task = asyncio.create_task(expire())
        self._expiring.add(task)
        task.add_done_callback(self._expiring.discard)
        return task

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
            model = OpenModel(source, pair, required, self._expire)
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
        model.stop_timer()
        await model.unused.wait()
        model.stop_timer()
        await in_worker(model.pair.close)
        del self._open[model.name]
        LOG.info("model %r unloaded", model.name)

    async def close(self) -> None:
        """Unload all models."""
        for task in self._opening.values():
            task.cancel()
        async with self._one_at_a_time:
            for model in self.open:
                await self._unload(model)
