"""Conversations one after the other on the shipped pair: resident memory stays where it was."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pard_onnx import Pair, load

ALLOWED = 4e6  # bytes, however many conversations; one of them holds 2.8 MB


@pytest.fixture(scope="module")
def pair(demo_folder: Callable[[str, str], Path]) -> Iterator[Pair]:
    with load(demo_folder("demo-target", "int4"), demo_folder("demo-draft", "int8")) as opened:
        yield opened


def resident() -> int:
    gc.collect()
    size: int = psutil.Process().memory_info().rss
    return size


def test_a_thousand_conversations_leave_no_memory_behind(pair: Pair) -> None:
    def converse(number: int) -> None:
        chat = pair.chat()
        chat.send(f"Complete the code {number}.", max_new_tokens=2)
        chat.send("Go on.", max_new_tokens=2, draft_length=3)
        if number % 2:  # the others are forgotten
            chat.close()

    for number in range(50):  # until every buffer has grown once
        converse(number)
    before = resident()
    for number in range(1000):
        converse(number)
    assert resident() - before < ALLOWED


def test_open_conversations_hold_what_they_say(pair: Pair) -> None:
    """The measure above notices as few as ten conversations that stay."""
    pair.chat().send("Complete the code.", max_new_tokens=2)
    before = resident()
    chats = [pair.chat() for _ in range(10)]
    for chat in chats:
        chat.send("Complete the code.", max_new_tokens=2)
    assert resident() - before > ALLOWED
