"""The form of an error: OpenAI's, Ollama's for its paths, or Anthropic's for its endpoints and its clients."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Scope

from pard_onnx.models.errors import one_line

from .errors import ApiError

OLLAMA_PATHS = "/api/"
MESSAGES_PATH, VERSION = "/v1/messages", "anthropic-version"
TYPES = {  # of Anthropic's errors, by status; others are INVALID below 500 and FAILED from there on
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    504: "timeout_error",
    529: "overloaded_error",
}
INVALID, FAILED = "invalid_request_error", "api_error"
STATUSES = {"busy": 529, "stopping": 529, "out_of_memory": 529, "timeout": 504}  # Anthropic's, by code
# Its fields, by the names of options in the library's messages
NAMES = {
    "max_reasoning_tokens": "thinking.budget_tokens",
    "response_format": "output_config.format",
    "continue_final_message": "messages",
    "parallel_tool_calls": "disable_parallel_tool_use",
}


def speaks_anthropic(scope: Scope) -> bool:
    """Whether a request is for an endpoint of Anthropic's API, or comes from one of its clients."""
    path: str = scope["path"]
    return path == MESSAGES_PATH or path.startswith(MESSAGES_PATH + "/") or VERSION in Headers(scope=scope)


def error_response(error: ApiError, scope: Scope) -> JSONResponse:
    """The error as the answer to this request."""
    status, content = error.status, error.as_json()
    if speaks_anthropic(scope):
        status, content = anthropic_status(error), anthropic_error(error, scope)
    elif scope["path"].startswith(OLLAMA_PATHS):
        content = ollama_error(error)
    return JSONResponse(content, status, dict(error.headers))


def ollama_error(error: ApiError) -> dict[str, Any]:
    """The error in Ollama's form."""
    return {"error": one_line(error.message)}


def anthropic_status(error: ApiError) -> int:
    """The status that Anthropic's clients expect."""
    return STATUSES.get(error.code or "", error.status)


def anthropic_error(error: ApiError, scope: Scope) -> dict[str, Any]:
    """The error in Anthropic's form."""
    status, message = anthropic_status(error), one_line(error.message)
    for option, field in NAMES.items():
        message = message.replace(option, field)
    if error.code == "context_length_exceeded":  # agents look for these words, and then shorten the conversation
        message = f"prompt is too long: {message}"
    kind = TYPES.get(status, INVALID if status < 500 else FAILED)
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": scope.get("request_id")}
