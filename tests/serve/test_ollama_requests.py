"""Requests of Ollama's form: what their fields mean, and what is wrong with wrong ones."""

from __future__ import annotations

import json
import time
from math import inf
from typing import Any

import pytest

pytest.importorskip("starlette")

import httpx
from served import MESSAGES, Served, served
from test_bad_requests import BODIES, DEEP, HUGE, NO_NUMBERS, NO_TEXTS

from pard_onnx.models.errors import BadInput
from pard_onnx.runtime.text.tool_calls import ToolCall, ToolCallDelta
from pard_onnx.serve.ollama_api.generation import CallsInPieces, arguments_of, line
from pard_onnx.serve.ollama_api.requests import CHATS, OPTIONS, PROMPTS, OllamaRequest, conversation, keep_alive

CHAT, GENERATE, SHOW = "/api/chat", "/api/generate", "/api/show"
BAD_OPTIONS: dict[str, list[Any]] = {
    "temperature": [*NO_NUMBERS, *HUGE, -0.1],
    "top_p": [*NO_NUMBERS, *HUGE, -0.1, 1.1],
    "top_k": [*NO_NUMBERS, *HUGE, -2, 0.5],
    "min_p": [*NO_NUMBERS, *HUGE, -0.1, 1.1],
    "seed": [*NO_NUMBERS, *HUGE, 0.5],
    "num_predict": [*NO_NUMBERS, *HUGE, -3, 0.5],
    "stop": [1, True, {"a": 1}, [1], [""], "", [None]],
    "repeat_penalty": [*NO_NUMBERS, *HUGE, 0, -1],
    "presence_penalty": [*NO_NUMBERS, *HUGE],
    "frequency_penalty": [*NO_NUMBERS, *HUGE],
    "logit_bias": [1, [1], {"a": 1}, {"999999": 1}],
    "mirostat": [1, 2, "x", True],
    "tfs_z": [0.5, "x", True],
    "typical_p": [0.5, "x", True],
    "draft_length": [*NO_NUMBERS, *HUGE, -1, 33, "long"],
    "overflow": [1, "no", []],
}
BAD_COMMON: dict[str, list[Any]] = {
    "model": [*NO_TEXTS, "", "gpt-4o", "demo:7b", "../demo", "x" * 10_000],
    "stream": [0, 1, "true", []],
    "format": [1, True, [], "jsn", {"type": "jsn"}, {"enum": []}, {"x": DEEP}],
    "options": [1, "x", [], True],
    "keep_alive": [True, [], {}, "5", "x", "5 m", "m", "1h30", "9" * 1000 + "m", 10**400],
    "think": [1, 0, "maybe", [], {}, True, "high"],
    "top_logprobs": [*NO_NUMBERS, *HUGE, -1, 21],
    "logprobs": [1, "true", []],
    "truncate": [1, "true", []],
}
TOOL = {"type": "function", "function": {"name": "f"}}
BAD_CHAT: dict[str, list[Any]] = {
    "messages": [
        *NO_TEXTS, "hi", {}, [[]], [{}], [None], [{"content": "x"}], [{"role": 1}], [{"role": ""}],
        [{"role": "us\ner", "content": ""}], [{"role": "user", "content": 1}], [{"role": "user", "content": ["a"]}],
        [{"role": "user", "content": "a", "images": ["aGk="]}], [{"role": "user", "content": "a", "images": 1}],
        *([*MESSAGES, {"role": "assistant", "tool_calls": calls}] for calls in (
            1, "x", {}, [1], [{}], [{"function": 1}], [{"function": {}}], [{"function": {"name": 1}}],
            [{"function": {"name": "f", "arguments": "{}"}}], [{"function": {"name": "f", "arguments": [1]}}],
            [{"id": 1, "function": {"name": "f", "arguments": {}}}],
            [{"function": {"name": "f", "arguments": {"a": DEEP}}}])),
        [*MESSAGES, {"role": "tool", "tool_name": 1, "content": "x"}],
        [*MESSAGES, {"role": "assistant", "thinking": 1, "content": "x"}],
    ],
    "tools": [1, "x", {}, [1], [{}], [{"type": "x", "function": {"name": "f"}}], [{"function": {"name": "a b"}}],
              [TOOL, TOOL], [TOOL]],  # the demo's template ignores tools
}  # fmt: skip
BAD_PROMPT: dict[str, list[Any]] = {
    "prompt": [*NO_TEXTS],
    "system": [*NO_TEXTS],
    "context": [1, "x", {}, [1.5], ["a"], [True], [-1], [10**9], [None]],
    "raw": [1, "true", []],
    "suffix": ["x", 1, True],
    "template": ["{{ .Prompt }}", 1, False],
    "images": [["aGk="], 1, "x", True],
    "width": [1, 512],
}


def cases() -> list[tuple[str, bytes]]:
    """Paths and bodies."""
    whole = {CHAT: {"model": "demo", "messages": MESSAGES}, GENERATE: {"model": "demo", "prompt": "a"}}
    own = {CHAT: BAD_CHAT, GENERATE: BAD_PROMPT}
    out = [(path, body) for path in (CHAT, GENERATE, SHOW) for body in BODIES]
    for path, good in whole.items():
        good = {**good, "options": {"num_predict": 1}}
        for name, values in (own[path] | BAD_COMMON).items():
            out += [(path, json.dumps({**good, name: value}).encode()) for value in values]
        for name, values in BAD_OPTIONS.items():
            out += [(path, json.dumps({**good, "options": {name: value}}).encode()) for value in values]
        out.append((path, json.dumps({name: value for name, value in good.items() if name != "model"}).encode()))
    both = {"raw": True, "system": "x"}, {"raw": True, "context": [1]}
    out += [(GENERATE, json.dumps({**whole[GENERATE], **one}).encode()) for one in both]
    out += [(SHOW, json.dumps({"model": value}).encode()) for value in (*NO_TEXTS, "", "x", "x" * 10_000)]
    return out


def require_error(answer: httpx.Response, case: object = "") -> str:
    """The answer is an error of the client's in Ollama's form."""
    assert 400 <= answer.status_code < 500, (case, answer.status_code, answer.text[:300])
    body = answer.json()
    assert set(body) == {"error"}, case
    text = body["error"]
    assert isinstance(text, str)
    assert text
    assert "\n" not in text
    assert len(text) <= 1200
    return text


def test_each_is_refused_within_a_second(server: Served) -> None:
    found = cases()
    assert len(found) > 400
    with httpx.Client(base_url=server.url, timeout=10) as client:
        for path, body in found:
            start = time.perf_counter()
            answer = client.post(path, content=body)
            seconds = time.perf_counter() - start
            require_error(answer, (path, body[:300]))
            assert seconds < 1, body[:200]
    assert server.chat().status_code == 200
    assert server.pair.engine.occupancy == (0, 0)


@pytest.mark.parametrize("name", [*BAD_OPTIONS, *BAD_COMMON, *BAD_CHAT])
def test_the_error_names_the_field(server: Served, name: str) -> None:
    body: dict[str, Any] = {"model": "demo", "messages": MESSAGES}
    value = (BAD_OPTIONS | BAD_COMMON | BAD_CHAT)[name][0]
    answer = server.post(CHAT, {**body, "options": {name: value}} if name in BAD_OPTIONS else {**body, name: value})
    assert name in require_error(answer, name)


def test_null_is_as_if_it_was_not_given(server: Served) -> None:
    body = {"messages": MESSAGES, "options": {"num_predict": 4}, "stream": False}
    nulls = dict.fromkeys(CHATS.fields) | {"model": "demo"}
    options = dict.fromkeys(OPTIONS.fields) | body["options"]
    expected = server.post(CHAT, {"model": "demo", **body}).json()["message"]
    assert server.post(CHAT, {**nulls, **body, "options": options}).json()["message"] == expected
    nulls = dict.fromkeys(PROMPTS.fields) | {"model": "demo", "prompt": MESSAGES[0]["content"]}
    found = server.post(GENERATE, {**nulls, "options": options, "stream": False}).json()
    assert found["response"] == expected["content"]


def test_what_is_not_there(server: Served) -> None:
    for method, path, status in (
        ("GET", "/api", 404), ("GET", "/api/nothing", 404), ("GET", CHAT, 405), ("POST", "/api/delete", 405),
        ("POST", "/api/blobs/sha256:0", 404),
    ):  # fmt: skip
        answer = httpx.request(method, server.url + path, timeout=10)
        assert answer.status_code == status
        if path != "/api":
            require_error(answer, path)
    answer = server.post(CHAT, {"model": "demo", "messages": [{"role": "user", "content": "x" * (1 << 18)}]})
    assert answer.status_code == 413
    require_error(answer)


def test_unknown_fields(server: Served, demo: Any) -> None:
    good = {"model": "demo", "messages": MESSAGES, "stream": False, "options": {"num_predict": 1}}
    odd = [{**good, "modle": 1}, {**good, "options": {"num_predict": 1, "temprature": 1}},
           {**good, "messages": [{**MESSAGES[0], "contents": 1}]}]  # fmt: skip
    for body in odd:
        assert server.post(CHAT, body).status_code == 200
    with served(demo, strict=True) as strict:
        for body, name in zip(odd, ("model", "temperature", "content"), strict=True):
            assert f"did you mean {name}?" in require_error(strict.post(CHAT, body))
        options = {"num_predict": 1, "num_ctx": 4096, "numa": False, "mirostat": 0, "mirostat_tau": 5.0}
        assert strict.post(CHAT, {**good, "options": options, "shift": True}).status_code == 200


# ---- without a server


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("5m", 300), ("1h30m", 5400), ("1.5h", 5400), ("0", 0), ("0s", 0), ("300ms", 0.3), (".5s", 0.5),
        ("2h45m10s", 9910), ("1us", 1e-6), ("1µs", 1e-6), ("7ns", 7e-9), ("+5m", 300), ("-1", None), ("-1m", inf),
        (-1, inf), (-0.5, inf), (0, 0), (0.0, 0), (60, 60), (1.5, 1.5), (10**12, inf), ("999999h", inf), ("1h1h", 7200),
    ],
)  # fmt: skip
def test_durations_are_gos(given: Any, seconds: float | None) -> None:
    if seconds is None:  # "-1" has no unit
        with pytest.raises(BadInput, match="keep_alive"):
            keep_alive("keep_alive", given)
    else:
        assert keep_alive("keep_alive", given) == pytest.approx(seconds)


def read_chat(**body: Any) -> OllamaRequest:
    return OllamaRequest.of_chat({"model": "demo", "messages": MESSAGES, **body}, strict=True)


def test_options_are_the_librarys() -> None:
    assert read_chat().stream
    assert read_chat().options == {}
    assert read_chat(messages=[*MESSAGES, *MESSAGES]).options == {"overflow": "drop-oldest"}
    assert read_chat(messages=[*MESSAGES, *MESSAGES], truncate=False).options == {}
    assert read_chat(options={"num_predict": -1}).options == {}
    assert read_chat(options={"num_predict": -2}).options == {}
    assert read_chat(options={"num_predict": 5}).options == {"max_new_tokens": 5}
    assert read_chat(options={"seed": -1, "top_k": -1}).options == {"seed": None, "top_k": 0}
    assert read_chat(top_logprobs=3).options == {}
    assert read_chat(logprobs=True).options == {"logprobs": 0}
    assert read_chat(format="", tools=[]).options == {"grammar": None}
    assert read_chat(options={"overflow": "error"}).options == {"overflow": "error"}
    assert read_chat(messages=[]).is_empty
    assert read_chat(model="demo:latest").name == "demo"


def test_messages_get_the_ids_of_calls() -> None:
    def call(name: str, **more: Any) -> dict[str, Any]:
        return {**more, "function": {"name": name, "arguments": {}, "index": 3}}

    items = [
        {"role": "assistant", "tool_calls": [call("a"), call("b"), call("a", id="mine")]},
        {"role": "tool", "tool_name": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "mine", "content": "2"},
        {"role": "tool", "content": "3"},
        {"role": "tool", "tool_name": "c", "content": "4"},
        {"role": "assistant", "thinking": "Hm", "content": None, "tool_calls": [call("b")]},
        {"role": "tool", "content": "5"},
    ]
    first, *rest = conversation(items, strict=True)
    assert [one["id"] for one in first["tool_calls"]] == ["call00000", "call00001", "mine"]
    assert first["content"] == ""
    last = {"type": "function", "function": {"name": "b", "arguments": {}}}
    assert rest == [
        {"role": "tool", "content": "1", "name": "a", "tool_call_id": "call00000"},
        {"role": "tool", "content": "2", "name": "a", "tool_call_id": "mine"},
        {"role": "tool", "content": "3", "name": "b", "tool_call_id": "call00001"},
        {"role": "tool", "content": "4", "name": "c"},
        {"role": "assistant", "content": "", "thinking": "Hm", "tool_calls": [{**last, "id": "call00003"}]},
        {"role": "tool", "content": "5", "name": "b", "tool_call_id": "call00003"},
    ]


def test_many_calls_and_results_are_read_in_no_time() -> None:
    for name in (None, "b"):
        calls = [{"function": {"name": "a"}}] * 20_000 + [{"function": {"name": "b"}}] * 20_000
        results = [{"role": "tool", "tool_name": name, "content": ""}] * 40_000
        start = time.perf_counter()
        found = conversation([{"role": "assistant", "tool_calls": calls}, *results], strict=False)
        assert time.perf_counter() - start < 10
        assert found[20_000]["tool_call_id"] == ("call19999" if name is None else "call39999")


def test_calls_are_given_when_they_are_whole() -> None:
    calls = CallsInPieces()
    deltas = [
        (ToolCallDelta(0, "x", "a"), []), (ToolCallDelta(0, arguments='{"b": {}'), []),
        (ToolCallDelta(0, arguments=', "c": "}'), []), (ToolCallDelta(0, arguments='"}'), [{"b": {}, "c": "}"}]),
        (ToolCallDelta(1, "y", "b"), []), (ToolCallDelta(1, arguments="{}"), [{}]), (ToolCallDelta(2, "z", "c"), []),
    ]  # fmt: skip
    for delta, expected in deltas:
        assert [one["function"]["arguments"] for one in calls.add([delta])] == expected
    whole = [ToolCall("x", "a", "{}"), ToolCall("y", "b", "{}"), ToolCall("z", "c", '{"d": 1}')]
    assert calls.rest(whole) == [{"id": "z", "function": {"index": 2, "name": "c", "arguments": {"d": 1}}}]


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "[" * 100_000, '{"a": 1} {}', "null"])
def test_arguments_that_are_no_object(text: str) -> None:
    assert arguments_of(text) is None


def test_lines_are_utf_8_without_line_ends() -> None:
    found = line({"a": "ü\n\ud800", "b": arguments_of('{"c": NaN, "d": "\\udfff"}')})
    assert found.endswith(b"\n")
    assert found.count(b"\n") == 1
    assert json.loads(found) == {"a": "ü\n?", "b": {"c": "NaN", "d": "?"}}
