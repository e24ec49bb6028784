"""The key of a conversation: requests with the same key go to the same replica, which has their KV cache entries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from pard_onnx.serve.body import parsed
from pard_onnx.serve.errors import ApiError

SESSION_HEADER = "x-session-id"  # Ray's own name of it
OPENING = 256  # characters of a prompt without messages that count
FIRST = ("model", "system", "instructions")  # what stands before all messages, in the forms of several APIs
TEXTS = ("prompt", "input", "content")


def conversation_key(headers: Mapping[str, str], body: bytes) -> str:
    """What all requests of a conversation have in common; empty for requests that may go to any replica.

    Clients may name it: in the header `x-session-id`, or in OpenAI's field `prompt_cache_key`. Otherwise it is the
    beginning of the conversation.
    """
    if named := headers.get(SESSION_HEADER):
        return named
    if not body:
        return ""
    try:
        value = parsed(body)
    except ApiError:  # the replica says what is wrong
        return ""
    if not isinstance(value, dict):
        return ""
    named = value.get("prompt_cache_key")
    return named if isinstance(named, str) and named else opening_key(value)


def opening_key(body: Mapping[str, Any]) -> str:
    """A hash of the model, the system prompt and the messages up to the user's first one, which later turns repeat.

    Of a prompt without messages it is that of the first characters.
    """
    opening = messages_of(body)
    if opening is None:
        given = next((body[name] for name in TEXTS if body.get(name)), None)
        if given is None:
            return ""
        opening = (given if isinstance(given, str) else json.dumps(given))[:OPENING]
    first = [body.get(name) for name in FIRST]
    return sha256(json.dumps([first, opening], sort_keys=True).encode()).hexdigest()


def messages_of(body: Mapping[str, Any]) -> list[Any] | None:
    """Roles and contents up to the first message of the user; None for a request without messages."""
    given = body.get("messages") or body.get("input")
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        return None
    out: list[Any] = []
    for message in given:
        out.append((message.get("role"), message.get("content")))
        if message.get("role") == "user":
            break
    return out
