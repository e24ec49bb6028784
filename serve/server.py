"""`Server`: the application on a socket, with uvicorn, until a signal ends it."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
from contextlib import suppress
from http import HTTPStatus

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from pard_onnx.models.checks import require_whole
from pard_onnx.models.errors import BadInput, Failure, shown

from .errors import ApiError
from .service import Service
from .settings import BODY_SECONDS, Settings

MOST_PORT = 65535
KEEP_ALIVE = 30  # seconds that a connection may be idle between two requests
LAST = 10  # seconds after the end of all generations in which their answers must be sent
PORT_PROBLEMS = {
    errno.EADDRINUSE: "another program has this port; choose another one with --port, or 0 for any free one",
    errno.EACCES: "this user may not open this port; choose one above 1023 with --port",
    errno.EADDRNOTAVAIL: "this machine does not have this address; choose another --host",
}


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens: clients wait from now on. Raises BadInput for an address that cannot be had."""
    require_whole("--port", port, 0, MOST_PORT)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise BadInput(f"--host {shown(host)}: there is no such address: {error}") from error
    opened = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # a server that ended a moment ago does not keep the port
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(2048)
    except OSError as error:
        opened.close()
        problem = PORT_PROBLEMS.get(error.errno or 0)
        if problem is None:
            raise Failure(f"{host}:{port}: cannot be opened: {error.strerror}") from error
        raise BadInput(f"{host}:{port}: {problem}") from error
    return opened


def url_of(opened: socket.socket) -> str:
    """The address that a browser on this machine can open."""
    host, port = opened.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Http(H11Protocol):
    """uvicorn's protocol. Its own errors are in the form of all others, and it waits for the head of a request for a
    limited time: from the connection on, or from the first byte that follows an earlier request."""

    patience = BODY_SECONDS
    _waiting: asyncio.TimerHandle | None = None  # which refuses the request whose head has not come

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:  # its body has a limit of its own
            self._stop_waiting()
        elif self._waiting is None and (self.timeout_keep_alive_task is None or self.conn.trailing_data[0]):
            self._wait_for_head()

    def _wait_for_head(self) -> None:
        self._waiting = self.loop.call_later(self.patience, self._require_head)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _require_head(self) -> None:
        self._waiting = None
        if not self.transport.is_closing():
            message = f"no whole request came within {self.patience:g} s; send it faster"
            self._refuse(ApiError(408, message, code="request_timeout"))

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "this is no valid HTTP/1.1 request"))

    def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error.as_json()).encode()
        headers = [("content-type", "application/json"), ("connection", "close"), ("content-length", str(len(body)))]
        reason = HTTPStatus(error.status).phrase
        with suppress(h11.LocalProtocolError):  # an answer has begun
            for event in (
                h11.Response(status_code=error.status, headers=headers, reason=reason),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server. When it stops, running generations have a while to end, and are then cut short."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self._service, self._grace = service, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_generations())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_generations(self) -> None:
        self._service.stopping = True
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(self._grace)
            self._service.generations.cancel()


def make_server(app: Starlette, settings: Settings) -> Server:
    """A server of this application. `serve(sockets=[...])` runs it until SIGINT or SIGTERM, which is raised again when
    all is closed, or until `should_exit` is set."""
    config = uvicorn.Config(
        app,
        http=type("PatientHttp", (Http,), {"patience": settings.body_seconds}),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(settings.grace_seconds) + LAST,
        lifespan="on",
    )
    return Server(config, app.state.service, settings.grace_seconds)
