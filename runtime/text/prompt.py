"""Prompts: text, token ids or chat messages, which are turned into token ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from operator import index
from typing import Any

from pard_onnx.models.checks import listed, true_or_false
from pard_onnx.models.errors import BadInput, shown

from .control_tokens import TEXT
from .template import Message
from .tokenizer import Text

Prompt = str | Sequence[int] | Sequence[Message]
WANTED = "a prompt is text, token ids, or a list of messages with role and content"
# A role is no place for a control token or a line end, which would forge a turn
ROLE = re.compile(r"[\w.-]+( [\w.-]+)*")
DEEPEST = 64  # levels of lists and objects in a message


def as_list(value: Any) -> Any:
    """An iterable as a list, which can be read more than once; texts, mappings and what cannot be iterated as it is."""
    single = isinstance(value, str | bytes | bytearray | Mapping | Set) or not isinstance(value, Iterable)
    return value if single else listed(value)


def is_chat(prompt: object, chat: bool) -> bool:
    """Whether the chat template is applied to this prompt."""
    if isinstance(prompt, str):
        return chat
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], Mapping)


def encode(
    prompt: Prompt,
    text: Text,
    size: int,
    chat: bool = False,
    template_arguments: Mapping[str, object] | None = None,
    special_tokens: str = TEXT,
) -> list[int]:
    """The prompt's token ids; BadInput for anything that is not a prompt.

    size: token ids in the prompt must be below it. chat: whether a text is a user's message. template_arguments:
    further variables of the chat template. special_tokens: what becomes of those in users' messages, see `Options`;
    those of a plain prompt are always encoded.
    """
    chat = true_or_false("chat", chat)
    if isinstance(prompt, str):
        if not prompt:
            raise BadInput("the prompt is empty")
        if not chat:
            return known_ids(text.encode(prompt), text, size)
        question = [{"role": "user", "content": prompt}]
        return known_ids(text.encode_chat(question, template_arguments, special_tokens), text, size)
    if isinstance(prompt, bytes | bytearray | Mapping | Set) or not isinstance(prompt, Iterable):
        raise BadInput(f"{WANTED}, not {type(prompt).__name__}")
    items: Sequence[Any] = listed(prompt)
    if items and all(isinstance(item, Mapping) for item in items):
        return known_ids(text.encode_chat(copy_messages(items), template_arguments, special_tokens), text, size)
    ids = [token_id(item) for item in items]
    require_ids(ids, size)
    return ids


def token_id(item: object) -> int:
    """A token id of a prompt as an int; BadInput for anything else, bool included."""
    if not isinstance(item, bool):
        with suppress(TypeError):
            return index(item)  # type: ignore[arg-type]
    raise BadInput(f"{WANTED}; {shown(item)} is none of these")


def require_ids(ids: Sequence[int], size: int) -> None:
    """BadInput for the first id that is not below `size`."""
    if ids and not (min(ids) >= 0 and max(ids) < size):
        token = next(token for token in ids if not 0 <= token < size)
        raise BadInput(f"token id {shown(token)} in the prompt; the model has ids 0 to {size - 1}")


def known_ids(ids: list[int], text: Text, size: int) -> list[int]:
    """A text's ids. A tokenizer may have tokens that the model has no row for: one that was added for padding, or one
    of other models of the family."""
    foreign = next((token for token in ids if token >= size), None)
    if foreign is not None:
        raise BadInput(
            f"the prompt has the token {shown(text.token(foreign))} (id {foreign}), but the model has ids 0 to "
            f"{size - 1}; leave that text out"
        )
    return ids


Messages = list[dict[str, Any]]


def require_shallow(value: object, depth: int = DEEPEST) -> None:
    """BadInput for a value that is nested too deep, as one that contains itself is."""
    if not depth:
        raise BadInput(f"a message is nested more than {DEEPEST} levels deep, or contains itself")
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            require_shallow(item, depth - 1)


def copy_messages(messages: Iterable[Message]) -> Messages:
    """Copies of the messages; BadInput for an object that is not a message."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise BadInput(f"messages are a list of objects with role and content, not {type(messages).__name__}")
    out: Messages = []
    for message in listed(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadInput(f"a message has a role and mostly a content, not {shown(message)}")
        if isinstance(message.get("content"), bytes | bytearray):
            raise BadInput(f"the content of a message is text, not {shown(message['content'])}; decode it")
        if not ROLE.fullmatch(message["role"]):
            raise BadInput(f"the role of a message is a word such as user or tool, not {shown(message['role'])}")
        require_shallow(message)
        out.append(dict(message))
    return out


def opening_messages(
    text: Text, system: str | None, messages: Iterable[Message], arguments: Mapping[str, object] | None = None
) -> Messages:
    """The first messages of a conversation; BadInput if the template refuses them, or ignores the system message."""
    if not isinstance(system, str | None):
        raise BadInput(f"system must be text or None, not {shown(system)}")
    out = copy_messages(messages)
    question = {"role": "user", "content": "?"}
    if system is not None:
        out.insert(0, {"role": "system", "content": system})
    rendered = text.render([*out, question], arguments)
    if system and rendered == text.render([*out[1:], question], arguments):
        raise BadInput("this model's chat template leaves out system messages; say it in the first message instead")
    return out
