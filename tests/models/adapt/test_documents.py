"""Data sets: the forms of conversations and texts, and what is wrong with others."""

from __future__ import annotations

import json
import os
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
        ({"messages": [{"role": "user", "content": None}]}, "the content of a message from user is null or missing"),
        ({"messages": [{"role": "assistant"}]}, "the content of a message from assistant is null or missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
            "the message from user is not",
        ),
        ({"messages": [], "tools": [{"name": "\udfff"}]}, "tools is not valid Unicode"),
        ({"messages": [], "tools": [3]}, "tools are a list of objects"),
    ],
)
def test_what_is_no_document_is_named_with_its_place(value: Any, problem: str) -> None:
    with pytest.raises(BadInput, match=rf"F line 7: {problem}"):
        document_of(value, "F line 7")


def test_what_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"--data .*: is a folder; name its files"):
        open_data([str(tmp_path)])
    with pytest.raises(BadInput, match=r"--data 'aaa.*: cannot be read: File name too long; name a file"):
        open_data(["a" * 5000])
    for name in ("missing.jsonl", "no/such.jsonl", "", "a b/c"):
        with pytest.raises(BadInput, match=r"there is no such file"):
            open_data([name])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(BadInput, match=r"broken.jsonl line 2: is not JSON"):
        list(open_data([str(broken)]).read())
    broken.write_text('{"text": "a",\r\n"text": "b"}\n{\n')
    with pytest.raises(BadInput, match=r"broken.jsonl line 1: is not JSON .* at column 14\); write one object a line"):
        list(open_data([str(broken)]).read())
    broken.write_text('\ufeff{"text": "a", "text": "b"}\r\n', encoding="utf-8")
    with pytest.raises(BadInput, match=r"line 1: is not JSON \(the key 'text' is there twice\); correct it"):
        list(open_data([str(broken)]).read())
    broken.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(BadInput, match=r"broken.jsonl: not UTF-8 text"):
        list(open_data([str(broken)]).read())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes in folders")
def test_what_can_be_read_once_only_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(BadInput, match=r"pipe.jsonl: is a pipe or a device, which cannot be read several times"):
        open_data([str(tmp_path / "pipe.jsonl")])


@pytest.mark.parametrize("name", ["long.jsonl", "long.txt"])
def test_what_is_too_long_for_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("pard_onnx.models.adapt.documents.LINE", 20)
    file = tmp_path / name
    file.write_text(json.dumps({"text": "a" * 20}))
    with pytest.raises(BadInput, match=rf"{name}.* has 32 characters.*make it several"):
        list(open_data([str(file)]).read())


def test_objects_by_columns_are_rows(tmp_path: Path) -> None:
    """As data sets of the hub hold sequences of objects."""
    columns = {"role": [role for role, _ in TURNS], "content": [text for _, text in TURNS]}
    assert turns(document_of({"messages": columns}, "here")) == TURNS


class Rows(list[dict[str, Any]]):
    """Stands for a data set of the datasets package."""

    _fingerprint = "0"

    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    def select_columns(self, names: list[str]) -> Rows:
        return Rows({name: row[name] for name in names} for row in self)


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(name: str, config: str | None, split: str) -> Rows:
        asked.append((name, config, split))
        if name == "no/set":
            raise FileNotFoundError("not found")
        return Rows([{"image": 3, **(FORMS["OpenAI's"] if name == "org/chats" else {"mesages": []})}])

    package = ModuleType("datasets")
    package.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)
    (found,) = open_data(["org/chats:train[:5%]"]).read()
    assert (turns(found), found.place) == (TURNS, "org/chats:train[:5%] row 1")
    open_data(["org/chats"])
    open_data(["org/chats/all:test"])
    assert asked == [("org/chats", None, "train[:5%]"), ("org/chats", None, "train"), ("org/chats", "all", "test")]
    with pytest.raises(BadInput, match=r"--data no/set: cannot be loaded from the hub: not found"):
        open_data(["no/set"])
    with pytest.raises(BadInput, match=r"--data or/other: has the columns image, mesages, and none of messages, "):
        open_data(["or/other"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match=r"needs the datasets package; run: pip install .*\[adapt\]"):
        open_data(["org/chats"])


HUB_CARD = """---
configs:
- config_name: default
  data_files: [{split: train, path: train.jsonl}, {split: test, path: test.jsonl}]
- config_name: columns
  data_files: [{split: train, path: columns.jsonl}]
---
"""


def test_a_data_set_that_the_datasets_package_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package itself, on a folder in the place of one of the hub."""
    datasets = pytest.importorskip("datasets")
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    rows = [{"id": 1, "messages": MESSAGES}, {"id": 2, "messages": [MESSAGES[0], call]}, {"id": 3, "messages": []}]
    files = {"train": rows, "test": rows[:1], "columns": [{"id": 1, "question": "a"}]}
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "README.md").write_text(HUB_CARD)
    for name, items in files.items():
        (tmp_path / "set" / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))

    def load_dataset(repository: str, config: str | None, split: str) -> Any:
        assert repository == "org/chats"
        return usual(str(tmp_path / "set"), config, split=split, cache_dir=str(tmp_path / "cache"))

    usual = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    direct = list(open_data([str(tmp_path / "set" / "train.jsonl")]).read())
    found = open_data(["org/chats"])
    assert [one.messages for one in found.read()] == [one.messages for one in direct]
    assert [one.messages for one in found.read()] == [one.messages for one in direct]  # again from the beginning
    assert len(list(open_data(["org/chats:test"]).read())) == len(list(open_data(["org/chats:train[:1]"]).read())) == 1
    digests = {open_data([name]).digest for name in ("org/chats", "org/chats:train", "org/chats:test")}
    assert len(digests) == 2
    for name, problem in (
        ("org/chats:validation", r'Unknown split "validation"\. Should be one of .*train.*test'),
        ("org/chats/none", "none.*not found.*default.*columns"),
        ("org/chats/columns", "has the columns id, question, and none of messages, conversation"),
    ):
        with pytest.raises(BadInput, match=rf"--data {name}: .*{problem}"):
            open_data([name])
