"""Thinking apart from the answer: any chunking, tags as text or as special tokens, and the budget as a row edit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pard_onnx.runtime.text.reasoning import THINKING_FORMS, ReasoningBudget, ThinkingReader, thinking_of

BEGIN, END = "<think>", "</think>"


def read(pieces: list[str], begin: str = BEGIN, end: str = END, *, begun: bool = False) -> tuple[str, str]:
    reader = ThinkingReader(begin, end, begun)
    found = [reader.push(piece) for piece in pieces] + [reader.finish()]
    return "".join(one.reasoning for one in found), "".join(one.text for one in found)


@pytest.mark.parametrize(
    ("text", "begun", "parts"),
    [
        ("<think>\nOkay, so\n\nfirst\n</think>\n\nThe answer\n", False, ("Okay, so\n\nfirst", "The answer\n")),
        ("Okay\n</think>\n\n4", True, ("Okay", "4")),
        ("<think>\n\n</think>\n\n4", False, ("", "4")),
        ("\n <think>a</think>b", False, ("a", "b")),
        ("no thought, <think>later</think>", False, ("", "no thought, <think>later</think>")),
        ("<think>a</think>b<think>c</think>", False, ("a", "b<think>c</think>")),
        ("<think>cut", False, ("cut", "")),
        ("<think>cut</thi", False, ("cut</thi", "")),
        ("<thi", False, ("", "<thi")),
        ("  ", False, ("", "  ")),
        ("", True, ("", "")),
        ("</think>", True, ("", "")),
        ("4</think>", False, ("", "4</think>")),
        ("<think>a<think>b</think>c", False, ("a<think>b", "c")),
    ],
)
def test_parts(text: str, begun: bool, parts: tuple[str, str]) -> None:
    for pieces in ([text], list(text)):
        assert read(pieces, begun=begun) == parts


@settings(max_examples=300)
@given(
    parts=st.lists(
        st.sampled_from([BEGIN, END, "\n", " ", "a", "<", "</", "think>", "\r\n", "é", "\udfff"]), max_size=12
    ),
    cuts=st.sets(st.integers(0, 60), max_size=10),
    begun=st.booleans(),
    marked=st.booleans(),
)
def test_any_chunking_gives_the_same(parts: list[str], cuts: set[int], begun: bool, marked: bool) -> None:
    begin, end = ("\udc00", "\udc01") if marked else (BEGIN, END)
    text = "".join({BEGIN: begin, END: end}.get(part, part) for part in parts)
    ends = sorted(cut for cut in cuts if cut < len(text))
    pieces = [text[start:stop] for start, stop in zip([0, *ends], [*ends, len(text)], strict=True)]
    expected = read([text], begin, end, begun=begun)
    assert read(pieces, begin, end, begun=begun) == expected == read(list(text), begin, end, begun=begun)
    reasoning, answer = expected
    assert end not in reasoning and reasoning == reasoning.strip("\r\n")
    if not begun and not text.lstrip().startswith(begin):
        assert expected == ("", text)
    if begun and end in text:
        assert answer == text[text.index(end) + len(end) :].lstrip("\r\n")


LETTERS = "\n<>/thinkabc "


@settings(max_examples=200)
@given(
    budget=st.integers(0, 12),
    text=st.text("ab\n</", max_size=30),
    begun=st.booleans(),
    single=st.booleans(),
)
def test_the_budget_closes_the_thinking(budget: int, text: str, begun: bool, single: bool) -> None:
    """A model that goes on as before after each forced token. Tokens are characters, or the end tag is one token."""
    cut = [LETTERS.index("\n"), len(LETTERS)] if single else [LETTERS.index(letter) for letter in "\n</think>"]

    def push(token: int) -> str:
        return END if token == len(LETTERS) else LETTERS[token]

    wanted = ("" if begun else BEGIN) + text + "c" * 40
    prompt = [0, 1, 2]
    tokens = list(prompt)
    edit = ReasoningBudget(budget, cut, ThinkingReader(BEGIN, END, begun), push, len(prompt))
    for letter in wanted:
        row = np.zeros(len(LETTERS) + 1, np.float32)
        row[LETTERS.index(letter)] = 1
        tokens.append(int(edit.edit(row, tokens).argmax()))
        # The same row from all of the tokens at once, as another number of drafts would ask for it
        again = ReasoningBudget(budget, cut, ThinkingReader(BEGIN, END, begun), push, len(prompt))
        row = np.zeros(len(LETTERS) + 1, np.float32)
        row[LETTERS.index(letter)] = 1
        assert int(again.edit(row, tokens[:-1]).argmax()) == tokens[-1]
    reader = ThinkingReader(BEGIN, END, begun)
    thought = 0
    for token in tokens[len(prompt) :]:
        inside = reader.thinking
        reader.push(push(token))
        thought += inside and reader.thinking
    assert not reader.thinking and thought <= budget + len(cut) - 1


def test_how_templates_think() -> None:
    assert thinking_of("{% if '</think>' in content %}") is THINKING_FORMS[0]
    assert thinking_of("[THINK]{{ x }}[/THINK]") is THINKING_FORMS[1]
    assert thinking_of("{{ messages }}") is None
    assert thinking_of("{{ messages }}", lambda token: token in ("<think>", "</think>")) is THINKING_FORMS[0]
