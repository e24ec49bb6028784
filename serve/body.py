"""The body of a request: read within limits of size and time, and parsed as JSON."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from pard_onnx.runtime.asynchronous import in_worker

from .errors import ApiError
from .settings import Settings

LARGE = 1 << 16  # bytes of a body that is parsed in a worker, since the event loop would wait
MOST_LEVELS = 200  # of lists and objects; the library takes fewer, and Python's own limit depends on the stack


async def read_json(request: Request, settings: Settings) -> Any:
    """The body as JSON. Raises ApiError: 413 if it is too large, 408 if it does not come, 400 if it is no JSON."""
    body = await read_body(request, settings)
    return await in_worker(lambda: parsed(body)) if len(body) > LARGE else parsed(body)


async def read_body(request: Request, settings: Settings) -> bytes:
    most, size = settings.max_request_bytes, 0
    pieces: list[bytes] = []
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and (len(announced) > 18 or int(announced) > most):
        raise _too_large(most)
    stream = request.stream()
    while True:
        try:
            piece = await asyncio.wait_for(anext(stream, None), settings.body_seconds)
        except TimeoutError:
            message = f"no part of the request's body came for {settings.body_seconds:g} s; send it faster"
            raise ApiError(408, message, code="request_timeout", headers={"Connection": "close"}) from None
        except ClientDisconnect:
            raise ApiError(400, "the connection ended before the request's body did") from None
        if piece is None:
            return b"".join(pieces)
        size += len(piece)
        if size > most:
            raise _too_large(most)
        pieces.append(piece)


def _too_large(most: int) -> ApiError:
    message = f"the request's body has more than {most} bytes; send less, or start the server with --max-request-bytes"
    return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})


def parsed(body: bytes) -> Any:
    """The JSON value; ApiError (400) for anything else."""
    if not body:
        raise ApiError(400, "the request has no body; send a JSON object")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(
            400, f"the body of the request is not UTF-8: byte {error.start} is {body[error.start]:#04x}"
        ) from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise ApiError(400, f"the body of the request is not JSON: {error}") from None
    require_sane(value)
    return value


def require_sane(value: Any) -> None:
    """ApiError (400) for JSON that is nested too deep, and for text with half a surrogate pair, which no UTF-8 can
    write."""
    level = [value]
    for _ in range(MOST_LEVELS):
        texts = [one for one in level if isinstance(one, str)]
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                texts += one
                inner += one.values()
            elif isinstance(one, list):
                inner += one
        for text in texts:
            if not text.isascii() and _has_surrogate(text):
                raise ApiError(400, "a text of the request has half of a surrogate pair, which is no character")
        if not inner:
            return
        level = inner
    raise _too_deep()


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _too_deep() -> ApiError:
    return ApiError(400, f"the body of the request is nested more than {MOST_LEVELS} levels deep")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")
