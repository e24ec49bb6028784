"""`Output`: the output items of a response in the form of OpenAI's Responses API, and the events that tell of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

from pard_onnx.runtime.result import Chunk
from pard_onnx.runtime.text.tool_calls import ToolCallDelta

Item = dict[str, Any]
Event = tuple[str, dict[str, Any]]  # its type, and its fields without the type and sequence_number
DONE, OPEN, CUT = "completed", "in_progress", "incomplete"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of items that have text."""

    prefix: str  # of ids
    fields: Mapping[str, Any]  # of the item, beside id, status and content
    part: Mapping[str, Any]  # its only part, without the text
    events: str  # what the names of its events begin with


MESSAGE = Kind(
    "msg",
    {"type": "message", "role": "assistant"},
    {"type": "output_text", "annotations": [], "logprobs": []},
    "response.output_text",
)
REASONING = Kind("rs", {"type": "reasoning", "summary": []}, {"type": "reasoning_text"}, "response.reasoning_text")


@dataclass(slots=True)
class OpenItem:
    """The last item, which still grows."""

    item: Item  # what is known of it; its text is in `texts`
    texts: list[str]
    kind: Kind | None = None  # None: a call
    call: int = 0  # the call's index in the reply
    logprobs: list[Any] | None = None  # of a message, if they were asked for


class Output:
    """Takes the chunks of a reply, in order. The items follow each other as the model wrote them."""

    def __init__(self, *, with_logprobs: bool = False) -> None:
        self.items: list[Item] = []  # those that are complete
        self._open: OpenItem | None = None
        self._with_logprobs = with_logprobs
        self._pending: list[Any] = []  # log probabilities of tokens whose text has not come yet
        self._thought = 0  # tokens before the answer
        self._answering = self._reasoned = False

    @property
    def reasoning_tokens(self) -> int:
        """Tokens before the answer of a reply that begins with reasoning, its tags included."""
        return self._thought if self._reasoned else 0

    def add(self, chunk: Chunk) -> Iterator[Event]:
        """What a chunk adds. Text that comes with a call in one chunk is taken to be before it, unless the call is one
        that goes on."""
        self._count(chunk)
        if self._with_logprobs:
            self._score(chunk)
        if chunk.reasoning:
            self._reasoned = True
            yield from self._text(REASONING, chunk.reasoning)
        calls = [*chunk.tool_calls]
        while calls and self._goes_on(calls[0]):
            yield from self._call(calls.pop(0))
        if chunk.text:
            yield from self._text(MESSAGE, chunk.text)
        for call in calls:
            yield from self._call(call)

    def finish(self, *, complete: bool) -> Iterator[Event]:
        """The end of the reply. complete: whether the model ended it. A reply without anything has an empty message."""
        status = DONE if complete else CUT
        if self._pending and self._open and self._open.kind is MESSAGE:
            yield self._delta("")
        if complete and self._open and self._open.kind is REASONING:
            yield from self._close()
        if self._open is None and (complete or not self.items):
            yield from self._begin_text(MESSAGE)
        yield from self._close(status)

    def _count(self, chunk: Chunk) -> None:
        if self._answering:
            return
        before = next((place for place, piece in enumerate(chunk.pieces) if piece), len(chunk.tokens))
        self._thought += min(before, len(chunk.tokens))
        self._answering = bool(chunk.text or chunk.tool_calls)

    def _score(self, chunk: Chunk) -> None:
        """Keep the log probabilities of the message's tokens. One may complete no text, as a part of a character does;
        beside reasoning and calls, such tokens are their tags."""
        if chunk.reasoning or chunk.tool_calls:
            self._pending.clear()
        beside = self._open is not None and self._open.kind is not MESSAGE
        mixed = beside or bool(chunk.reasoning or chunk.tool_calls)
        both = zip(chunk.logprobs or (), chunk.pieces, strict=False)
        self._pending += [one.openai() for one, piece in both if piece or not mixed]

    # Items with text

    def _text(self, kind: Kind, text: str) -> Iterator[Event]:
        if self._open is None or self._open.kind is not kind:
            yield from self._close()
            yield from self._begin_text(kind)
        yield self._delta(text)

    def _begin_text(self, kind: Kind) -> Iterator[Event]:
        item = {"id": f"{kind.prefix}_{token_hex(24)}", **kind.fields, "status": OPEN, "content": []}
        self._open = OpenItem(item, [], kind, logprobs=[])
        yield self._event("response.output_item.added", item=dict(item))
        yield self._part("response.content_part.added", {**kind.part, "text": ""})

    def _delta(self, text: str) -> Event:
        found = self._open
        assert found is not None and found.kind is not None and found.logprobs is not None
        found.texts.append(text)
        more: dict[str, Any] = {}
        if found.kind is MESSAGE:
            more["logprobs"], self._pending = self._pending, []
            found.logprobs += more["logprobs"]
        return self._of_item(f"{found.kind.events}.delta", content_index=0, delta=text, **more)

    def _part(self, name: str, part: Mapping[str, Any]) -> Event:
        return self._of_item(name, content_index=0, part=dict(part))

    # Calls

    def _goes_on(self, delta: ToolCallDelta) -> bool:
        found = self._open
        return delta.id is None and found is not None and found.kind is None and found.call == delta.index

    def _call(self, delta: ToolCallDelta) -> Iterator[Event]:
        if not self._goes_on(delta):
            yield from self._close()
            item = {"id": f"fc_{token_hex(24)}", "type": "function_call", "status": OPEN, "call_id": delta.id}
            item |= {"name": delta.name, "arguments": ""}
            self._open = OpenItem(item, [], call=delta.index)
            yield self._event("response.output_item.added", item=dict(item))
        if delta.arguments and self._open:
            self._open.texts.append(delta.arguments)
            yield self._of_item("response.function_call_arguments.delta", delta=delta.arguments)

    # Of all items

    def _close(self, status: str = DONE) -> Iterator[Event]:
        found = self._open
        if found is None:
            return
        text, item = "".join(found.texts), {**found.item, "status": status}
        if found.kind is None:
            item["arguments"] = text
            yield self._of_item("response.function_call_arguments.done", arguments=text)
        else:
            logprobs = {"logprobs": found.logprobs} if found.kind is MESSAGE else {}
            part = {**found.kind.part, "text": text, **logprobs}
            item["content"] = [part]
            yield self._of_item(f"{found.kind.events}.done", content_index=0, text=text, **logprobs)
            yield self._part("response.content_part.done", part)
        yield self._event("response.output_item.done", item=item)
        self.items.append(item)
        self._open = None

    def _of_item(self, name: str, /, **more: Any) -> Event:
        assert self._open is not None
        return self._event(name, item_id=self._open.item["id"], **more)

    def _event(self, name: str, /, **more: Any) -> Event:
        return name, {"output_index": len(self.items), **more}
