"""Requests of Anthropic's API that are wrong: each gets a 4xx in its error form within a second."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")

import httpx
from served import MESSAGES, Served, served
from test_bad_requests import BAD_CHAT, BODIES, DEEP, HUGE, NO_NUMBERS, NO_TEXTS

PATHS = ("/v1/messages", "/v1/messages/count_tokens")
CALL = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}


def user(*blocks: Any) -> list[dict[str, Any]]:
    return [*MESSAGES, CALL, {"role": "user", "content": list(blocks)}]


def assistant(*blocks: Any) -> list[dict[str, Any]]:
    return [*MESSAGES, {"role": "assistant", "content": list(blocks)}, *MESSAGES]


def result(**more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "a", "content": "x", **more}


SHARED = (
    "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "draft_length", "stream", "model", "logit_bias",
    "stop_token_ids", "chat_template_kwargs", "special_tokens", "overflow", "regex", "choice", "grammar", "lookup",
)  # fmt: skip
TOOL = {"name": "f", "input_schema": {"type": "object"}}
TYPED: list[Any] = [1, "x", [], {}, {"type": 1}, {"type": "x"}, {"type": []}, {"type": None}]  # objects with a type
BAD: dict[str, list[Any]] = {
    **{name: BAD_CHAT[name] for name in SHARED if name in BAD_CHAT},
    "stop_sequences": [1, True, "x", {"a": 1}, [1], [""], [None], [[]]],
    "system": [1, True, {}, [1], [{}], [{"type": "image"}], [{"type": "text"}], [{"type": "text", "text": 1}], [None]],
    "messages": [
        *NO_TEXTS, "hi", [], [[]], [{}], [None], [{"role": 1, "content": "x"}], [{"content": "x"}],
        [{"role": "tool", "content": "x"}], [{"role": "us\ner", "content": ""}], [{"role": "user"}],
        [{"role": "user", "content": 1}], [{"role": "user", "content": None}], [{"role": "user", "content": {}}],
        [{"role": "system", "content": "x"}], [{"role": "assistant", "content": ""}], [CALL], [*MESSAGES, CALL],
        [{"role": "system", "content": [{"type": "image"}]}],
        user(1), user("x"), user({}), user({"type": 1}), user({"type": "text"}), user({"type": "text", "text": 1}),
        user({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}),
        user({"type": "document"}), user({"type": "tool_use", "id": "a", "name": "f", "input": {}}),
        user({"type": "thinking", "thinking": "x"}), user({"type": "tool_result"}), user(result(tool_use_id=1)),
        user(result(tool_use_id="b")), user(result(content=1)), user(result(content=[1])), user(result(is_error=1)),
        user(result(content=[{"type": "image"}])), user(result(content=[{"type": "text"}])), user(DEEP),
        assistant({"type": "tool_use"}), assistant({"type": "tool_use", "id": 1, "name": "f", "input": {}}),
        assistant({"type": "tool_use", "id": "a", "name": 1, "input": {}}),
        assistant({"type": "tool_use", "id": "a", "name": "f"}),
        assistant({"type": "tool_use", "id": "a", "name": "f", "input": "{}"}),
        assistant({"type": "tool_use", "id": "a", "name": "f", "input": {"x": DEEP}}),
        assistant({"type": "thinking"}), assistant({"type": "thinking", "thinking": 1}), assistant(result()),
        assistant({"type": "server_tool_use", "id": "a", "name": "web_search", "input": {}}), assistant(1),
        [*MESSAGES, {"role": "assistant", "content": [{"type": "thinking", "thinking": "x", "signature": "y"}]}],
    ],
    "tools": [
        1, "x", {}, [1], [{}], [{"name": "f"}], [{"name": 1, "input_schema": {}}], [{**TOOL, "name": "a b"}],
        [{**TOOL, "input_schema": "x"}], [{**TOOL, "description": 1}], [TOOL, TOOL], [{**TOOL, "type": "bash_2025"}],
        [{"type": "function", "function": {"name": "f"}}], [{**TOOL, "type": 1}], [TOOL],  # the template ignores tools
        [{**TOOL, "input_schema": {"properties": 1}}], [{**TOOL, "input_schema": {"x": DEEP}}],
    ],
    "tool_choice": [
        *TYPED, "auto", {"type": "any"}, {"type": "tool"}, {"type": "tool", "name": 1}, {"type": "tool", "name": "g"},
        {"type": "auto", "disable_parallel_tool_use": 1},
    ],
    "thinking": [
        *TYPED, True, {"type": "enabled"}, {"type": "enabled", "budget_tokens": 0},
        {"type": "adaptive", "display": "x"},
        *({"type": "enabled", "budget_tokens": value} for value in (*NO_NUMBERS, *HUGE[:4], -1, 1.5)),
    ],
    "output_config": [
        1, "x", [], {"format": 1}, {"format": {}}, {"format": {"type": "json"}}, {"format": {"type": "json_schema"}},
        {"format": {"type": "json_schema", "schema": 1}},
    ],
    "output_format": [*TYPED, {"type": "json_schema"}],
    "mcp_servers": [[]],
    "container": ["x"],
}  # fmt: skip


OF_GENERATIONS = ("regex", "grammar", "stop_token_ids", "logit_bias")  # whose values are looked at when a text is made


def cases() -> Iterator[tuple[str, bytes]]:
    for path in PATHS:
        yield from ((path, body) for body in BODIES)
        for name, values in BAD.items():
            if path == PATHS[1] and name in OF_GENERATIONS:
                continue
            for value in values:
                yield path, json.dumps({"messages": MESSAGES, "max_tokens": 2, name: value}).encode()
    yield PATHS[0], json.dumps({"messages": MESSAGES}).encode()  # max_tokens must be there
    unknown = {"format": {"type": "json_schema", "schema": {"type": "array", "uniqueItems": True}}}
    yield PATHS[0], json.dumps({"messages": MESSAGES, "max_tokens": 2, "output_config": unknown}).encode()


def require_error(answer: httpx.Response, case: object = "") -> dict[str, Any]:
    """The answer is an error of the client's in Anthropic's form."""
    assert 400 <= answer.status_code < 500, (case, answer.status_code, answer.text[:300])
    body = answer.json()
    assert set(body) == {"type", "error", "request_id"}, case
    assert body["type"] == "error"
    assert body["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    assert set(error) == {"type", "message"}
    assert error["type"] in ("invalid_request_error", "not_found_error", "request_too_large")
    assert error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) <= 1200
    return error


def test_each_is_refused_within_a_second(server: Served) -> None:
    count, wrong = 0, []
    with httpx.Client(base_url=server.url, timeout=10) as client:
        for path, body in cases():
            start = time.perf_counter()
            answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
            seconds = time.perf_counter() - start
            if answer.status_code < 400 or seconds >= 1:
                wrong.append((path, body[:200], answer.status_code, seconds))
            else:
                require_error(answer, body[:200])
            count += 1
    assert not wrong
    assert count >= 500
    assert server.chat().status_code == 200
    assert server.pair.engine.occupancy == (0, 0)


def test_the_error_names_the_field(server: Served) -> None:
    with httpx.Client(base_url=server.url, timeout=10) as client:
        for name, values in BAD.items():
            for stream in (False, True) if name != "stream" else (1,):
                asked = {"messages": MESSAGES, "max_tokens": 2, "stream": stream, name: values[0]}
                message = require_error(client.post(PATHS[0], json=asked), name)["message"]
                assert name in message, message


def test_the_block_is_named(server: Served) -> None:
    messages = user({"type": "text", "text": "x"}, {"type": "image"})
    message = require_error(server.post(PATHS[0], {"messages": messages, "max_tokens": 1}))["message"]
    assert message.startswith("messages[2].content[1]: ")
    assert "image" in message


def test_null_is_as_if_it_was_not_given(server: Served) -> None:
    expected = server.post(PATHS[0], {"messages": MESSAGES, "max_tokens": 4}).json()["content"]
    nulls = dict.fromkeys(BAD.keys() - {"messages", "max_tokens"})
    assert server.post(PATHS[0], {"messages": MESSAGES, "max_tokens": 4, **nulls}).json()["content"] == expected


def test_unknown_fields(server: Served, demo: Any) -> None:
    asked = {"messages": MESSAGES, "max_tokens": 2}
    assert server.post(PATHS[0], {**asked, "temprature": 1}).status_code == 200
    with served(demo, strict=True) as strict:
        error = require_error(strict.post(PATHS[0], {**asked, "temprature": 1}))
        assert "temperature" in error["message"]
        known = {"metadata": {"user_id": "me"}, "service_tier": "auto", "context_management": {"edits": []}}
        assert strict.post(PATHS[0], {**asked, **known}).status_code == 200


def test_slow_and_large_bodies(server: Served) -> None:
    large = json.dumps({"messages": [{"role": "user", "content": "x" * (1 << 18)}]}).encode()
    answer = httpx.post(server.url + PATHS[0], content=large)
    assert answer.status_code == 413
    assert require_error(answer)["type"] == "request_too_large"

    def slowly() -> Iterator[bytes]:
        yield b"{"
        time.sleep(0.8)
        yield b"}"

    answer = httpx.post(server.url + PATHS[0], content=slowly(), timeout=10)
    assert answer.status_code == 408
    require_error(answer)
