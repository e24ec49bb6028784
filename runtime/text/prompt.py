"""Prompts: text, token ids or chat messages, which are turned into token ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from operator import index
from typing import Any, TypeVar

from pard_onnx.models.checks import common_prefix, listed, true_or_false
from pard_onnx.models.errors import BadInput, PardError, shown

from .control_tokens import TEXT
from .template import Message, require_finite
from .tokenizer import UNBOUNDED, Bounds, Text

Prompt = str | Sequence[int] | Sequence[Message]
OnePrompt = TypeVar("OnePrompt", bound=Prompt)
Continuation = str | Sequence[int]
OneContinuation = TypeVar("OneContinuation", bound=Continuation)
WANTED = "a prompt is text, token ids, or a list of messages with role and content"
CONTINUATION = "a continuation is text or token ids"
# A role is no place for a control token or a line end, which would forge a turn
ROLE = re.compile(r"[\w.-]+( [\w.-]+)*")
MOST_IDS = 1 << 24  # of a prompt; the longest contexts of models have 10 million tokens


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
    bounds: Bounds = UNBOUNDED,
    begun: str = "",
    continued: bool = False,
) -> list[int]:
    """The prompt's token ids; BadInput for anything that is not a prompt.

    size: token ids in the prompt must be below it. chat: whether a text is a user's message. template_arguments:
    further variables of the chat template. special_tokens: what becomes of those in users' messages, see `Options`;
    those of a plain prompt are always encoded. bounds: as of `Text.encode`. begun: text that follows the prompt and is
    encoded with it; the beginning of the answer in a conversation. continued: whether a conversation ends within its
    last message.
    """
    chat = true_or_false("chat", chat)
    if isinstance(prompt, str):
        if not prompt:
            raise BadInput("the prompt is empty")
        if not chat:
            return known_ids(text.encode(prompt + begun, bounds), text, size)
        items: Sequence[Any] = [{"role": "user", "content": prompt}]
        ids = text.encode_chat(items, template_arguments, special_tokens, bounds, begun, continued=continued)
        return known_ids(ids, text, size)
    if isinstance(prompt, bytes | bytearray | Mapping | Set) or not isinstance(prompt, Iterable):
        raise BadInput(f"{WANTED}, not {type(prompt).__name__}")
    items = listed(prompt, "prompt", MOST_IDS)
    if items and all(isinstance(item, Mapping) for item in items):
        messages = copy_messages(items)
        ids = text.encode_chat(messages, template_arguments, special_tokens, bounds, begun, continued=continued)
        return known_ids(ids, text, size)
    ids = [token_id(item) for item in items]
    require_ids(ids, size)
    return [*ids, *known_ids(text.tokenize(begun, add_special_tokens=False), text, size)] if begun else ids


def encode_continued(
    prompt: Prompt,
    continuation: Continuation,
    text: Text,
    size: int,
    chat: bool = False,
    template_arguments: Mapping[str, object] | None = None,
    special_tokens: str = TEXT,
) -> tuple[list[int], int]:
    """The ids of a prompt and its continuation, and the number of them before the continuation's first.

    Texts are encoded together. A token that covers the end of the prompt and the beginning of the continuation, such as
    a space and the word after it, is the continuation's. The continuation of messages is the beginning of the answer.
    A text prompt may be empty where the tokenizer adds a token before each text. Arguments and errors as of `encode`.
    """
    prompt = as_list(prompt, "prompt")

    def ids(begun: str) -> list[int]:
        if prompt == "" and not chat:
            return known_ids(text.encode(begun), text, size)
        return encode(prompt, text, size, chat, template_arguments, special_tokens, begun=begun)

    before = ids("")
    if not isinstance(continuation, str):
        items = as_list(continuation, "continuation")
        if not isinstance(items, list):
            raise BadInput(f"{CONTINUATION}, not {shown(continuation)}")
        after = [token_id(item, CONTINUATION) for item in items]
        require_ids(after, size, "continuation")
        return [*before, *after], len(before)
    if not continuation:
        raise BadInput("the continuation is empty")
    whole = ids(continuation)
    return whole, common_prefix(before, whole)


def is_several(items: object) -> bool:
    """Whether a list is one of prompts or continuations, not one itself: its first item is a text or a list."""
    first = next(iter(items), None) if isinstance(items, Sequence) and not isinstance(items, str) else None
    if isinstance(first, str):
        return True
    if isinstance(first, bytes | bytearray | Mapping | Set) or not isinstance(first, Iterable):
        return False
    try:
        index(first)  # type: ignore[arg-type]
    except TypeError:
        return True
    return False  # an array without dimensions is a number


def as_list(value: Any, name: str) -> Any:
    """An iterable as a list, which can be read more than once; texts, mappings and what cannot be iterated as it is.

    name: of the argument, for the BadInput of an iterator without end.
    """
    single = isinstance(value, str | bytes | bytearray | Mapping | Set) or not isinstance(value, Iterable)
    return value if single else listed(value, name, MOST_IDS)


def paired(prompt: object, continuation: object) -> tuple[list[tuple[Any, Any]], bool]:
    """Prompts with their continuations, and whether there is a list of them; each argument is one or several.

    BadInput for several of both that are not equally many.
    """
    sides = [as_list(prompt, "prompt"), as_list(continuation, "continuation")]
    several = [is_several(side) for side in sides]
    counts = [len(side) for side, is_list in zip(sides, several, strict=True) if is_list]
    if len(set(counts)) > 1:
        raise BadInput(f"{counts[0]} prompts but {counts[1]} continuations; give one, or as many")
    columns = [
        side if is_list else [side] * max(counts, default=1) for side, is_list in zip(sides, several, strict=True)
    ]
    return list(zip(*columns, strict=True)), any(several)


@contextmanager
def naming(kind: str, number: int) -> Iterator[None]:
    """A context in which errors name one item of a list, by its index."""
    try:
        yield
    except PardError as error:
        raise type(error)(f"{kind}[{number}]: {error}") from error


def token_id(item: object, wanted: str = WANTED) -> int:
    """A token id of a prompt as an int; BadInput for anything else, bool included. wanted: what was asked for."""
    if not isinstance(item, bool):
        with suppress(TypeError):
            return index(item)  # type: ignore[arg-type]
    raise BadInput(f"{wanted}; {shown(item)} is none of these")


def require_ids(ids: Sequence[int], size: int, place: str = "prompt") -> None:
    """BadInput for the first id that is not below `size`; place: where the ids stand."""
    if ids and not (min(ids) >= 0 and max(ids) < size):
        token = next(token for token in ids if not 0 <= token < size)
        raise BadInput(f"token id {shown(token)} in the {place}; the model has ids 0 to {size - 1}")


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


def copy_messages(messages: Iterable[Message]) -> Messages:
    """Copies of the messages; BadInput for an object that is not a message."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise BadInput(f"messages are a list of objects with role and content, not {type(messages).__name__}")
    out: Messages = []
    for message in listed(messages, "messages"):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadInput(f"a message has a role and mostly a content, not {shown(message)}")
        if isinstance(message.get("content"), bytes | bytearray):
            raise BadInput(f"the content of a message is text, not {shown(message['content'])}; decode it")
        if not ROLE.fullmatch(message["role"]):
            raise BadInput(f"the role of a message is a word such as user or tool, not {shown(message['role'])}")
        require_finite(message, "a message")
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
