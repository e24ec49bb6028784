"""`Guard`: who may use the server. A middleware that gives each request an id, and counts it."""

from __future__ import annotations

import re
from hmac import compare_digest
from secrets import token_hex
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .error_forms import error_response, speaks_anthropic
from .errors import ApiError
from .metrics import Metrics
from .settings import Settings, is_loopback

REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
OPEN_PATHS = frozenset(("/", "/health"))  # without a key: the page asks for it, and watchers of processes have none


class Guard:
    """Refuses requests without the key, and those that a foreign web page makes a browser send.

    A page of another site can send requests to this machine, and by a name of its own that leads here (DNS rebinding)
    read the answers. So a request whose Origin is neither this server nor allowed is refused, and without a key so is
    one to another host name than this machine's.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._key = settings.api_key.encode() if settings.api_key is not None else None
        self._local_only = self._key is None and is_loopback(settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        scope["request_id"] = id_ = given if REQUEST_ID.fullmatch(given) else f"req-{token_hex(12)}"

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent = MutableHeaders(scope=message)
                sent["x-request-id"] = id_
                if speaks_anthropic(scope):
                    sent["request-id"] = id_
                self._metrics.count_request(counted_path(scope), message["status"])
            await send(message)

        problem = self.problem(scope, headers)
        app = error_response(problem, scope) if problem else self._app
        await app(scope, receive, send_with_id)

    def problem(self, scope: Scope, headers: Headers) -> ApiError | None:
        """Why the request is refused; None where it is not."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._local_only and not is_loopback(host_name(host)):
            message = (
                f"the host {host[:100]!r} is not this machine; ask for localhost, or start the server with --api-key"
            )
            return ApiError(403, message, code="host_not_allowed")
        if origin is not None and not self._allows(origin, host):
            message = f"pages of {origin[:100]!r} may not use this server; start it with --cors ORIGIN to allow them"
            return ApiError(403, message, code="origin_not_allowed")
        if self._key is None or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return None
        sent = headers.get("authorization", "")
        keys = [sent[7:].strip() if sent[:7].lower() == "bearer " else "", headers.get("x-api-key", "")]
        if any(compare_digest(key.encode(), self._key) for key in keys):
            return None
        way = "Authorization: Bearer KEY, or x-api-key: KEY"
        message = f"the API key is wrong; send {way}" if any(keys) else f"send an API key: {way}"
        return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _allows(self, origin: str, host: str) -> bool:
        if "*" in self._settings.cors or origin in self._settings.cors:
            return True
        return urlsplit(origin).netloc == host if "://" in origin else False


def host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


def counted_path(scope: Scope) -> str:
    """The path as counts name it: a client must not be able to make names without end."""
    route = scope.get("route")
    return str(getattr(route, "path", "other")) if route is not None else "other"
