"""Errors, with the status and in the form that OpenAI's clients expect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pard_onnx.models.errors import BadArtifact, BadInput, BadProvider, Busy, Failure, PardError, TooLong, one_line
from pard_onnx.models.system_errors import is_out_of_memory, out_of_memory

INVALID, SERVER = "invalid_request_error", "server_error"


@dataclass(slots=True)
class ApiError(Exception):
    """A request that gets an error as its answer."""

    status: int
    message: str
    type: str = INVALID
    code: str | None = None
    param: str | None = None  # the field that is wrong
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def as_json(self) -> dict[str, Any]:
        message = one_line(self.message)
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}


def bad_field(name: str, message: str) -> ApiError:
    """The error of a field that cannot be used; the message names it."""
    return ApiError(400, message, param=name)


def unsupported(message: str, param: str | None = None) -> ApiError:
    """The error of what this server cannot do for any request."""
    return ApiError(501, message, code="unsupported", param=param)


# The first one that fits counts. Problems of a model are the server's, not the request's.
STATUSES: tuple[tuple[type[PardError], int, str, str | None], ...] = (
    (TooLong, 400, INVALID, "context_length_exceeded"),
    (BadArtifact, 500, SERVER, "model_not_loaded"),
    (BadProvider, 500, SERVER, "model_not_loaded"),
    (BadInput, 400, INVALID, None),
    (Busy, 503, SERVER, "busy"),
    (Failure, 500, SERVER, None),
    (PardError, 500, SERVER, None),
)


def api_error(error: BaseException, retry_after: int = 1) -> ApiError:
    """Any exception as an `ApiError`. retry_after: seconds after which a busy server may be asked again.

    What was not foreseen says no more than its type: its message may have paths or texts of other requests.
    """
    if isinstance(error, ApiError):
        return error
    for kind, status, type_, code in STATUSES:
        if isinstance(error, kind):
            headers = {"Retry-After": str(retry_after)} if status == 503 else {}
            return ApiError(status, str(error), type_, code, headers=headers)
    if is_out_of_memory(error):
        return ApiError(503, str(out_of_memory(error)), SERVER, "out_of_memory", headers={"Retry-After": "10"})
    return ApiError(500, f"{type(error).__name__}, not foreseen; the server's log has it", SERVER, "internal_error")
