"""Conversations and tools in Anthropic's form, as the library takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pard_onnx.models.errors import BadInput, shown
from pard_onnx.runtime.text.template import require_finite
from pard_onnx.serve.fields import a_list, an_object, text

Message = dict[str, Any]
Block = dict[str, Any]
ROLES = ("user", "assistant", "system")
OWN_TOOL = "custom"  # the type of a tool that the client describes and runs


@dataclass(slots=True)
class Turn:
    """What one role says, in one message or in several that follow each other."""

    role: str
    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)

    def as_message(self) -> Message:
        """The message in OpenAI's form. Several texts stay parts, which the chat template may read one by one."""
        parts = [{"type": "text", "text": one} for one in self.texts]
        content: Any = parts if len(parts) > 1 else self.texts[0] if parts else None if self.calls else ""
        message: Message = {"role": self.role, "content": content}
        if self.thoughts:
            message["reasoning_content"] = "\n\n".join(self.thoughts)
        if self.calls:
            message["tool_calls"] = self.calls
        return message


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as the library takes them."""

    messages: list[Message]
    continued: bool  # whether the last one is the beginning of the reply


def conversation(system: Any, messages: list[Any]) -> Conversation:
    """The conversation of a request. BadInput names the message and the block.

    As in Anthropic's API, messages of one role that follow each other are one turn, and an assistant's message at the
    end is the beginning of the reply.
    """
    reader = Reader()
    if system is not None:
        reader.add_texts("system", "system", system)
    for number, message in enumerate(messages):
        reader.add(f"messages[{number}]", message)
    return reader.conversation()


class Reader:
    """Reads the messages of one conversation."""

    def __init__(self) -> None:
        self._out: list[Turn | Message] = []  # results of tools are messages
        self._tools: dict[str, str] = {}  # the names of tools, by the ids of their calls

    def add(self, place: str, message: Any) -> None:
        """place: where the message stands, for errors."""
        role, content = an_object(place, message).get("role"), message.get("content")
        if role not in ROLES:
            raise BadInput(f"{place}.role must be {' or '.join(map(repr, ROLES[:2]))}, not {shown(role)}")
        if role == "system":
            self.add_texts(f"{place}.content", role, content)
            return
        blocks = blocks_of(f"{place}.content", content)
        if role == "user":
            self._add_user(blocks)
        else:
            self._add_assistant(blocks)

    def add_texts(self, place: str, role: str, content: Any) -> None:
        """A text, or blocks of text."""
        self._turn(role, [block_text(where, block) for where, block in blocks_of(place, content)])

    def conversation(self) -> Conversation:
        """What was read. BadInput for an end that no reply can follow."""
        last = self._out[-1] if self._out else None
        continued = False
        if isinstance(last, Turn) and last.role == "assistant":
            if last.calls:
                raise BadInput("messages: the last message calls tools; give their results in tool_result blocks")
            last.texts = ["".join(last.texts)]
            continued = bool(last.texts[0])
            if not continued and last.thoughts:
                raise BadInput("messages: the last message has thinking and no text to continue; leave it out")
            if not continued:
                self._out.pop()
        if not any(isinstance(one, dict) or one.role != "system" for one in self._out):
            raise BadInput("messages: give at least one message of the user")
        return Conversation([one if isinstance(one, dict) else one.as_message() for one in self._out], continued)

    def _add_user(self, blocks: Sequence[tuple[str, Block]]) -> None:
        """Results of tools come before what the user says beside them: they answer the message before."""
        for place, block in blocks:
            if block["type"] == "tool_result":
                self._out.append(self._result(place, block))
        said = [block_text(place, block) for place, block in blocks if block["type"] != "tool_result"]
        if said or not blocks:
            self._turn("user", said)

    def _add_assistant(self, blocks: Sequence[tuple[str, Block]]) -> None:
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[dict[str, Any]] = []
        for place, block in blocks:
            if block["type"] == "tool_use":
                calls.append(self._call(place, block))
            elif block["type"] == "thinking":
                thoughts.append(text(f"{place}.thinking", block.get("thinking")))
            elif block["type"] != "redacted_thinking":  # of another server, and encrypted
                texts.append(block_text(place, block))
        turn = self._turn("assistant", texts)
        turn.thoughts += [thought for thought in thoughts if thought]
        turn.calls += calls

    def _turn(self, role: str, texts: list[str]) -> Turn:
        """The turn that these texts belong to."""
        last = self._out[-1] if self._out else None
        if not isinstance(last, Turn) or last.role != role:
            last = Turn(role)
            self._out.append(last)
        elif last.texts and texts:
            last.texts[-1] += "\n\n"
        last.texts += texts
        return last

    def _call(self, place: str, block: Block) -> dict[str, Any]:
        id_, name = text(f"{place}.id", block.get("id")), text(f"{place}.name", block.get("name"))
        arguments = an_object(f"{place}.input", block.get("input"))
        require_finite(arguments, f"{place}.input")
        self._tools[id_] = name
        written = json.dumps(arguments, ensure_ascii=False)
        return {"id": id_, "type": "function", "function": {"name": name, "arguments": written}}

    def _result(self, place: str, block: Block) -> Message:
        id_, content = text(f"{place}.tool_use_id", block.get("tool_use_id")), block.get("content")
        if id_ not in self._tools:
            raise BadInput(f"{place}.tool_use_id {shown(id_)}: no tool_use block before it has this id")
        parts = [] if content is None else blocks_of(f"{place}.content", content)
        found = "\n".join(block_text(where, one) for where, one in parts)
        failed = block.get("is_error")
        if failed is not None and not isinstance(failed, bool):
            raise BadInput(f"{place}.is_error must be true or false, not {shown(failed)}")
        if failed and not found.lower().startswith("error"):  # no chat template has a field for it
            found = f"Error: {found}" if found else "Error"
        return {"role": "tool", "tool_call_id": id_, "name": self._tools[id_], "content": found}


def blocks_of(place: str, content: Any) -> list[tuple[str, Block]]:
    """The blocks of a content, which may be a text, with the place of each."""
    if isinstance(content, str):
        return [(place, {"type": "text", "text": content})]
    if not isinstance(content, list):
        raise BadInput(f"{place} must be text or a list of blocks, not {shown(content)}")
    out: list[tuple[str, Block]] = []
    for number, block in enumerate(content):
        where = f"{place}[{number}]"
        text(f"{where}.type", an_object(where, block).get("type"))
        out.append((where, block))
    return out


def block_text(place: str, block: Block) -> str:
    if block["type"] != "text":
        raise BadInput(
            f"{place}: a block of the type {shown(block['type'])} cannot stand here, the model reads text; leave it out"
        )
    return text(f"{place}.text", block.get("text"))


def tools_of(name: str, value: Any) -> list[dict[str, Any]]:
    """The tools in OpenAI's form. BadInput for those that Anthropic's servers run, or its models were trained on."""
    out: list[dict[str, Any]] = []
    for number, tool in enumerate(a_list(name, value)):
        place = f"{name}[{number}]"
        kind = an_object(place, tool).get("type")
        if kind not in (None, OWN_TOOL):
            raise BadInput(
                f"{place}: {shown(kind)} is a tool of Anthropic's own; describe a tool of yours, with a name and an "
                "input_schema, and run it"
            )
        function: dict[str, Any] = {"name": text(f"{place}.name", tool.get("name"))}
        if tool.get("description") is not None:
            function["description"] = text(f"{place}.description", tool["description"])
        function["parameters"] = an_object(f"{place}.input_schema", tool.get("input_schema"))
        out.append({"type": "function", "function": function})
    return out
