"""The key of a conversation: requests with the same key go to the same replica, which has their KV cache entries."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from pard_onnx.serve.body import parsed
from pard_onnx.serve.errors import ApiError

SESSION_HEADER = "x-session-id"  # Ray's own name of it
OPENING = 256  # characters of a prompt without messages that count
FIRST = ("model", "system", "instructions")  # what stands before all messages, in the forms of several APIs
TEXTS = ("prompt", "input", "content")
RESPONSES = "/v1/responses"
RESPONSE_ID = re.compile(rb'"id": ?"(resp[-_][\w-]{1,100})"')
MOST_RESPONSES = 20_000  # whose keys are remembered


class ResponseKeys:
    """The keys of responses that replicas have stored, so that `previous_response_id` leads to the same replica."""

    def __init__(self) -> None:
        self._keys: OrderedDict[str, str] = OrderedDict()

    def add(self, data: bytes, key: str) -> bool:
        """Remember the response whose id is in the data, the beginning of an answer; whether there is one."""
        found = RESPONSE_ID.search(data)
        if found:
            self._keys[found[1].decode()] = key
            if len(self._keys) > MOST_RESPONSES:
                self._keys.popitem(last=False)
        return found is not None

    def of_path(self, path: str) -> str:
        """The key of the stored response that the path names; empty for other paths and unknown ones."""
        return self.of(path.removeprefix(RESPONSES + "/")) if path.startswith(RESPONSES + "/") else ""

    def of(self, id_: object) -> str:
        return self._keys.get(id_, "") if isinstance(id_, str) else ""


def conversation_key(headers: Mapping[str, str], body: bytes, responses: ResponseKeys) -> str:
    """What all requests of a conversation have in common; empty for requests that may go to any replica.

    Clients may name it: in the header `x-session-id`, or in OpenAI's field `prompt_cache_key`. Otherwise it is that of
    the previous response, or the beginning of the conversation.
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
    if isinstance(named, str) and named:
        return named
    return responses.of(value.get("previous_response_id")) or opening_key(value)


def opening_key(body: Mapping[str, Any]) -> str:
    """A hash of the model, the system prompt and the messages up to the user's first one, which later turns repeat.

    Of a prompt without messages it is that of the first characters.
    """
    opening: Any = messages_of(body)
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
