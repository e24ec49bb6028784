"""`MessageReader`: the items of a conversation in the form of OpenAI's Responses API, as the messages of a chat."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pard_onnx.models.checks import nearest_name
from pard_onnx.models.errors import shown
from pard_onnx.serve.errors import bad_field

Item = Mapping[str, Any]
Message = dict[str, Any]
ROLES = ("user", "assistant", "system", "developer")
# The types of parts that are text, and the field that has it
PARTS = {
    "input_text": "text",
    "output_text": "text",
    "text": "text",
    "refusal": "refusal",
    "reasoning_text": "text",
    "summary_text": "text",
}


class MessageReader:
    """Reads item by item. What the model writes in one reply is several items, which become one message: its reasoning,
    its text, and its calls of tools.

    Raises ApiError (400), which names the item.
    """

    def __init__(self, before: Iterable[Message], find: Callable[[str], Item | None]) -> None:
        """before: messages that come first, which are not changed. find: an earlier output item by its id."""
        self.messages = list(before)
        self._find = find
        self._calls = {call["id"] for message in self.messages for call in message.get("tool_calls", ())}
        self._reply: Message | None = None  # the last message, if further items may belong to it

    def read(self, given: object) -> list[Message]:
        """All messages, after this input: a user's text, or a list of items."""
        if isinstance(given, str):
            given = [{"role": "user", "content": given}]
        if not isinstance(given, list) or not given:
            raise bad_field("input", f"input must be text or a list of at least one item, not {shown(given)}")
        for number, item in enumerate(given):
            self.add(f"input[{number}]", item)
        return self.messages

    def read_output(self, items: Iterable[Item]) -> list[Message]:
        """All messages, after what the model wrote."""
        for item in items:
            self.add("output", item)
        return self.messages

    def add(self, place: str, item: object) -> None:
        """The next item. place: where it stands, for messages."""
        if not isinstance(item, Mapping):
            raise bad_field("input", f"{place} must be an object, not {shown(item)}")
        kind = item.get("type")
        if kind is None:
            kind = "message" if "role" in item else "item_reference" if "id" in item else None
        read = READERS.get(kind) if isinstance(kind, str) else None
        if read is None:
            nearest = nearest_name(kind, READERS) if isinstance(kind, str) else None
            hint = f"did you mean {nearest}?" if nearest else f"known are {', '.join(READERS)}"
            raise bad_field("input", f"{place}: unknown type of item {shown(kind)}; {hint}")
        read(self, place, item)

    # The types of items

    def _message(self, place: str, item: Item) -> None:
        role = item.get("role")
        if role not in ROLES:
            hint = "; the result of a tool is an item of the type function_call_output" if role == "tool" else ""
            raise bad_field("input", f"{place}.role must be {' or '.join(map(repr, ROLES))}, not {shown(role)}{hint}")
        content = content_of(f"{place}.content", item.get("content"))
        if role != "assistant":
            self._reply = None
            self.messages.append({"role": role, "content": content})
            return
        text = joined(content)
        reply = self._reply
        reply = self._open_reply(new=reply is not None and bool(reply["content"]) and "tool_calls" not in reply)
        reply["content"] += text

    def _call(self, place: str, item: Item) -> None:
        call = {name: text_of(place, item, name) for name in ("call_id", "name", "arguments")}
        function = {"name": call["name"], "arguments": call["arguments"]}
        calls = self._open_reply().setdefault("tool_calls", [])
        calls.append({"id": call["call_id"], "type": "function", "function": function})
        self._calls.add(call["call_id"])

    def _result(self, place: str, item: Item) -> None:
        id_ = text_of(place, item, "call_id")
        if id_ not in self._calls:
            raise bad_field("input", f"{place}.call_id: no function_call before it has the call_id {shown(id_)}")
        self._reply = None
        content = content_of(f"{place}.output", item.get("output"))
        self.messages.append({"role": "tool", "tool_call_id": id_, "content": content})

    def _reasoning(self, place: str, item: Item) -> None:
        """The reasoning itself, where the item has it, and else its summary; clients may send back neither."""
        parts = item.get("content") or item.get("summary") or []
        text = joined(content_of(f"{place}.content", parts))
        if text:
            self._open_reply(new=bool(self._reply))["reasoning_content"] = text

    def _reference(self, place: str, item: Item) -> None:
        id_ = text_of(place, item, "id")
        found = self._find(id_)
        if found is None:
            raise bad_field("input", f"{place}.id: there is no item {shown(id_)} any more; send the item itself")
        self.add(place, found)

    def _open_reply(self, *, new: bool = False) -> Message:
        """The model's message that an item belongs to. new: whether it belongs to none before."""
        if self._reply is None or new:
            self._reply = {"role": "assistant", "content": ""}
            self.messages.append(self._reply)
        return self._reply


Reader = Callable[[MessageReader, str, Item], None]
READERS: dict[str, Reader] = {
    "message": MessageReader._message,
    "function_call": MessageReader._call,
    "function_call_output": MessageReader._result,
    "reasoning": MessageReader._reasoning,
    "item_reference": MessageReader._reference,
}


def text_of(place: str, item: Item, name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise bad_field("input", f"{place}.{name} must be text, not {shown(value)}")
    return value


def content_of(place: str, content: object) -> str | list[Message]:
    """Text, or parts of text as chats have them; the text alone where there is one part."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_field("input", f"{place} must be text or a list of parts, not {shown(content)}")
    texts = [part_text(f"{place}[{number}]", part) for number, part in enumerate(content)]
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]


def part_text(place: str, part: object) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str):
        raise bad_field("input", f"{place} must be an object with a type, not {shown(part)}")
    if kind not in PARTS:
        message = f"{place} is of the type {shown(kind)}, but the model reads text only; leave that part out"
        raise bad_field("input", message)
    return text_of(place, part, PARTS[kind])


def joined(content: str | list[Message]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
