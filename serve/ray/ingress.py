"""`Ingress`: takes requests from Ray's HTTP proxy, refuses what it must, and sends each one to a replica."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pard_onnx.models.logs import logger
from pard_onnx.runtime.asynchronous import in_worker
from pard_onnx.serve.app import middleware_of
from pard_onnx.serve.body import LARGE, read_body
from pard_onnx.serve.error_forms import error_response
from pard_onnx.serve.errors import SERVER, ApiError, api_error
from pard_onnx.serve.facts import health
from pard_onnx.serve.metrics import CONTENT_TYPE, Metrics
from pard_onnx.serve.settings import is_loopback
from pard_onnx.serve.sse import error_event

from .affinity import RESPONSES, ResponseKeys, conversation_key
from .arguments import Arguments
from .model_server import forwarded, path_of

LOG = logger(__name__)
LOST = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)
ATTEMPTS = 2  # replicas that get a request whose answer has not begun; a request that ends its replica ends no more
NUMBERS_SECONDS = 5.0  # that replicas have to tell their counts
SAMPLE = re.compile(r"(?P<name>[a-z_]+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")


class Ingress:
    """The deployment that Ray's HTTP proxy sends requests to.

    The proxy chooses a replica before it reads the body, and so cannot know the conversation. The ingress reads it, and
    names the conversation to the router of the models.
    """

    def __init__(self, models: DeploymentHandle[Any], arguments: Arguments) -> None:
        self._models, self._arguments = models, arguments

    def __serve_build_asgi_app__(self) -> Starlette:
        settings = self._arguments.settings()
        return Starlette(
            routes=[
                Route("/health", health),
                Route("/metrics", self.metrics),
                Route("/{path:path}", Forward(self._models, self._arguments)),
            ],
            middleware=[
                Middleware(BehindProxy, local_only=settings.api_key is None),
                *middleware_of(settings, Metrics()),
            ],
        )

    async def metrics(self, request: Request) -> Response:
        """The counts of all replicas."""
        answer = self._models.broadcast("numbers")
        found = await answer.results_async(timeout_s=NUMBERS_SECONDS, return_exceptions=True)
        numbers = [one for one in found if not isinstance(one, BaseException)]
        return Response(labelled(numbers), headers={"Content-Type": CONTENT_TYPE})


class BehindProxy:
    """What a server needs to know of Ray's proxy in front of it: a middleware, the outermost one.

    On which addresses the proxy listens is a setting of the cluster. So without a key the address of the client counts,
    which must be the machine's own. The proxy adds the request's id to each answer, so the guard's is left out.
    """

    def __init__(self, app: ASGIApp, local_only: bool) -> None:
        self._app, self._local_only = app, local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        client = scope.get("client")
        if self._local_only and scope["type"] == "http" and not (client and is_loopback(client[0])):
            message = (
                "without a key only programs of this machine may use the server; set PARD_API_KEY and deploy again"
            )
            await error_response(ApiError(403, message, code="client_not_allowed"), scope)(scope, receive, send)
        else:
            await self._app(scope, receive, send_without_id)


class Forward:
    """An ASGI application that answers with what a replica answers."""

    def __init__(self, models: DeploymentHandle[Any], arguments: Arguments) -> None:
        self._models, self._settings = models, arguments.settings()
        self._responses = ResponseKeys()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        begun: Headers | None = None

        async def relay(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = Headers(raw=message["headers"])
            await send(message)

        try:
            body = await read_body(request, self._settings) if scope["method"] in ("POST", "PUT", "PATCH") else b""
            for left in reversed(range(ATTEMPTS)):
                try:
                    await self._ask(request, body, relay)
                    return
                except LOST:
                    if begun is not None or not left:
                        raise
        except Exception as error:
            answer = answer_to(error)
            if begun is None:
                await error_response(answer, scope)(scope, receive, send)
            elif begun.get("content-type", "").startswith("text/event-stream"):
                await send({"type": "http.response.body", "body": error_event(answer), "more_body": False})
            else:
                raise

    async def _ask(self, request: Request, body: bytes, relay: Send) -> None:
        def key() -> str:
            return self._responses.of_path(path_of(request.scope)) or conversation_key(
                request.headers, body, self._responses
            )

        session = await in_worker(key) if len(body) > LARGE else key()
        handle = self._models.options(method_name="answer", stream=True, session_id=session)
        answer = handle.remote(forwarded(request.scope, body))
        stored = request.method == "POST" and path_of(request.scope) == RESPONSES
        try:
            async for messages in answer:
                for message in messages:
                    if stored and message.get("body"):  # the first piece has the id
                        stored = not self._responses.add(message["body"], session)
                    await relay(message)
        finally:
            answer.cancel()  # has no effect on one that has ended


def answer_to(error: Exception) -> ApiError:
    """The answer to a request that failed with this error."""
    if isinstance(error, BackPressureError):
        message = "all replicas are busy and the queue is full; send the request again later"
        return ApiError(503, message, SERVER, "busy", headers={"Retry-After": "2"})
    if isinstance(error, LOST):
        message = "the replica that had this request has ended; send the request again"
        return ApiError(503, message, SERVER, "replica_lost", headers={"Retry-After": "1"})
    if not isinstance(error, ApiError):
        LOG.error("not foreseen", exc_info=error)
    return api_error(error)


def labelled(numbers: Iterable[tuple[str, str]]) -> str:
    """The counts of all replicas, each with a label `replica`. numbers: its name and its counts, of each replica."""
    comments: dict[str, str] = {}  # to the samples that belong to it
    samples: dict[str, list[str]] = {}
    for replica, text in numbers:
        family = ""
        for line in text.splitlines():
            if line.startswith("# TYPE"):
                comments[family] += line + "\n"
            elif line.startswith("# HELP"):
                family = line.split()[2]
                comments[family] = line + "\n"
            elif found := SAMPLE.fullmatch(line):
                labels = f'replica="{replica}"' + (f",{found['labels']}" if found["labels"] else "")
                samples.setdefault(family, []).append(f"{found['name']}{{{labels}}} {found['value']}\n")
    return "".join(comment + "".join(samples.get(family, ())) for family, comment in comments.items())
