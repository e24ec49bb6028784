"""A server of real models in a thread, and what its tests ask of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from pard_onnx import Pair
from pard_onnx.models.library import Library
from pard_onnx.serve.app import create_app
from pard_onnx.serve.registry import Registry
from pard_onnx.serve.server import make_server, open_socket, url_of
from pard_onnx.serve.service import Service
from pard_onnx.serve.settings import Settings
from pard_onnx.serve.sources import Source

MESSAGES = [{"role": "user", "content": "Write a function that adds two numbers"}]


@dataclass(frozen=True, slots=True)
class Served:
    """A server that runs."""

    url: str
    service: Service

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    @property
    def pair(self) -> Pair:
        """The only model that is loaded."""
        (model,) = self.service.registry.open
        return model.pair

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **more)

    def chat(self, **body: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 8, **body})

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **more)


@contextmanager
def served(*sources: Source, library: Library | None = None, **settings: Any) -> Iterator[Served]:
    """A server of these models, until the body ends."""
    chosen, started = Settings(**settings), threading.Event()
    found: list[Any] = []

    def run() -> None:
        async def serve() -> None:
            app = create_app(Registry(sources, chosen, library), chosen)
            found.extend((make_server(app, chosen), app.state.service))
            started.set()
            await found[0].serve(sockets=[opened])

        asyncio.run(serve())

    with open_socket(chosen.host, 0) as opened:
        thread = threading.Thread(target=run)
        thread.start()
        started.wait(20)
        try:
            yield Served(url_of(opened), found[1])
        finally:
            found[0].should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    """The seconds until the condition holds."""
    start = time.perf_counter()
    while not condition():
        assert time.perf_counter() - start < seconds
        time.sleep(0.002)
    return time.perf_counter() - start
