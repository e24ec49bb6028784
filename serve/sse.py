"""Answers in pieces (server-sent events, lines of JSON), and answers that end when their client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from time import perf_counter
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pard_onnx.models.logs import logger

from .error_forms import error_response
from .errors import ApiError

LOG = logger(__name__)
Found = TypeVar("Found")
KEEP_ALIVE = 5.0  # seconds without an event after which a comment is sent, so that proxies and clients do not give up
STALLED = 120.0  # seconds that a client may take to read what was sent to it; then it counts as gone
EVENTS = "text/event-stream"
COMMENT = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"


def event(value: Any, name: str | None = None) -> bytes:
    """One event with a JSON object. name: its type, for APIs whose events have one."""
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return (b"event: %s\n" % name.encode() if name else b"") + b"data: " + data + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """The end of a stream that fails after it has begun, in OpenAI's form."""
    return event(error.as_json())


class Disconnected(Exception):
    """The client has gone away: nobody waits for the answer."""


async def disconnected(receive: Receive) -> None:
    """Ends when the client has gone away. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(request: Request, work: Awaitable[Found]) -> Found:
    """What `work` returns or raises. Raises Disconnected, and cancels it, as soon as the client goes away."""
    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(disconnected(request.receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        for one in (task, watch):
            if not one.done():
                one.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await one


class EventStream(Response):
    """Events that are sent as they come. Before the first one, an error gets its own status; later it is an event.

    The generator of events is closed when the client goes away. The events may have another form than server-sent
    events: then give all arguments.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        to_error: Callable[[BaseException], ApiError],
        write_error: Callable[[ApiError], bytes] = error_event,
        last: bytes = DONE,
        waiting: bytes = COMMENT,
        media_type: str = EVENTS,
    ) -> None:
        """to_error: what to answer for an exception; write_error: that answer as an event; last: sent at the end;
        waiting: sent between two events where the next one is long in coming."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type=media_type)
        del self.headers["content-length"]
        self._events, self._to_error, self._write_error = events, to_error, write_error
        self._last, self._waiting = last, waiting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(scope, receive, send))
        watch = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait((sending, watch), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in (sending, watch):
                one.cancel()
            await asyncio.gather(sending, watch, return_exceptions=True)
            await self._events.aclose()
        if not sending.cancelled() and (error := sending.exception()) and not isinstance(error, OSError):
            raise error

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun, writing, last, own_task = False, False, perf_counter(), asyncio.current_task()

        async def write(data: bytes, more: bool = True) -> None:
            nonlocal begun, writing, last
            last, writing = perf_counter(), True
            if not begun:
                begun = True
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": data, "more_body": more})
            writing = False

        async def keep_alive() -> None:
            while True:
                await asyncio.sleep(max(0.05, last + KEEP_ALIVE - perf_counter()))
                silent = perf_counter() - last
                if writing and silent >= STALLED and own_task:
                    own_task.cancel()
                elif not writing and silent >= KEEP_ALIVE:
                    await write(self._waiting)

        beside = asyncio.create_task(keep_alive())
        answer: ApiError | None = None
        try:
            async for data in self._events:
                await write(data)
        except Exception as error:
            answer = self._to_error(error)
        finally:
            beside.cancel()
        if answer is None:
            await write(self._last, more=False)
        elif begun:
            await write(self._write_error(answer), more=False)
        else:
            await error_response(answer, scope)(scope, receive, send)
