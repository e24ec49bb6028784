"""What a generation goes on from: text, token ids or chat messages, as token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any

from pard_onnx.models.errors import BadInput

from .text import Message, Text

Prompt = str | Sequence[int] | Sequence[Message]
WANTED = "a prompt is text, token ids, or a list of messages with role and content"


def encode(prompt: Prompt, text: Text, size: int, *, chat: bool = False) -> list[int]:
    """The prompt's ids, each below `size`; chat: a text is a user's message. BadInput for anything else."""
    if isinstance(prompt, str):
        if not prompt:
            raise BadInput("the prompt is empty")
        ids = text.encode_chat([{"role": "user", "content": prompt}]) if chat else text.encode(prompt)
        return known_ids(ids, size)
    if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
        raise BadInput(f"{WANTED}, not {type(prompt).__name__}")
    items: Sequence[Any] = list(prompt)
    if items and all(isinstance(item, Mapping) for item in items):
        return known_ids(text.encode_chat(items), size)
    try:
        ids = [index(item) for item in items]
    except TypeError:
        raise BadInput(WANTED) from None
    for token in ids:
        if not 0 <= token < size:
            raise BadInput(f"token id {token} in the prompt; the tokenizer has ids 0 to {size - 1}")
    return ids


def known_ids(ids: list[int], size: int) -> list[int]:
    """A text's ids. A tokenizer that other models share may have some that the model has no row for."""
    foreign = next((token for token in ids if token >= size), None)
    if foreign is not None:
        raise BadInput(
            f"the prompt's text has token id {foreign}; the model has ids 0 to {size - 1}: leave that text out"
        )
    return ids
