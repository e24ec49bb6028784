"""Conversations that are too long: which turns are dropped, and that what stays is a conversation."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pard_onnx import BadInput, Pair, TooLong, load
from pard_onnx.runtime.text.overflow import Fitted, fewest, fit, room_for_reply, turns_of

ROWS = 256 + 64
Messages = list[dict[str, Any]]


@pytest.fixture(scope="module")
def pair(write_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with load(write_artifact(tmp_path_factory.mktemp("toy"), "target", kv_rows=ROWS), threads=1) as opened:
        yield opened


def turn(number: int, words: int = 8) -> Messages:
    text = f"{number} " + "fox " * words
    return [{"role": "user", "content": text}, {"role": "assistant", "content": text}]


SYSTEM = {"role": "system", "content": "be brief"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
TOOL = {"role": "tool", "content": "42"}


def as_words(messages: Messages) -> list[int]:
    return [1] * sum(len(str(message["content"]).split()) + 1 for message in messages)


def kept(messages: Messages, overflow: str, capacity: int, room: int = 1) -> tuple[Messages, int]:
    """The messages that were encoded last for the result, and how many were dropped."""
    seen: dict[int, Messages] = {}

    def encode(chosen: Messages) -> list[int]:
        ids = as_words(chosen)
        seen[id(ids)] = chosen
        kept_alive.append(ids)
        return ids

    kept_alive: list[list[int]] = []
    fitted = fit(messages, overflow, encode, capacity, room)
    return seen[id(fitted.ids)], fitted.dropped


roles = st.sampled_from([["user"], ["user", "assistant"], ["user", "call", "tool", "assistant"], ["user", "tool"]])


@given(
    turns=st.lists(st.tuples(roles, st.integers(0, 9)), min_size=1, max_size=9),
    system=st.booleans(),
    greeting=st.booleans(),
    overflow=st.sampled_from(["drop-oldest", "drop-middle"]),
    capacity=st.integers(2, 120),
    room=st.integers(1, 30),
)
def test_what_stays_is_a_conversation(
    turns: list[tuple[list[str], int]], system: bool, greeting: bool, overflow: str, capacity: int, room: int
) -> None:
    made = [[{"role": role, "content": f"{n} " + "w " * words} for role in kinds] for n, (kinds, words) in
            enumerate(turns)]  # fmt: skip
    head = [SYSTEM] * system + [{"role": "assistant", "content": "hello"}] * greeting
    messages: Messages = [*head, *(message for turn in made for message in turn)]
    try:
        found, dropped = kept(messages, overflow, capacity, room)
    except TooLong:
        least = [SYSTEM] * system + (made[-1] if overflow == "drop-oldest" or len(made) == 1 else made[0] + made[-1])
        if len(made) == 1 or overflow == "drop-middle":
            least += head[system:]
        assert len(as_words(least)) >= capacity
        return
    assert dropped == len(messages) - len(found)
    assert [message for message in messages if message in found] == found  # in their order
    assert (SYSTEM in found) == system
    assert found[-len(made[-1]) :] == made[-1]  # the turn that is to be answered stays whole
    for one in made:
        assert all(message in found for message in one) or not any(message in found for message in one)
    if overflow == "drop-middle":
        assert all(message in found for message in made[0])
    gone = [n for n, one in enumerate(made) if one[0] not in found]
    assert gone == list(range(overflow == "drop-middle", (overflow == "drop-middle") + len(gone)))  # the oldest ones
    if gone and len(as_words(found)) <= capacity - room:  # no more than is needed
        back = [message for message in messages if message in found or message in made[gone[-1]]]
        back = back if len(gone) > 1 or overflow == "drop-middle" else [*head[system:], *back]
        assert len(as_words(back)) > capacity - room


def test_turns() -> None:
    user, reply = {"role": "user"}, {"role": "assistant"}
    assert turns_of([SYSTEM, user, CALL, TOOL, reply, user, reply, user]) == [[1, 2, 3, 4], [5, 6], [7]]
    assert turns_of([reply, user, reply, SYSTEM, user]) == [[0, 1, 2], [4]]
    assert turns_of([]) == []


def test_templates_that_refuse_an_order_get_another_choice() -> None:
    """Such as one that wants the first question to be an even one."""

    def encode(messages: Messages) -> list[int]:
        if int(messages[0]["content"].split()[0]) % 2:
            raise BadInput("no such order")
        return as_words(messages)

    messages: Messages = [message for number in range(7) for message in turn(number, 3)]
    size = len(as_words(messages))
    fitted = fit(messages, "drop-oldest", encode, size - 3, 1)  # one turn would be enough
    assert fitted.dropped == 4
    with pytest.raises(BadInput, match="no such order"):  # the user's own order
        fit(messages[2:], "drop-oldest", encode, size, 1)


@given(st.integers(1, 40), st.integers(0, 50))
def test_the_fewest_turns_are_found_by_halving(most: int, needed: int) -> None:
    tried = []

    def without(turns: int) -> Fitted:
        tried.append(turns)
        return Fitted([1] * (100 - turns), turns)

    found = fewest(without, most, 100 - needed)
    assert found is not None and found.dropped == min(max(needed, 1), most)
    assert len(tried) <= 8


def test_a_chat_goes_on_past_the_capacity(pair: Pair) -> None:
    with pair.chat("be brief", overflow="drop-oldest") as chat:
        dropped = []
        for number in range(12):
            result = chat.send(f"{number} the quick brown fox", max_new_tokens=12)
            dropped.append(result.stats.dropped_messages)
            assert len(result.tokens) == 12  # there was room
            assert result.stats.prompt_tokens <= pair.capacity - 12
            messages: Messages = chat.messages[:-1]
            fresh = [messages[0], *messages[1 + dropped[-1] :]]
            assert pair.generate(fresh, max_new_tokens=12).tokens == result.tokens
        assert len(chat.messages) == 25  # whole
        assert dropped[0] == 0 and dropped[-1] > 0 and dropped == sorted(dropped)
        with pytest.raises(TooLong, match=r'remove earlier messages.*overflow="drop-oldest"'):
            for _ in range(9):
                chat.send("the lazy dog", max_new_tokens=12, overflow="error")


def test_stateless_messages(pair: Pair) -> None:
    messages = [SYSTEM, *(message for number in range(9) for message in turn(number, 2)), turn(99)[0]]
    with pytest.raises(TooLong):
        pair.generate(messages)
    for overflow, first in (("drop-oldest", None), ("drop-middle", messages[1:3])):
        result = pair.generate(messages, max_new_tokens=9, overflow=overflow)
        gone = result.stats.dropped_messages
        rest = [SYSTEM, *messages[1 + gone :]] if first is None else [SYSTEM, *first, *messages[3 + gone :]]
        assert gone and gone % 2 == 0
        assert pair.generate(rest, max_new_tokens=9).tokens == result.tokens


def test_what_cannot_be_dropped_is_told(pair: Pair) -> None:
    long = {"role": "user", "content": "fox " * 300}
    with pytest.raises(TooLong, match=r"after all that overflow='drop-oldest' may drop \(2 messages\), but the capac"):
        pair.generate([*turn(1), long], overflow="drop-oldest")
    with pytest.raises(BadInput, match="overflow='drop-oldest' drops whole turns of a conversation, but the prompt is"):
        pair.generate("fox", overflow="drop-oldest")
    with pytest.raises(BadInput, match="overflow must be one of 'error', 'drop-oldest', 'drop-middle', not 'drop'"):
        pair.generate("fox", overflow="drop")
    with pytest.raises(BadInput, match="overflow must be one of"):
        pair.chat(overflow="oldest")
    assert pair.generate("fox", chat=True, overflow="drop-oldest", max_new_tokens=3).stats.dropped_messages == 0


def test_the_room_of_a_reply() -> None:
    assert [room_for_reply(400, n) for n in (1, 99, 100, 4000)] == [1, 99, 100, 100]
    assert room_for_reply(3, 5) == 1
