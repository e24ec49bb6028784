"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial
from hashlib import blake2b
from secrets import token_hex
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from pard_onnx.runtime.asynchronous import in_worker
from pard_onnx.runtime.result import Chunk, Facts, Result
from pard_onnx.runtime.text.tool_calls import ToolCallDelta
from pard_onnx.serve.error_forms import anthropic_error
from pard_onnx.serve.errors import ApiError
from pard_onnx.serve.registry import OpenModel
from pard_onnx.serve.service import Service, arguments_of, require_text
from pard_onnx.serve.speculation import Progress, timings, whole
from pard_onnx.serve.sse import EventStream, event, unless_disconnected

from .fields import MessageRequest

Block = dict[str, Any]
Event = dict[str, Any]
THINKING, TEXT, TOOL = "thinking", "text", "tool_use"
NO_STOP: Block = {"stop_reason": None, "stop_sequence": None}


async def messages(request: Request) -> Response:
    service = Service.of(request)
    wanted = MessageRequest.read(await service.body(request), strict=service.settings.strict)
    if wanted.stream:
        failed = partial(error_event, request.scope)
        return EventStream(streamed(service, wanted), service.error, failed, last=b"")
    return JSONResponse(await unless_disconnected(request, answer(service, wanted)))


async def count_tokens(request: Request) -> Response:
    """The tokens that the model would read."""
    service = Service.of(request)
    wanted = MessageRequest.read(await service.body(request), strict=service.settings.strict, counts=True)
    async with service.model(wanted.model) as model:
        pair, options = model.pair, wanted.options_for(model)
        count = await in_worker(lambda: pair.count_tokens(wanted.messages, **options))
    return JSONResponse({"input_tokens": count})


def error_event(scope: Scope, error: ApiError) -> bytes:
    """The end of a stream that fails after it has begun."""
    return written(anthropic_error(error, scope))


def written(value: Event) -> bytes:
    """The event, whose name is its type."""
    return event(value, value["type"])


async def answer(service: Service, wanted: MessageRequest) -> dict[str, Any]:
    """The whole answer."""
    async with service.model(wanted.model) as model:
        options = wanted.options_for(model)
        async with service.generation(model, wanted.messages, options, whole=True) as generation:
            result = require_text(await generation.read())
        message = {**head(model), "content": content(result, shows_thinking=wanted.shows_thinking)}
        facts = {"timings": timings(result), "pard": whole(result)}
        return {**message, **stop(result, options), "usage": usage(result.stats, result.stats.new_tokens), **facts}


async def streamed(service: Service, wanted: MessageRequest) -> AsyncGenerator[bytes, None]:
    """The events of the answer."""
    async with service.model(wanted.model) as model:
        options, progress = wanted.options_for(model), Progress()
        message, blocks = head(model), StreamedBlocks(shows_thinking=wanted.shows_thinking)

        def start(facts: Facts) -> bytes:
            begun = {**message, "content": [], **NO_STOP, "usage": usage(facts, 0)}
            return written({"type": "message_start", "message": begun}) + written({"type": "ping"})

        async with service.generation(model, wanted.messages, options) as generation:
            begun = False
            async for chunk in generation.chunks():
                if chunk.facts and not begun:
                    begun = True
                    yield start(chunk.facts)
                events = blocks.add(chunk) or [{"type": "ping"}]
                events[-1]["pard"] = progress.add(chunk)
                yield b"".join(map(written, events))
            result = require_text(generation.result)
        if not begun:
            yield start(result.stats)
        yield b"".join(map(written, blocks.end()))
        facts = {"pard": whole(result), "timings": timings(result)}
        counts = usage(result.stats, result.stats.new_tokens)
        yield written({"type": "message_delta", "delta": stop(result, options), "usage": counts, **facts})
        yield written({"type": "message_stop"})


def head(model: OpenModel) -> dict[str, Any]:
    """The first fields of an answer."""
    return {"id": f"msg_{token_hex(12)}", "type": "message", "role": "assistant", "model": model.name}


def usage(facts: Facts, new_tokens: int) -> dict[str, Any]:
    """Tokens that were read and written. Those whose KV rows were there already are not in input_tokens."""
    return {
        "input_tokens": facts.prompt_tokens - facts.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": facts.cached_tokens,
        "output_tokens": new_tokens,
    }


def stop(result: Result, options: dict[str, Any]) -> dict[str, Any]:
    """Why the text ended, in Anthropic's words. options: those of the generation."""
    reason = "max_tokens"  # of what could have gone on
    if result.finish_reason == "tool_calls":
        reason = TOOL
    elif result.stop_string is not None:
        reason = "stop_sequence"
    elif result.finish_reason == "stop":
        reason = "end_turn"
    elif result.finish_reason == "length" and result.stats.new_tokens < options["max_new_tokens"]:
        reason = "model_context_window_exceeded"
    return {"stop_reason": reason, "stop_sequence": result.stop_string if reason == "stop_sequence" else None}


def content(result: Result, *, shows_thinking: bool) -> list[Block]:
    """The blocks of a whole answer."""
    blocks: list[Block] = []
    if result.reasoning:
        shown = result.reasoning if shows_thinking else ""
        blocks.append({"type": THINKING, "thinking": shown, "signature": signature(result.reasoning)})
    if result.text or not (blocks or result.tool_calls):
        blocks.append({"type": TEXT, "text": result.text})
    for call in result.tool_calls:
        blocks.append({"type": TOOL, "id": call.id, "name": call.name, "input": arguments_of(call.arguments) or {}})
    return blocks


def signature(thinking: str) -> str:
    """What clients send back with the thinking; nothing depends on it, but some drop thinking that has none."""
    return blake2b(thinking.encode(), digest_size=16, usedforsecurity=False).hexdigest()


class StreamedBlocks:
    """The events of the blocks of a streamed answer, which is read chunk by chunk."""

    def __init__(self, *, shows_thinking: bool) -> None:
        self._shows_thinking = shows_thinking
        self._count = 0  # blocks that have begun
        self._open: str | None = None  # the type of the block that has not ended
        self._thoughts: list[str] = []

    def add(self, chunk: Chunk) -> list[Event]:
        """What this chunk adds."""
        events: list[Event] = []
        if chunk.reasoning:
            events += self._think(chunk.reasoning)
        calls, goes_on = chunk.tool_calls, bool(chunk.tool_calls) and chunk.tool_calls[0].id is None
        if goes_on:  # the text comes after the call that is open
            events += self._call(calls)
        if chunk.text:
            events += self._write(chunk.text)
        return events if goes_on else events + self._call(calls)

    def end(self) -> list[Event]:
        """The end of the last block; an answer without any has an empty text."""
        return [*([] if self._count else self._begin(TEXT, {"text": ""})), *self._close()]

    def _think(self, thinking: str) -> list[Event]:
        events = [] if self._open == THINKING else self._begin(THINKING, {"thinking": "", "signature": ""})
        self._thoughts.append(thinking)
        return [*events, self._delta("thinking_delta", thinking=thinking)] if self._shows_thinking else events

    def _write(self, text: str) -> list[Event]:
        events = [] if self._open == TEXT else self._begin(TEXT, {"text": ""})
        return [*events, self._delta("text_delta", text=text)]

    def _call(self, calls: tuple[ToolCallDelta, ...]) -> list[Event]:
        events: list[Event] = []
        for call in calls:
            if call.id is not None:
                events += self._begin(TOOL, {"id": call.id, "name": call.name, "input": {}})
            if call.arguments:
                events.append(self._delta("input_json_delta", partial_json=call.arguments))
        return events

    def _begin(self, kind: str, block: Block) -> list[Event]:
        events = self._close()
        self._open, self._count = kind, self._count + 1
        start = {"type": "content_block_start", "index": self._count - 1, "content_block": {"type": kind, **block}}
        return [*events, start]

    def _close(self) -> list[Event]:
        if self._open is None:
            return []
        events: list[Event] = []
        if self._open == THINKING:
            events.append(self._delta("signature_delta", signature=signature("".join(self._thoughts))))
        self._open = None
        return [*events, {"type": "content_block_stop", "index": self._count - 1}]

    def _delta(self, kind: str, **what: str) -> Event:
        return {"type": "content_block_delta", "index": self._count - 1, "delta": {"type": kind, **what}}
