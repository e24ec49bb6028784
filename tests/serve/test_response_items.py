"""Items of /v1/responses to messages, chunks to items and events, and the store, without a server."""

from __future__ import annotations

import random
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("openai", reason="the package openai is not installed; the extra dev has it")

from response_events import items_of, require_event

from pard_onnx.runtime.result import Chunk
from pard_onnx.runtime.sampling.logprobs import TokenLogprob
from pard_onnx.runtime.text.tool_calls import ToolCallDelta
from pard_onnx.serve.errors import ApiError
from pard_onnx.serve.openai_api.response_input import MessageReader
from pard_onnx.serve.openai_api.response_output import Output
from pard_onnx.serve.response_store import ResponseStore, StoredResponse

CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
OTHER = {**CALL, "call_id": "c2", "name": "g"}
ANSWER = {"type": "function_call_output", "call_id": "c1", "output": "7"}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
SAID = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "yes", "annotations": []}]}


def calls(*items: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"id": one["call_id"], "type": "function", "function": {"name": one["name"], "arguments": one["arguments"]}}
        for one in items
    ]


def text(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": one} for one in texts]


def read(*items: Any, before: Any = (), find: Any = lambda id_: None) -> list[dict[str, Any]]:
    return MessageReader(before, find).read(list(items))


def reply(content: str = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ([{"role": "user", "content": "a"}], [{"role": "user", "content": "a"}]),
        ([{"role": "developer", "content": ""}], [{"role": "developer", "content": ""}]),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}],
            [{"role": "user", "content": "a"}],
        ),
        (
            [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": one} for one in "ab"]}],
            [{"role": "user", "content": text("a", "b")}],
        ),
        ([SAID], [reply("yes")]),
        ([SAID, SAID], [reply("yes"), reply("yes")]),
        ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}], [reply("no")]),
        ([CALL], [reply(tool_calls=calls(CALL))]),
        ([CALL, OTHER], [reply(tool_calls=calls(CALL, OTHER))]),
        ([THOUGHT, SAID, CALL], [reply("yes", reasoning_content="hm", tool_calls=calls(CALL))]),
        ([SAID, CALL, SAID], [reply("yesyes", tool_calls=calls(CALL))]),
        ([SAID, THOUGHT, SAID], [reply("yes"), reply("yes", reasoning_content="hm")]),
        ([THOUGHT], [reply(reasoning_content="hm")]),
        ([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]}, SAID], [
            reply("yes", reasoning_content="s")
        ]),
        ([{"type": "reasoning", "summary": [], "encrypted_content": "x", "content": None}, SAID], [reply("yes")]),
        (
            [CALL, ANSWER, OTHER],
            [
                reply(tool_calls=calls(CALL)),
                {"role": "tool", "tool_call_id": "c1", "content": "7"},
                reply(tool_calls=calls(OTHER)),
            ],
        ),
        (
            [CALL, {**ANSWER, "output": [{"type": "input_text", "text": "7"}]}],
            [reply(tool_calls=calls(CALL)), {"role": "tool", "tool_call_id": "c1", "content": "7"}],
        ),
    ],
)  # fmt: skip
def test_items_are_messages(items: list[Any], messages: list[Any]) -> None:
    assert read(*items) == messages


def test_messages_that_are_there_are_not_changed() -> None:
    before = [reply("yes")]
    assert read(CALL, before=before) == [reply("yes"), reply(tool_calls=calls(CALL))]
    assert before == [reply("yes")]
    before = [reply(tool_calls=calls(CALL))]
    assert read(ANSWER, before=before)[0] is before[0]


def test_references_are_the_items() -> None:
    known = {"msg_1": {**SAID, "id": "msg_1"}}
    for item in ({"type": "item_reference", "id": "msg_1"}, {"id": "msg_1"}, {"id": "msg_1", "type": None}):
        assert read(item, find=known.get) == [reply("yes")]
    with pytest.raises(ApiError, match=r"input\[0\].id: there is no item 'msg_2' any more"):
        read({"id": "msg_2"}, find=known.get)


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        (1, r"input\[1\] must be an object"),
        ({}, r"unknown type of item None"),
        ({"type": "web_search_call"}, "unknown type of item 'web_search_call'; known are message"),
        ({"type": "function_cal"}, "did you mean function_call"),
        ({"type": ["message"]}, "unknown type of item"),
        ({"role": "tool", "content": "x"}, "the result of a tool is an item of the type function_call_output"),
        ({"role": ["user"], "content": "x"}, r"input\[1\].role must be 'user'"),
        ({"role": "user"}, r"input\[1\].content must be text or a list of parts, not None"),
        ({"role": "user", "content": ["x"]}, r"input\[1\].content\[0\] must be an object with a type"),
        ({"role": "user", "content": [{"type": "input_text"}]}, r"input\[1\].content\[0\].text must be text"),
        ({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}, "'input_image', but the model"),
        ({"role": "user", "content": [{"type": ["input_text"]}]}, "must be an object with a type"),
        ({**CALL, "arguments": {}}, r"input\[1\].arguments must be text"),
        ({**CALL, "call_id": None}, r"input\[1\].call_id must be text"),
        (ANSWER, r"input\[1\].call_id: no function_call before it has the call_id 'c1'"),
        ({"type": "reasoning", "content": "x", "summary": 5} | {"content": 5}, "must be text or a list of parts"),
    ],
)
def test_bad_items_are_named(item: Any, problem: str) -> None:
    with pytest.raises(ApiError, match=problem) as error:
        read({"role": "user", "content": "a"}, item)
    assert (error.value.status, error.value.param) == (400, "input")


# ---- output


def chunk(text: str = "", reasoning: str = "", calls: Any = (), tokens: int = 1, logprobs: Any = None) -> Chunk:
    pieces = tuple([""] * (tokens - 1) + [text])
    return Chunk(text, (0,) * tokens, (False,) * tokens, pieces, logprobs, reasoning, tuple(calls))


def events_of(output: Output, chunks: list[Chunk], *, complete: bool = True) -> list[dict[str, Any]]:
    found = [event for one in chunks for event in output.add(one)] + list(output.finish(complete=complete))
    events = [{"type": name, "sequence_number": number, **fields} for number, (name, fields) in enumerate(found)]
    for event in events:
        require_event(event)
    return events


def begin(index: int, name: str, arguments: str = "") -> ToolCallDelta:
    return ToolCallDelta(index, f"call{index}", name, arguments)


@pytest.mark.parametrize("seed", range(60))
def test_any_chunks_are_items_in_order(seed: int) -> None:
    dice = random.Random(seed)
    chunks, written, calls = [], [], 0
    if dice.random() < 0.5:
        chunks += [chunk(reasoning=dice.choice(("hm", " and", ""))) for _ in range(dice.randrange(4))]
    for _ in range(dice.randrange(12)):
        if dice.random() < 0.6:
            chunks.append(chunk(dice.choice(("a", " b", "", "ü"))))
            continue
        parts = [begin(calls, f"f{calls}")] + [ToolCallDelta(calls, arguments=dice.choice("{}1")) for _ in range(3)]
        cut = dice.randrange(1, 4)
        chunks += [chunk(calls=parts[:cut]), chunk(dice.choice(("", "x")), calls=parts[cut:])]
        calls += 1
    output = Output()
    complete = dice.random() < 0.8
    events = events_of(output, chunks, complete=complete)
    assert items_of(events) == output.items
    messages = [item for item in output.items if item["type"] == "message"]
    written = [item["content"][0]["text"] for item in messages]
    assert "".join(written) == "".join(one.text for one in chunks)
    found = [(item["call_id"], item["arguments"]) for item in output.items if item["type"] == "function_call"]
    deltas = [delta for one in chunks for delta in one.tool_calls]
    expected = [
        (f"call{index}", "".join(delta.arguments for delta in deltas if delta.index == index)) for index in range(calls)
    ]
    assert found == expected
    statuses = [item["status"] for item in output.items]
    assert statuses == ["completed"] * (len(statuses) - 1) + ["completed" if complete else "incomplete"]
    assert len(messages) <= 1 or calls


def test_a_reply_without_anything_is_an_empty_message() -> None:
    for chunks in ([], [chunk()], [chunk(reasoning="hm")]):
        output = Output()
        events_of(output, chunks)
        assert output.items[-1]["type"] == "message"
        assert output.items[-1]["content"][0]["text"] == ""
    output = Output()
    events_of(output, [chunk(reasoning="hm")], complete=False)
    assert [(item["type"], item["status"]) for item in output.items] == [("reasoning", "incomplete")]


def test_tokens_of_the_reasoning_are_counted() -> None:
    first, second = Output(), Output()
    events_of(
        first, [chunk(tokens=2), chunk(reasoning="hm", tokens=3), chunk("a", reasoning="!", tokens=4), chunk("b")]
    )
    assert first.reasoning_tokens == 2 + 3 + 3
    events_of(second, [chunk(tokens=2), chunk("a")])
    assert second.reasoning_tokens == 0


def test_only_tokens_of_the_text_have_log_probabilities() -> None:
    def scored(*texts: str) -> tuple[TokenLogprob, ...]:
        return tuple(TokenLogprob(0, one, one.encode(), -1.0) for one in texts)

    output = Output(with_logprobs=True)
    chunks = [
        Chunk("", (0,), (False,), ("",), scored("<think>")),
        Chunk("", (0,), (False,), ("",), scored("hm"), reasoning="hm"),
        Chunk("", (0,), (False,), ("",), scored("</think>")),
        Chunk("a", (0, 0), (False, False), ("", "a"), scored("\n", "a"), reasoning="."),
        Chunk("", (0,), (False,), ("",), scored("half")),
        Chunk("b", (0,), (False,), ("b",), scored("b")),
        Chunk("", (0,), (False,), ("",), scored("last")),
    ]
    assert items_of(events_of(output, chunks)) == output.items
    assert [one["token"] for one in output.items[-1]["content"][0]["logprobs"]] == ["a", "half", "b", "last"]


# ---- the store


def stored(number: int, size: int = 10) -> StoredResponse:
    return StoredResponse({"id": f"r{number}", "output": [{"id": f"m{number}"}]}, (), size)


def test_the_store_forgets_what_was_not_used_for_the_longest_time() -> None:
    store = ResponseStore(most=3)
    for number in range(3):
        store.add(stored(number))
    assert store.find("r0")
    store.add(stored(3))
    assert [number for number in range(4) if store.find(f"r{number}")] == [0, 2, 3]
    assert [number for number in range(4) if store.item(f"m{number}")] == [0, 2, 3]
    assert store.remove("r2")
    assert not store.remove("r2")
    assert (len(store), store.size) == (2, 20)


@pytest.mark.parametrize("seed", range(5))
def test_the_store_keeps_its_bounds(seed: int) -> None:
    dice = random.Random(seed)
    store = ResponseStore(most=8, most_bytes=100)
    for number in range(200):
        store.add(stored(number, dice.choice((1, 5, 40, 101))))
        assert len(store) <= 8
        assert store.size <= 100
        there = [one for one in range(number + 1) if store.item(f"m{one}")]
        assert len(there) == len(store)
