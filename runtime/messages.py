"""The messages of a conversation: plain dicts of role and content, which users may edit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pard_onnx.models.errors import BadInput

from .text import Message, Text

Messages = list[dict[str, Any]]


def copied(messages: Iterable[Message]) -> Messages:
    """Their own dicts; BadInput for what is no message."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise BadInput(f"messages are a list of objects with role and content, not {type(messages).__name__}")
    out: Messages = []
    for message in messages:
        if not isinstance(message, Mapping) or not message.keys() >= {"role", "content"}:
            raise BadInput(f"a message has a role and a content, not {message!r}")
        out.append(dict(message))
    return out


def opening(text: Text, system: str | None, messages: Iterable[Message]) -> Messages:
    """What a conversation begins with, tried on the chat template; BadInput if that has no use for it."""
    out = copied(messages)
    question = {"role": "user", "content": "?"}
    if system is not None:
        out.insert(0, {"role": "system", "content": system})
    rendered = text.render([*out, question])
    if system and rendered == text.render([*out[1:], question]):
        raise BadInput("this model's chat template leaves out system messages; say it in the first message instead")
    return out
