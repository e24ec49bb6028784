"""Conversations on the shipped pair: the same bits as a fresh prompt, and no memory left behind."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
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
    """The measure above notices as few as forty conversations that stay."""
    pair.chat().send("Complete the code.", max_new_tokens=2)
    before = resident()
    chats = [pair.chat() for _ in range(40)]
    for chat in chats:
        chat.send("Complete the code.", max_new_tokens=2)
    assert resident() - before > ALLOWED


@pytest.mark.parametrize("kernel", ["", "off"])
def test_rows_kept_from_earlier_turns_are_those_of_a_fresh_prompt_bit_for_bit(
    demo_folder: Callable[[str, str], Path], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded in steps of every width, against prefilled in chunks; with this package's matmuls and without."""
    monkeypatch.setenv("PARD_ONNX_KERNEL", kernel)
    texts = ("Complete the code.\ndef close(self):\n" * 12, "and open", "def read(self, n):\n" * 30, "thanks")
    with load(demo_folder("demo-target", "int4"), demo_folder("demo-draft", "int8")) as pair, pair.chat() as chat:
        assert pair.exact_widths
        for text, length in zip(texts, (4, "auto", 7, 11), strict=True):
            result = chat.send(text, max_new_tokens=60, draft_length=length)  # type: ignore[arg-type]
            with pair.chat(messages=chat.messages[:-2]) as fresh:
                assert fresh.send(text, max_new_tokens=60, draft_length=0).tokens == result.tokens
                found, expected = (one._sequence.target for one in (chat, fresh))  # type: ignore[union-attr]
            count = min(found.length, expected.length)
            assert count > 100
            np.testing.assert_array_equal(found.read(0, count), expected.read(0, count))
        assert result.stats.cached_tokens > 400
