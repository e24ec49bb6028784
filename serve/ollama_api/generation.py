"""Ollama's API: POST /api/chat and /api/generate."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pard_onnx.runtime.asynchronous import in_worker
from pard_onnx.runtime.options import Options
from pard_onnx.runtime.pair import Pair
from pard_onnx.runtime.result import Chunk, Result
from pard_onnx.runtime.text.prompt import encode
from pard_onnx.runtime.text.reasoning import ThinkingReader, thinking_of
from pard_onnx.runtime.text.reply import reply_form
from pard_onnx.runtime.text.tool_calls import ToolCall, ToolCallDelta
from pard_onnx.serve.error_forms import ollama_error
from pard_onnx.serve.errors import bad_field
from pard_onnx.serve.registry import OpenModel
from pard_onnx.serve.service import Service, arguments_of, finish_reason, require_text
from pard_onnx.serve.speculation import whole
from pard_onnx.serve.sse import EventStream, unless_disconnected

from .requests import LATEST, Message, OllamaRequest

LINES = "application/x-ndjson"
SPACE = b" "  # JSON allows it before a value, so it keeps a connection alive
SWITCHES = ("enable_thinking", "thinking")  # variables by which chat templates turn thinking on or off
EFFORT = "reasoning_effort"  # the variable of its level
MARK = "Answerq7x"  # stands for an earlier answer
Calls = Sequence[dict[str, Any]]
Part = Callable[[str, str, Calls], dict[str, Any]]  # text, thinking and calls to fields of an answer


async def chat(request: Request) -> Response:
    return await answered(request, OllamaRequest.of_chat, message_part)


async def generate(request: Request) -> Response:
    return await answered(request, OllamaRequest.of_prompt, prompt_part)


def message_part(text: str, thinking: str, calls: Calls) -> dict[str, Any]:
    message: Message = {"role": "assistant", "content": text}
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = list(calls)
    return {"message": message}


def prompt_part(text: str, thinking: str, calls: Calls) -> dict[str, Any]:
    return {"response": text, **({"thinking": thinking} if thinking else {})}


async def answered(request: Request, read: Callable[..., OllamaRequest], part: Part) -> Response:
    service, start = Service.of(request), perf_counter()
    body, strict = await service.body(request), service.settings.strict
    wanted = await in_worker(lambda: read(body, strict=strict))  # there may be very many messages
    answer = Answer(service, wanted, part, start)
    if wanted.stream and not wanted.is_empty:
        return EventStream(
            answer.lines(), service.error, lambda error: line(ollama_error(error)), b"", waiting=SPACE, media_type=LINES
        )
    work = answer.load_or_unload() if wanted.is_empty else answer.complete()
    return json_response(await unless_disconnected(request, work))


def line(value: Any) -> bytes:
    """An object of a stream. Half a surrogate pair, which a model's call may have, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace") + b"\n"


def json_response(value: Any) -> Response:
    return Response(line(value), media_type="application/json")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt for one model."""

    prompt: list[Message] | list[int] | str
    options: dict[str, Any]
    ids: tuple[int, ...] | None = None  # of the prompt, where the answer tells them
    thinking: ThinkingReader | None = None  # reads the thinking of a reply that follows ids

    def parted(self, text: str, reasoning: str, *, ended: bool) -> tuple[str, str]:
        """The text and the thinking of a piece of the reply."""
        if self.thinking is None:
            return text, reasoning
        pieces = [self.thinking.push(text)]
        if ended:
            pieces.append(self.thinking.finish())
        return "".join(one.text for one in pieces), "".join(one.reasoning for one in pieces)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one request."""

    service: Service
    wanted: OllamaRequest
    part: Part
    start: float  # by perf_counter

    async def load_or_unload(self) -> dict[str, Any]:
        wanted = self.wanted
        if wanted.keep_alive == 0:
            await self.service.registry.unload(wanted.name)
            return {**self.head(), **self.part("", "", ()), "done": True, "done_reason": "unload"}
        async with self.model():
            return {**self.head(), **self.part("", "", ()), "done": True, "done_reason": "load"}

    async def complete(self) -> dict[str, Any]:
        """The whole answer."""
        async with self.model() as model:
            loaded, ready = perf_counter(), await in_worker(lambda: prepared(model.pair, self.wanted))
            async with self.service.generation(model, ready.prompt, ready.options, whole=True) as generation:
                result = require_text(await generation.read())
        calls = [described_call(number, call) for number, call in enumerate(result.tool_calls)]
        parts = self.part(*ready.parted(result.text, result.reasoning, ended=True), calls)
        return {**self.head(), **parts, **self.end(result, ready, loaded), **logprobs_of(result)}

    async def lines(self) -> AsyncGenerator[bytes, None]:
        """The objects of the answer. A call is sent when it is whole."""
        async with self.model() as model:
            loaded, ready = perf_counter(), await in_worker(lambda: prepared(model.pair, self.wanted))
            calls = CallsInPieces()
            async with self.service.generation(model, ready.prompt, ready.options) as generation:
                async for chunk in generation.chunks():
                    text, thinking = ready.parted(chunk.text, chunk.reasoning, ended=False)
                    found, logprobs = calls.add(chunk.tool_calls), logprobs_of(chunk)
                    if text or thinking or found or logprobs:
                        yield line({**self.head(), **self.part(text, thinking, found), "done": False, **logprobs})
                result = require_text(generation.result)
        parts = self.part(*ready.parted("", "", ended=True), calls.rest(result.tool_calls))
        yield line({**self.head(), **parts, **self.end(result, ready, loaded)})

    def model(self) -> AbstractAsyncContextManager[OpenModel]:
        return kept_model(self.service, self.wanted.model, self.wanted.keep_alive)

    def head(self) -> dict[str, Any]:
        return {"model": self.wanted.model, "created_at": rfc3339(datetime.now(UTC))}

    def end(self, result: Result, ready: Prepared, loaded: float) -> dict[str, Any]:
        """The last fields of an answer. loaded: when the model was there."""
        stats = result.stats
        out = {
            "done": True,
            "done_reason": "length" if finish_reason(result) == "length" else "stop",
            "total_duration": nanoseconds(perf_counter() - self.start),
            "load_duration": nanoseconds(loaded - self.start),
            "prompt_eval_count": stats.prompt_tokens,
            "prompt_eval_cached_count": stats.cached_tokens,
            "prompt_eval_duration": nanoseconds(stats.seconds.prefill),
            "eval_count": stats.new_tokens,
            "eval_duration": nanoseconds(stats.seconds.total - stats.time_to_first_token),
            "pard": whole(result),
        }
        return out if ready.ids is None else {**out, "context": [*ready.ids, *result.tokens]}


@asynccontextmanager
async def kept_model(service: Service, name: str, keep_alive: float | None) -> AsyncIterator[OpenModel]:
    """The model that a client names, loaded. keep_alive: how long it then stays so; None: as before."""
    async with service.model(name.removesuffix(LATEST)) as model:
        if keep_alive is not None:
            model.keep_alive = keep_alive
        yield model


def nanoseconds(seconds: float) -> int:
    """At least 1, since clients divide by it."""
    return max(1, round(seconds * 1e9))


def rfc3339(when: datetime) -> str:
    return when.isoformat().replace("+00:00", "Z")


def logprobs_of(part: Chunk | Result) -> dict[str, Any]:
    """OpenAI's objects for tokens are Ollama's, too."""
    return {"logprobs": [one.openai() for one in part.logprobs]} if part.logprobs else {}


# Prompts


def prepared(pair: Pair, wanted: OllamaRequest) -> Prepared:
    """The prompt and the options for this model. Raises ApiError, and what the library raises. Takes a while."""
    options = dict(wanted.options)
    if wanted.raw:
        return Prepared(wanted.raw, options)
    if wanted.think is not None:
        options |= thinking_options(pair, wanted, options)
    arguments, handling = options.get("template_arguments"), options.get("special_tokens", "text")

    size, bounds = pair.target_manifest.spec.vocabulary.size, pair.engine.bounds(Options(), perf_counter())

    def encoded(messages: list[Message]) -> list[int]:
        return encode(messages, pair.text, size, False, arguments, handling, bounds)

    if not wanted.tells_context:
        return Prepared(wanted.messages, options)
    if not wanted.context:
        return Prepared(wanted.messages, options, tuple(encoded(wanted.messages)))
    ids = [*wanted.context, *next_turn(pair, wanted, encoded)]
    form = reply_form(pair.text, ids, None, {})
    reader = ThinkingReader(*form.thinking.tags, form.begun) if form and form.thinking else None
    options.pop("max_reasoning_tokens", None)  # is for messages
    return Prepared(ids, options, tuple(ids), reader)


def thinking_options(pair: Pair, wanted: OllamaRequest, options: Mapping[str, Any]) -> dict[str, Any]:
    """What `think` sets. ApiError (400) for a model that cannot think."""
    thinks = thinking_of(pair.text.template, lambda tag: pair.text.token_id(tag) is not None) is not None
    if wanted.think and not thinks:
        raise bad_field("think", f'"{wanted.model}" does not support thinking')
    arguments: dict[str, Any] = dict.fromkeys(SWITCHES, bool(wanted.think))
    if isinstance(wanted.think, str):
        arguments[EFFORT] = wanted.think
    out: dict[str, Any] = {"template_arguments": arguments}
    if thinks and not wanted.think:  # some templates have no switch
        out["max_reasoning_tokens"] = options.get("max_reasoning_tokens", 0)
    return out


def next_turn(pair: Pair, wanted: OllamaRequest, encoded: Callable[[list[Message]], list[int]]) -> list[int]:
    """What the chat template writes between an earlier answer and the next one.

    A system message that the context has already is not said again.
    """
    known = pair.detokenize(wanted.context, skip_special_tokens=False)
    new = [one for one in wanted.messages if one["role"] != "system" or one["content"] not in known]
    ids = encoded([{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}, *new])
    first, last = 0, len(ids)  # the fewest ids whose text has the mark
    while first < last:
        middle = (first + last) // 2
        if MARK in pair.detokenize(ids[:middle], skip_special_tokens=False):
            last = middle
        else:
            first = middle + 1
    text = pair.detokenize(ids[:first], skip_special_tokens=False)
    if MARK not in text:
        raise bad_field("context", "context: the chat template leaves earlier answers out; use /api/chat")
    rest = text.partition(MARK)[2]  # where a token goes on after the mark
    return [*(pair.tokenize(rest, add_special_tokens=False) if rest else []), *ids[first:]]


# Calls


def described_call(number: int, call: ToolCall) -> dict[str, Any]:
    function = {"index": number, "name": call.name, "arguments": arguments_of(call.arguments) or {}}
    return {"id": call.id, "function": function}


@dataclass(slots=True)
class CallsInPieces:
    """The calls of a stream: each is given once, as soon as it is whole."""

    _open: dict[int, ToolCall] = field(default_factory=dict)
    _given: set[int] = field(default_factory=set)

    def add(self, deltas: Iterable[ToolCallDelta]) -> list[dict[str, Any]]:
        """The calls that these parts complete."""
        out: list[dict[str, Any]] = []
        for delta in deltas:
            old = self._open.get(delta.index) or ToolCall(delta.id or "", delta.name or "", "")
            call = self._open[delta.index] = replace(old, arguments=old.arguments + delta.arguments)
            if delta.arguments.rstrip().endswith("}") and arguments_of(call.arguments) is not None:
                self._given.add(delta.index)
                out.append(described_call(delta.index, call))
        return out

    def rest(self, calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
        """Those of the whole reply that were not given yet."""
        return [described_call(number, call) for number, call in enumerate(calls) if number not in self._given]
