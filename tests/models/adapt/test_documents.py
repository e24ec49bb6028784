"""Data sets: the forms of conversations and texts, and what is wrong with others."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pard_onnx.models.adapt.documents import Document, document_of, open_data
from pard_onnx.models.errors import BadInput

TURNS = (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]
FORMS: dict[str, dict[str, Any]] = {
    "AMD's": {"conversation": [{"human": "a", "assistant": "b"}, {"human": "c", "assistant": "d"}]},
    "OpenAI's": {"messages": MESSAGES},
    "ShareGPT's": {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b"},
            {"from": "human", "value": "c"},
            {"from": "gpt", "value": "d"},
        ]
    },
    "messages under AMD's key": {"conversation": MESSAGES},
    "prompt and completion": {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]},
    "prompt and response": {"prompt": MESSAGES[:3], "response": "d"},
}


def turns(document: Document) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"]) for message in document.messages)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_every_turn(form: str, tmp_path: Path) -> None:
    lines, array = tmp_path / "data.jsonl", tmp_path / "data.json"
    lines.write_text(f"\ufeff{json.dumps(FORMS[form])}\n\n{json.dumps(FORMS[form])}", encoding="utf-8")
    array.write_text(json.dumps([FORMS[form], FORMS[form]], indent=1), encoding="utf-8")
    for file, word in ((lines, "line 1"), (array, "item 1")):
        found = list(open_data([str(file)]).read())
        assert [turns(document) for document in found] == [TURNS, TURNS]
        assert found[0].place == f"{file} {word}"


def test_system_messages_tools_texts_and_prompts() -> None:
    system = document_of({"system": "s", "conversation": [{"human": "a", "assistant": "b"}]}, "here")
    assert turns(system) == (("system", "s"), *TURNS[:2])
    assert turns(document_of({"conversation": [{"system": "s", "human": "a"}]}, "here")) == (("system", "s"), TURNS[0])
    tool = {"type": "function", "function": {"name": "f"}}
    assert document_of({"messages": MESSAGES, "tools": [tool]}, "here").tools == (tool,)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert document_of({"messages": [call]}, "here").messages[0] == {
        "role": "assistant",
        "tool_calls": call["tool_calls"],
    }
    assert turns(document_of({"prompt": "a"}, "here")) == TURNS[:1]
    assert document_of({"text": "a"}, "here") == Document("here", text="a")


def test_a_file_of_another_kind_is_a_text_and_json_lines_may_be_in_a_json_file(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "b.json"  # as AMD's example.json
    text.write_text("Grüße\n", encoding="utf-8")
    lines.write_text('{"text": "x"}\n{"text": "y"}\n')
    assert [one.text for one in open_data([str(text), str(lines)]).read()] == ["Grüße\n", "x", "y"]


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    one, two = tmp_path / "a.txt", tmp_path / "b.txt"
    one.write_text("x")
    two.write_text("x")
    before = open_data([str(one)]).digest
    assert open_data([str(two)]).digest == before
    two.write_text("y")
    assert len({before, open_data([str(two)]).digest, open_data([str(one), str(two)]).digest}) == 3


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([1], "is \\[1\\]; it must be an object"),
        ({"mesages": []}, "has none of the keys .*; is 'mesages' meant as messages?"),
        ({}, "has none of the keys"),
        ({"text": 3}, "text must be text, not 3"),
        ({"text": "\ud800"}, "text is not valid Unicode"),
        ({"messages": "hello"}, "messages must be a list, not 'hello'"),
        ({"messages": ["hello"]}, "a turn is 'hello'; it must be"),
        ({"messages": [{"role": "user\n", "content": ""}]}, "the role of a message is a word"),
        ({"messages": [{"role": "user", "content": 3}]}, "the content of a message is text or a list of parts, not 3"),
        ({"conversation": [{"human": 3}]}, "user must be text, not 3"),
        ({"conversation": [{}]}, "a turn is {}"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "a turn is from 'narrator'; known are"),
        ({"conversations": [{"from": "human"}]}, "value must be text, not None"),
        ({"messages": [], "tools": [3]}, "tools are a list of objects"),
    ],
)
def test_what_is_no_document_is_named_with_its_place(value: Any, problem: str) -> None:
    with pytest.raises(BadInput, match=rf"F line 7: {problem}"):
        document_of(value, "F line 7")


def test_what_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"--data .*: is a folder; name its files"):
        open_data([str(tmp_path)])
    for name in ("missing.jsonl", "no/such.jsonl", "", "a b/c"):
        with pytest.raises(BadInput, match=r"there is no such file"):
            open_data([name])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(BadInput, match=r"broken.jsonl line 2: is not JSON"):
        list(open_data([str(broken)]).read())
    broken.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(BadInput, match=r"broken.jsonl: not UTF-8 text"):
        list(open_data([str(broken)]).read())


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        if name == "no/set":
            raise FileNotFoundError("not found")
        return [FORMS["OpenAI's"]]

    package = ModuleType("datasets")
    package.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)
    (found,) = open_data(["org/chats:train[:5%]"]).read()
    assert (turns(found), found.place) == (TURNS, "org/chats:train[:5%] row 1")
    open_data(["org/chats"])
    assert asked == [("org/chats", "train[:5%]"), ("org/chats", "train")]
    with pytest.raises(BadInput, match=r"--data no/set: cannot be loaded from the hub: not found"):
        open_data(["no/set"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match=r"needs the datasets package; run: pip install .*\[adapt\]"):
        open_data(["org/chats"])
