"""`GenerationEndpoint`: an endpoint that generates text, and answers with the whole of it or with a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pard_onnx.models.errors import PardError

from .errors import ApiError
from .fields import Form, Read, read_fields
from .service import Service
from .sse import DONE, EventStream, error_event, unless_disconnected


class Wanted(Protocol):
    """What a request asks for."""

    @property
    def stream(self) -> bool: ...


Asked = TypeVar("Asked", bound=Wanted)


@dataclass(frozen=True, slots=True)
class GenerationEndpoint(Generic[Asked]):
    """One endpoint, to be called with a request. Errors name the fields of its form."""

    form: Form
    read: Callable[[Read], Asked]  # what the fields ask for; raises ApiError (400), which names the field
    answer: Callable[[Service, Asked], Awaitable[dict[str, Any]]]  # the whole answer
    streamed: Callable[[Service, Asked], AsyncGenerator[bytes, None]]  # its events
    write_error: Callable[[ApiError], bytes] = error_event  # the event of a stream that fails
    last: bytes = DONE  # what ends a stream

    async def __call__(self, request: Request) -> Response:
        service = Service.of(request)

        def to_error(error: BaseException) -> ApiError:
            return service.error(error, self.form)

        try:
            body = await service.body(request)
            wanted = self.read(read_fields(body, self.form, strict=service.settings.strict))
            if wanted.stream:
                return EventStream(self.streamed(service, wanted), to_error, self.write_error, self.last)
            return JSONResponse(await unless_disconnected(request, self.answer(service, wanted)))
        except PardError as error:
            raise to_error(error) from error
