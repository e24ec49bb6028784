"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from time import time
from typing import Any

from pard_onnx.runtime.result import Chunk, Result
from pard_onnx.runtime.text.tool_calls import ToolCallDelta
from pard_onnx.serve.endpoint import GenerationEndpoint
from pard_onnx.serve.errors import bad_field
from pard_onnx.serve.fields import CHAT, Read
from pard_onnx.serve.registry import OpenModel
from pard_onnx.serve.service import Service, finish_reason, new_id, require_text
from pard_onnx.serve.speculation import Progress, timings, usage, whole
from pard_onnx.serve.sse import event

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What a request for a chat completion asks for."""

    model: str | None
    messages: list[Message]
    options: dict[str, Any]  # keyword arguments of `Pair.stream`
    n: int
    stream: bool
    with_usage: bool  # whether the stream ends with the usage

    @classmethod
    def read(cls, found: Read) -> ChatRequest:
        """Raises ApiError (400), which names the field."""
        own, options = found.own, found.options
        messages = own.get("messages")
        if not messages:
            raise bad_field("messages", "messages: give a list of at least one message")
        for number, message in enumerate(messages):
            if not isinstance(message, dict):
                raise bad_field("messages", f"messages[{number}] must be an object with role and content")
        if "max_completion_tokens" in own:
            options["max_new_tokens"] = own["max_completion_tokens"]
        top = own.get("top_logprobs")
        if top is not None and not own.get("logprobs"):
            raise bad_field("top_logprobs", "top_logprobs: give logprobs: true too, or leave it out")
        if own.get("logprobs"):
            options["logprobs"] = top or 0
        if not options.get("tools", True):
            del options["tools"]
        stream = own.get("stream", False)
        return cls(own.get("model"), messages, options, own.get("n", 1), stream, own.get("stream_options", False))


async def answer(service: Service, wanted: ChatRequest) -> dict[str, Any]:
    """The whole answer."""
    results: list[Result] = []
    async with service.model(wanted.model) as model:
        messages = with_known_roles(model, wanted.messages)
        for number in range(wanted.n):
            async with service.generation(model, messages, wanted.options, number, whole=True) as generation:
                results.append(require_text(await generation.read()))
        return {
            **head(new_id("chatcmpl"), "chat.completion", model),
            "choices": [choice(number, result) for number, result in enumerate(results)],
            "usage": usage(results[:1], results),
            "timings": timings(results[0]),
            "pard": whole(results[0]),
        }


async def streamed(service: Service, wanted: ChatRequest) -> AsyncGenerator[bytes, None]:
    """The events of the answer. Several choices come one after the other."""
    results: list[Result] = []
    async with service.model(wanted.model) as model:
        messages = with_known_roles(model, wanted.messages)
        base = head(new_id("chatcmpl"), "chat.completion.chunk", model)
        end = {"usage": None} if wanted.with_usage else {}

        def written(number: int, delta: Message, logprobs: Any, reason: str | None, **more: Any) -> bytes:
            part = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return event({**base, "choices": [part], **end, **more})

        for number in range(wanted.n):
            progress = Progress()
            async with service.generation(model, messages, wanted.options, number) as generation:
                begun = False
                async for chunk in generation.chunks():
                    if not begun:
                        begun = True
                        yield written(number, {"role": "assistant", "content": ""}, None, None)
                    yield written(number, delta_of(chunk), logprobs_of(chunk), None, pard=progress.add(chunk))
                result = require_text(generation.result)
            if not begun:
                yield written(number, {"role": "assistant", "content": ""}, None, None)
            facts = {"pard": whole(result), "timings": timings(result)}
            yield written(number, {}, None, finish_reason(result), **facts)
            results.append(result)
        if wanted.with_usage:
            yield event({**base, "choices": [], "usage": usage(results[:1], results)})


def head(id_: str, kind: str, model: OpenModel) -> dict[str, Any]:
    """The first fields of an answer and of each of its chunks."""
    return {"id": id_, "object": kind, "created": int(time()), "model": model.name, "system_fingerprint": None}


def choice(number: int, result: Result) -> dict[str, Any]:
    message: Message = {"role": "assistant", "content": result.text, "refusal": None}
    if result.reasoning:
        message["reasoning_content"] = result.reasoning
    if result.tool_calls:
        message["content"] = result.text or None
        message["tool_calls"] = [call.as_message() for call in result.tool_calls]
    return {
        "index": number,
        "message": message,
        "logprobs": logprobs_of(result),
        "finish_reason": finish_reason(result),
    }


def delta_of(chunk: Chunk) -> Message:
    """What a chunk adds to the message."""
    delta: Message = {}
    if chunk.reasoning:
        delta["reasoning_content"] = chunk.reasoning
    if chunk.tool_calls:
        delta["tool_calls"] = [call_delta(call) for call in chunk.tool_calls]
    if chunk.text or not delta:
        delta["content"] = chunk.text
    return delta


def call_delta(call: ToolCallDelta) -> dict[str, Any]:
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def logprobs_of(part: Chunk | Result) -> dict[str, Any] | None:
    if part.logprobs is None:
        return None
    return {"content": [one.openai() for one in part.logprobs], "refusal": None}


def with_known_roles(model: OpenModel, messages: list[Message]) -> list[Message]:
    """The messages, whose role developer, OpenAI's new name of system, is system for templates that do not know it."""
    if "developer" in model.pair.text.template:
        return messages
    return [{**message, "role": "system"} if message.get("role") == "developer" else message for message in messages]


chat_completions = GenerationEndpoint(CHAT, ChatRequest.read, answer, streamed)
