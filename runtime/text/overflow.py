"""Conversations that are too long for a model: whole turns are dropped until there is room for the reply.

A turn is a user's message and all that follows it up to the next user's message: the reply, its tool calls and their
results. So roles alternate as before, and no result of a tool loses its call. Messages of the system or developer stay
where they are, and so does the last turn, which is to be answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from pard_onnx.models.checks import listed
from pard_onnx.models.errors import BadInput, TooLong, shown

from .control_tokens import DEVELOPERS
from .prompt import Messages, copy_messages

# What becomes of a conversation that is too long: it is refused, or turns are dropped: the oldest ones, or those after
# the first turn
Overflow = Literal["error", "drop-oldest", "drop-middle"]
OVERFLOWS: tuple[str, ...] = get_args(Overflow)
ERROR, DROP_OLDEST, DROP_MIDDLE = OVERFLOWS
LARGEST_ROOM = 4  # the room for a reply is at most this part of the capacity, whatever max_new_tokens is
USER = "user"


def checked_overflow(value: object) -> str:
    """The user's `overflow`; BadInput for an unknown one."""
    if not isinstance(value, str) or value not in OVERFLOWS:
        raise BadInput(f"overflow must be one of {', '.join(map(repr, OVERFLOWS))}, not {shown(value)}")
    return str(value)


def room_for_reply(capacity: int, max_new_tokens: int) -> int:
    """The tokens that are kept free for a reply: max_new_tokens, but at most a quarter of the capacity."""
    return max(1, min(max_new_tokens, capacity // LARGEST_ROOM))


def require_messages(prompt: object, overflow: str) -> Messages:
    """The messages of a prompt from which turns may be dropped; BadInput for any other prompt."""
    items = [] if isinstance(prompt, str) or not isinstance(prompt, Iterable) else listed(prompt, "prompt")
    if not items or not all(isinstance(item, Mapping) for item in items):
        raise BadInput(
            f"overflow={overflow!r} drops whole turns of a conversation, but the prompt is no list of messages; leave "
            "overflow out, or give messages"
        )
    return copy_messages(items)


@dataclass(frozen=True, slots=True)
class Fitted:
    """A conversation that fits."""

    ids: list[int]
    dropped: int = 0  # messages that are not in `ids`


def fit(
    messages: Messages,
    overflow: str,
    encode: Callable[[Messages], list[int]],
    capacity: int,
    room: int,
    longer: str = "",
) -> Fitted:
    """The conversation's ids, with as few turns dropped as leave so much room; all that may be dropped if none do.

    encode: gives the ids of messages; it raises BadInput for messages that the chat template refuses, and such a choice
    of turns is not taken. longer: how to get a larger capacity, as part of a sentence.

    Raises TooLong where not even one token is left for the reply; what `encode` raises for all messages.
    """
    whole = Fitted(encode(messages))
    if overflow == ERROR or len(whole.ids) <= capacity - room:
        return whole
    choices = droppable(messages, overflow)

    def without(turns: int) -> Fitted | None:
        """The conversation without so many turns; None if the template refuses it."""
        left_out = {place for turn in choices[:turns] for place in turn}
        try:
            ids = encode([message for place, message in enumerate(messages) if place not in left_out])
        except BadInput:
            return None
        return Fitted(ids, len(left_out))

    shortest = fewest(without, len(choices), capacity - room) or whole
    if len(shortest.ids) >= capacity:
        raise TooLong(
            f"the conversation has {len(shortest.ids)} tokens after all that overflow={overflow!r} may drop "
            f"({shortest.dropped} messages), but the capacity is {capacity} with at least one of them new; shorten the "
            f"last turn or the system message{longer and f', or {longer}'}"
        )
    return shortest


def fewest(without: Callable[[int], Fitted | None], most: int, limit: int) -> Fitted | None:
    """The conversation without as few turns as make it fit the limit; else the shortest one; None if all are refused.

    The more turns are dropped, the shorter is the text, so the number is found by halving. Where the template refuses a
    choice, which breaks that order, all numbers are tried.
    """
    low, high, found = 1, most, None
    refused = False
    while low <= high:
        middle = (low + high) // 2
        candidate = without(middle)
        if candidate is None:
            refused = True
            break
        if len(candidate.ids) <= limit:
            found, high = candidate, middle - 1
        else:
            low = middle + 1
    if found is None or refused:
        tried = [candidate for turns in range(1, most + 1) if (candidate := without(turns))] if refused else []
        fitting = [candidate for candidate in tried if len(candidate.ids) <= limit]
        last = None if refused or not most else without(most)
        shortest = min(tried, key=lambda one: len(one.ids), default=last)
        return fitting[0] if fitting else shortest
    return found


def droppable(messages: Messages, overflow: str) -> list[list[int]]:
    """The turns that may be dropped, in the order in which they are: the places of their messages."""
    turns = turns_of(messages)[:-1]
    return turns[1:] if overflow == DROP_MIDDLE else turns


def turns_of(messages: Messages) -> list[list[int]]:
    """The places of each turn's messages, without those of the system. What stands before the first user's message,
    such as a greeting, belongs to the first turn."""
    turns: list[list[int]] = []
    asked = False
    for place, message in enumerate(messages):
        role = message["role"]
        if role in DEVELOPERS:
            continue
        if not turns or (role == USER and asked):
            turns.append([])
        asked = asked or role == USER
        turns[-1].append(place)
    return turns
