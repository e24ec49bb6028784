"""/v1/responses: OpenAI's Responses API."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from secrets import token_hex
from time import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pard_onnx.models.checks import true_or_false
from pard_onnx.models.errors import BadInput, shown
from pard_onnx.runtime.asynchronous import in_worker
from pard_onnx.runtime.guided.grammar import FORMATS
from pard_onnx.runtime.result import Result
from pard_onnx.runtime.sampling.settings import Sampling
from pard_onnx.runtime.text.overflow import DROP_OLDEST
from pard_onnx.runtime.text.tools import AUTO, REQUIRED, Chosen, checked_choice
from pard_onnx.serve.endpoint import GenerationEndpoint
from pard_onnx.serve.errors import ApiError, bad_field
from pard_onnx.serve.fields import RESPONSES, TEXT_LOGPROBS, Read
from pard_onnx.serve.registry import OpenModel
from pard_onnx.serve.response_store import StoredResponse
from pard_onnx.serve.service import Service, finish_reason, require_text
from pard_onnx.serve.speculation import timings, usage, whole
from pard_onnx.serve.sse import event

from .chat import with_known_roles
from .response_input import Message, MessageReader
from .response_output import Event, Output

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
FUNCTION = "function"


@dataclass(frozen=True, slots=True)
class ResponseRequest:
    """What a request for a response asks for."""

    model: str | None
    input: Any  # text or items
    instructions: str | None
    previous: str | None  # the id of the response that it follows
    options: dict[str, Any]  # keyword arguments of `Pair.stream`
    with_logprobs: bool
    store: bool
    stream: bool
    repeated: dict[str, Any]  # fields that the answer has, too

    @classmethod
    def read(cls, found: Read) -> ResponseRequest:
        """Raises ApiError (400), which names the field, and BadInput."""
        own, options = found.own, found.options
        if "input" not in own:
            raise bad_field("input", "input: give a text or a list of items")
        tools = [function_tool(number, tool) for number, tool in enumerate(own.get("tools", ()))]
        if tools:
            options["tools"] = [{"type": FUNCTION, FUNCTION: told(tool)} for tool in tools]
        text = text_format(own.get("text", {}).get("format"))
        if text["type"] != "text":
            options["response_format"] = text
        effort = checked_effort(own.get("reasoning", {}).get("effort"))
        if effort == "none":
            options.setdefault("max_reasoning_tokens", 0)
        truncation = own.get("truncation", "disabled")
        if truncation == "auto":
            options.setdefault("overflow", DROP_OLDEST)
        top = own.get("top_logprobs", 0)
        with_logprobs = bool(top) or TEXT_LOGPROBS in own.get("include", ())
        if with_logprobs:
            options["logprobs"] = top
        repeated = {
            "background": False,
            "instructions": own.get("instructions"),
            "max_output_tokens": options.get("max_new_tokens"),
            "max_tool_calls": own.get("max_tool_calls"),
            "metadata": own.get("metadata", {}),
            "parallel_tool_calls": options.get("parallel_tool_calls", True),
            "previous_response_id": own.get("previous_response_id"),
            "reasoning": {"effort": effort, "summary": None},
            "store": own.get("store", True),
            "text": {"format": text},
            "tool_choice": written_choice(options.get("tool_choice")),
            "tools": tools,
            "top_logprobs": top,
            "truncation": truncation,
        }
        return cls(
            own.get("model"),
            own["input"],
            own.get("instructions"),
            own.get("previous_response_id"),
            options,
            with_logprobs,
            own.get("store", True),
            own.get("stream", False),
            repeated,
        )


def function_tool(number: int, tool: object) -> dict[str, Any]:
    """A tool as answers repeat it. The library checks its fields."""
    if not isinstance(tool, Mapping):
        raise bad_field("tools", f"tools[{number}] must be an object, not {shown(tool)}")
    kind = tool.get("type")
    if kind != FUNCTION:
        message = f"tools[{number}]: the server has no tools of the type {shown(kind)}; it knows function tools alone"
        raise bad_field("tools", message)
    inner = tool.get(FUNCTION, tool)  # chat completions have one more level
    if not isinstance(inner, Mapping):
        raise bad_field("tools", f"tools[{number}].function must be an object, not {shown(inner)}")
    strict = inner.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise bad_field("tools", f"tools[{number}].strict must be true or false, not {shown(strict)}")
    out = {name: inner.get(name) for name in ("name", "description", "parameters")}
    return {"type": FUNCTION, **out, "strict": strict}


def told(tool: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is told of a tool."""
    return {name: tool[name] for name in ("name", "description", "parameters") if tool[name] is not None}


def written_choice(choice: object) -> Any:
    """tool_choice as answers repeat it."""
    found = checked_choice(choice)
    if not isinstance(found, Chosen):
        return found
    tools = [{"type": FUNCTION, "name": name} for name in found.names]
    return (
        tools[0] if found.one else {"type": "allowed_tools", "mode": REQUIRED if found.must else AUTO, "tools": tools}
    )


def text_format(given: object) -> dict[str, Any]:
    """text.format, as answers repeat it and as the library takes it."""
    if given is None:
        return {"type": "text"}
    kind = given.get("type") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or kind not in FORMATS:
        wanted = " or ".join(f'{{"type": "{name}"}}' for name in FORMATS)
        raise bad_field("text.format", f"text.format must be {wanted}, not {shown(given)}")
    if kind != "json_schema":
        return {"type": kind}
    inner = given.get("json_schema", given)  # chat completions have one more level
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(schema, Mapping):
        raise bad_field("text.format", f"text.format.schema must be a JSON schema, not {shown(schema)}")
    name, strict, about = (inner.get(key) for key in ("name", "strict", "description"))
    if not isinstance(name, str | None) or not isinstance(about, str | None):
        raise bad_field("text.format", "text.format: name and description must be text")
    if strict is not None:
        try:
            true_or_false("text.format.strict", strict)
        except BadInput as error:
            raise bad_field("text.format", str(error)) from error
    return {"type": kind, "name": name or "response", "description": about, "schema": schema, "strict": strict}


def checked_effort(effort: object) -> str | None:
    if effort is not None and effort not in EFFORTS:
        message = f"reasoning.effort must be {' or '.join(map(repr, EFFORTS))}, not {shown(effort)}"
        raise bad_field("reasoning", message)
    return None if effort is None else str(effort)


async def answer(service: Service, wanted: ResponseRequest) -> dict[str, Any]:
    """The whole answer: the response of the last event."""
    response: dict[str, Any] = {}
    async with aclosing(generated(service, wanted)) as events:
        async for some in events:
            for _, fields in some[-1:]:
                response = fields.get("response", response)
    return response


async def streamed(service: Service, wanted: ResponseRequest) -> AsyncGenerator[bytes, None]:
    """The events of the answer, numbered. One that fails after its first event ends with response.failed."""
    response: dict[str, Any] | None = None
    number = 0
    try:
        async with aclosing(generated(service, wanted)) as events:
            async for some in events:
                data = b""
                for name, fields in some:
                    data += event({"type": name, "sequence_number": number, **fields}, name)
                    response = fields.get("response", response)
                    number += 1
                if data:
                    yield data
    except Exception as error:
        if response is None:
            raise
        found = service.error(error, RESPONSES)
        problem = {"code": "invalid_prompt" if found.status < 500 else "server_error", "message": found.message}
        failed = {**response, "status": "failed", "error": problem}
        name = "response.failed"
        yield event({"type": name, "sequence_number": number, "response": failed}, name)


def write_error(error: ApiError) -> bytes:
    """The only event of a stream that fails before there is a response."""
    problem = {"message": error.message, "code": error.code, "param": error.param}
    return event({"type": "error", "sequence_number": 0, **problem}, "error")


async def generated(service: Service, wanted: ResponseRequest) -> AsyncGenerator[list[Event], None]:
    """The events of each chunk. The first ones come with the first chunk, so that a bad request has its own status."""
    before = previous_messages(service, wanted)
    async with service.model(wanted.model) as model:
        reader = MessageReader(before, service.responses.item)
        messages = await in_worker(lambda: reader.read(wanted.input))
        output = Output(with_logprobs=wanted.with_logprobs)
        base = head(wanted, model)
        begin = {**base, "status": "in_progress", "output": [], "usage": None}
        events: list[Event] = [(f"response.{name}", {"response": begin}) for name in ("created", "in_progress")]
        options = wanted.options
        async with service.generation(model, prompt_of(model, wanted, messages), options) as generation:
            async for chunk in generation.chunks():
                events += output.add(chunk)
                yield events
                events = []
            result = require_text(generation.result)
        complete = finish_reason(result) != "length"
        events += output.finish(complete=complete)
        response = {**base, **ended(result, output, complete=complete)}
        if wanted.store:
            stored = reader.read_output(output.items)
            size = await in_worker(lambda: len(json.dumps([response, stored])))
            service.responses.add(StoredResponse(response, tuple(stored), size))
        yield [*events, (f"response.{response['status']}", {"response": response})]


def previous_messages(service: Service, wanted: ResponseRequest) -> tuple[Message, ...]:
    """The conversation that the request goes on with."""
    if wanted.previous is None:
        return ()
    found = service.responses.find(wanted.previous)
    if found is None:
        message = (
            f"previous_response_id: there is no response {shown(wanted.previous)}, or not any more; send the whole "
            "conversation in input"
        )
        raise ApiError(400, message, code="previous_response_not_found", param="previous_response_id")
    return found.messages


def prompt_of(model: OpenModel, wanted: ResponseRequest, messages: list[Message]) -> list[Message]:
    """The messages that the model reads. Instructions are of this response alone."""
    begin = [{"role": "system", "content": wanted.instructions}] if wanted.instructions is not None else []
    return with_known_roles(model, [*begin, *messages])


def head(wanted: ResponseRequest, model: OpenModel) -> dict[str, Any]:
    """The fields of a response that are known before it is there."""
    sampling = model.pair.own_sampling or Sampling()
    return {
        "id": f"resp_{token_hex(24)}",
        "object": "response",
        "created_at": int(time()),
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "model": model.name,
        **wanted.repeated,
        "temperature": wanted.options.get("temperature", sampling.temperature),
        "top_p": wanted.options.get("top_p", sampling.top_p),
    }


def ended(result: Result, output: Output, *, complete: bool) -> dict[str, Any]:
    """The fields of a response that has ended. OpenAI has no other reason for an end that is not the model's."""
    found = usage([result], [result])
    cached = found["prompt_tokens_details"]["cached_tokens"]
    return {
        "status": "completed" if complete else "incomplete",
        "completed_at": int(time()) if complete else None,
        "incomplete_details": None if complete else {"reason": "max_output_tokens"},
        "output": output.items,
        "usage": {
            "input_tokens": found["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": found["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": output.reasoning_tokens},
            "total_tokens": found["total_tokens"],
        },
        "pard": whole(result),
        "timings": timings(result),
    }


async def show_response(request: Request) -> Response:
    """GET /v1/responses/ID."""
    if request.query_params.get("stream", "false") != "false":
        raise bad_field("stream", "stream: the events of a stored response are not kept; leave stream out")
    return JSONResponse(stored_response(request).response)


async def delete_response(request: Request) -> Response:
    """DELETE /v1/responses/ID."""
    id_ = stored_response(request).response["id"]
    Service.of(request).responses.remove(id_)
    return JSONResponse({"id": id_, "object": "response", "deleted": True})


def stored_response(request: Request) -> StoredResponse:
    """Raises ApiError (404)."""
    id_ = request.path_params["id"]
    found = Service.of(request).responses.find(id_)
    if found is None:
        message = f"there is no response {shown(id_)}, or not any more: the server keeps the latest ones, until it ends"
        raise ApiError(404, message, code="response_not_found")
    return found


responses = GenerationEndpoint(RESPONSES, ResponseRequest.read, answer, streamed, write_error, last=b"")
