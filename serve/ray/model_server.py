"""`ModelServer`: a replica, which has the models and runs the server's application for each request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ray import serve
from starlette.types import Message, Scope

from pard_onnx.serve.app import create_app
from pard_onnx.serve.registry import Registry
from pard_onnx.serve.service import Service
from pard_onnx.serve.sources import open_source

from .arguments import Arguments


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A whole request, as the ingress sends it to a replica."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    client: tuple[str, int] | None
    body: bytes

    def scope(self) -> Scope:
        """The request for an ASGI application."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": "http",
            "method": self.method,
            "path": self.path,
            "query_string": self.query,
            "root_path": "",
            "headers": list(self.headers),
            "client": self.client,
            "server": None,
            "state": {},
        }


class ModelServer:
    """The deployment that has the models. Ray starts as many replicas of it as the load needs.

    A replica that cannot load its model is not started: Ray's status shows why.
    """

    def __init__(self, arguments: Arguments) -> None:
        settings, source = arguments.settings(), arguments.source()
        registry = Registry((source,) if source else (), settings, arguments.library())
        if source:
            registry.add(source, open_source(source, settings))
        self._app = create_app(registry, settings)
        self._replica: str = serve.get_replica_context().replica_id.unique_id

    async def answer(self, request: Forwarded) -> AsyncGenerator[list[Message], None]:
        """The messages of the answer, as many at a time as there are. Closing it ends the request."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()  # None is the end
        received = iter([{"type": "http.request", "body": request.body, "more_body": False}])

        async def receive() -> Message:
            if (message := next(received, None)) is None:
                await asyncio.Event().wait()  # for ever: a client that goes away closes the answer
            return message or {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(request.scope(), receive, messages.put)
            finally:
                messages.put_nowait(None)

        running = asyncio.create_task(run())
        try:
            more = True
            while more:
                batch = [await messages.get()]
                while not messages.empty():
                    batch.append(messages.get_nowait())
                more = batch[-1] is not None
                if found := [message for message in batch if message is not None]:
                    yield found
            await running  # raises what the application raises
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await running

    async def numbers(self) -> tuple[str, str]:
        """The name of the replica, and its counts as Prometheus reads them."""
        service: Service = self._app.state.service
        return self._replica, service.metrics.text(service.registry.open)


def forwarded(scope: Scope, body: bytes) -> Forwarded:
    """The request without its origin, which the ingress has checked, and with the id that the ingress gave it."""
    dropped = (b"origin", b"x-request-id")
    headers: list[Any] = [(name, value) for name, value in scope["headers"] if name not in dropped]
    headers.append((b"x-request-id", scope["request_id"].encode()))
    client = scope.get("client")
    return Forwarded(
        scope["method"], path_of(scope), scope["query_string"], tuple(headers), tuple(client) if client else None, body
    )


def path_of(scope: Scope) -> str:
    """The path without the prefix under which Ray has the application."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
