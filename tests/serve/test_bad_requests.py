"""Requests that are wrong: each gets a 4xx in the error form within a second, and the server goes on."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

pytest.importorskip("starlette")

import httpx
from served import MESSAGES, Served

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
HUGE: list[Any] = [1e308, -1e308, 10**30, -(10**30), 10**400]
NO_NUMBERS: list[Any] = ["1", True, [1], {"a": 1}, [], {}]
NO_TEXTS: list[Any] = [1, 1.5, True, ["a"], {"a": "b"}]
DEEP: Any = "x"
for _ in range(150):
    DEEP = [DEEP]
BAD_CHAT: dict[str, list[Any]] = {
    "temperature": [*NO_NUMBERS, *HUGE, -0.1],
    "top_p": [*NO_NUMBERS, *HUGE, -0.1, 0, 1.1],
    "top_k": [*NO_NUMBERS, *HUGE, -1, 0.5],
    "min_p": [*NO_NUMBERS, *HUGE, -0.1, 1.1],
    "presence_penalty": [*NO_NUMBERS, *HUGE],
    "frequency_penalty": [*NO_NUMBERS, *HUGE],
    "repetition_penalty": [*NO_NUMBERS, *HUGE, 0],
    "seed": [*NO_NUMBERS, *HUGE, -1, 0.5],
    "max_tokens": [*NO_NUMBERS, *HUGE[:4], 0, -1, 0.5],
    "max_completion_tokens": [*NO_NUMBERS, *HUGE[:4], 0, -1],
    "max_reasoning_tokens": [*NO_NUMBERS, *HUGE[:4], -1],
    "n": [*NO_NUMBERS, *HUGE, 0, -1, 129],
    "draft_length": [*NO_NUMBERS, *HUGE, -1, 33, "long"],
    "logprobs": [1, "true", []],
    "top_logprobs": [*NO_NUMBERS, *HUGE, -1, 21, 5],
    "stop": [1, True, {"a": 1}, [1], [""], "", [None]],
    "stop_token_ids": [1, "1", ["1"], [-1], [10**9], [True]],
    "logit_bias": [1, [1], {"a": 1}, {"-1": 1}, {"1": "1"}, {"1": 10**400}, {"999999": 1}, {"1.5": 1}, {"²": 1}],
    "stream": [1, "true", []],
    "stream_options": [1, [], {"include_usage": 1}],
    "model": [*NO_TEXTS, "gpt-4o", "../demo", "x" * 10_000],
    "messages": [
        *NO_TEXTS, "hi", [], [[]], [{}], [{"role": 1, "content": "x"}], [{"content": "x"}],
        [{"role": "user", "content": 1}], [{"role": "us\ner", "content": ""}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "input_audio"}]}], [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "text", "text": 1}]}], [{"role": "user", "content": DEEP}], [None],
    ],
    "tools": [1, "x", {}, [1], [{}], [{"type": "function"}], [{"type": "function", "function": {"name": "a b"}}]],
    "tool_choice": [1, [], {}, "required", {"type": "function", "function": {"name": "x"}}],
    "parallel_tool_calls": [1, "yes", []],
    "response_format": [
        1, "json", [], {"type": "jsn_object"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {}},
    ],
    "chat_template_kwargs": [1, "x", [], {"messages": []}, {"tools": 1}, {"x": DEEP}],
    "special_tokens": [1, "no", []],
    "overflow": [1, "no", []],
    "continue_final_message": [1, "true", [], True],  # the last message is a user's
    "modalities": [1, ["audio"], ["text", "audio"], "text"],
    "audio": [{"voice": "x"}],
    "web_search_options": [{}],
    "functions": [[]],
    "function_call": ["auto"],
    "regex": [1, "(", []],
    "choice": [1, [], [1], "x"],
    "grammar": [1, []],
}  # fmt: skip
BAD_PLAIN: dict[str, list[Any]] = {
    "prompt": [1, True, {}, [], [[]], [["a"]], [1.5], [True], [-1], [10**9], [[1], 2], "", [""]],
    "suffix": ["x", 1],
    "best_of": [2, "x"],
    "echo": [1, "true"],
    "logprobs": [*NO_NUMBERS, *HUGE, -1, 21],
    "max_tokens": [*NO_NUMBERS, *HUGE[:4], -1, 0],
    "n": [0, 129],
}
BODIES = [
    b"", b"{", b"[", b'"', b"nul", b"{}{}", b"[]", b"1", b"null", b"true", b'"text"', b"\xff\xfe",
    b'{"messages": "\xff"}',
    b'{"a": NaN}', b'{"a": Infinity}', b'{"a": -Infinity}', b"{'a': 1}", b'{"a": 1,}', b"\x00", b"[" * 100_000,
    b'{"a":' * 20_000, b"[" * 300 + b"]" * 300, b'{"n": ' + b"9" * 10_000 + b"}", b"messages=hello", b"--form\r\n",
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "{“messages”: []}".encode(), b"\xef\xbb\xbf{}",
    '{"messages": []}'.encode("utf-16"), b'{"messages": [{"role": "user", "content": "a"}], "stop": "\\udfff"}',
]  # fmt: skip


def cases() -> Iterator[tuple[str, bytes]]:
    """Paths and bodies."""
    for path in (CHAT, PLAIN, "/tokenize", "/detokenize"):
        yield from ((path, body) for body in BODIES)
    for name, values in BAD_CHAT.items():
        yield from (
            (CHAT, json.dumps({"messages": MESSAGES, "max_tokens": 2, name: value}).encode()) for value in values
        )
    for name, values in BAD_PLAIN.items():
        yield from ((PLAIN, json.dumps({"prompt": "a", "max_tokens": 2, name: value}).encode()) for value in values)


def require_error(answer: httpx.Response, case: object = "") -> dict[str, Any]:
    """The answer is an error of the client's in OpenAI's form."""
    assert 400 <= answer.status_code < 500, (case, answer.status_code, answer.text[:300])
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) <= 1200
    return error


def test_each_is_refused_within_a_second(server: Served) -> None:
    count = 0
    with httpx.Client(base_url=server.url, timeout=10) as client:
        for path, body in cases():
            start = time.perf_counter()
            answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
            seconds = time.perf_counter() - start
            require_error(answer, body[:200])
            assert seconds < 1, body[:200]
            count += 1
    assert count >= 200
    assert server.chat().status_code == 200
    assert server.pair.engine.occupancy == (0, 0)


def test_streams_are_refused_with_a_status_too(server: Served) -> None:
    for name, values in BAD_CHAT.items():
        if name != "stream":
            error = require_error(server.chat(stream=True, **{name: values[0]}), name)
            assert name in error["message"] or error["param"] == name


@pytest.mark.parametrize("name", [name for name in BAD_CHAT if name != "grammar"])
def test_the_error_names_the_field(server: Served, name: str) -> None:
    error = require_error(server.chat(**{name: BAD_CHAT[name][0]}))
    assert error["param"] == name
    assert name in error["message"]


def test_null_is_as_if_it_was_not_given(server: Served) -> None:
    expected = server.chat().json()["choices"]
    nulls = dict.fromkeys(BAD_CHAT.keys() - {"messages", "max_tokens"})
    assert server.chat(**nulls).json()["choices"] == expected


def test_paths_and_methods(server: Served) -> None:
    for method, path, status in (
        ("GET", "/nothing", 404), ("POST", "/v1", 404), ("GET", CHAT, 405), ("DELETE", "/v1/models", 405),
        ("PUT", CHAT, 405), ("GET", "/v1/models/nothing", 404), ("GET", "/v1/models/../../etc/passwd", 404),
        ("GET", "/" + "x" * 4000, 404), ("GET", "/%00", 404), ("GET", "/%ff", 404),
    ):  # fmt: skip
        answer = httpx.request(method, server.url + path, timeout=10)
        assert answer.status_code == status
        require_error(answer, path)
    assert "POST" in httpx.get(server.url + CHAT).headers["allow"]


def raw(server: Served, *pieces: bytes, pause: float = 0.0) -> bytes:
    """What the server answers to these bytes, until it closes the connection."""
    with socket.create_connection(server.address, timeout=5) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)
        answer = b""
        while data := connection.recv(65536):
            answer += data
        return answer


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"


def test_too_large_bodies(server: Served) -> None:
    large = json.dumps({"messages": [{"role": "user", "content": "x" * (1 << 18)}]}).encode()
    answer = httpx.post(server.url + CHAT, content=large)
    assert answer.status_code == 413
    assert require_error(answer)["code"] == "request_too_large"
    for length in (b"99999999999", b"9" * 18):  # refused before it is read
        assert b" 413 " in raw(server, HEAD + b"Content-Length: " + length + b"\r\n\r\n{").split(b"\r\n")[0]
    chunked = b"".join(b"10000\r\n" + b" " * 0x10000 + b"\r\n" for _ in range(5))
    assert b" 413 " in raw(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked)
    assert server.chat().status_code == 200


def test_slow_clients(server: Served) -> None:
    start = time.perf_counter()
    answer = raw(server, HEAD + b"Content-Length: 100\r\n\r\n{")
    assert b" 408 " in answer
    assert b'"code":"request_timeout"' in answer
    assert time.perf_counter() - start < 1
    body = json.dumps({"messages": MESSAGES, "max_tokens": 1}).encode()
    assert b'"code": "request_timeout"' in raw(server, b"GET / HT")
    pieces = [body[at : at + 20] for at in range(0, len(body), 20)]  # slow, but not too slow
    head = HEAD + b"Content-Length: %d\r\n\r\n" % len(body)
    assert b" 200 " in raw(server, head, *pieces, pause=0.1)


ASK = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
REFUSED = b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n{"


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        ((ASK, b"GET / HT"), True),
        ((ASK + b"GET / HT",), True),
        ((ASK, ASK, b"P"), True),
        ((ASK, *[b"x"] * 30), False),  # byte by byte: the client may still send when the connection is closed
        ((REFUSED, b" "), False),  # a body that never ends, whose request was answered
    ],
)
def test_half_a_later_request_is_not_waited_for(server: Served, pieces: tuple[bytes, ...], told: bool) -> None:
    start, answer = time.perf_counter(), b""
    with socket.create_connection(server.address, timeout=5) as connection, suppress(ConnectionError):
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.05)
        while data := connection.recv(65536):
            answer += data
    assert time.perf_counter() - start < 3
    if told:
        assert answer.count(b'"code": "request_timeout"') == 1


def test_a_connection_may_rest_between_requests(server: Served) -> None:
    """Longer than the head of a request may take."""
    with httpx.Client(base_url=server.url, limits=httpx.Limits(max_connections=1)) as client:
        first = client.get("/health").extensions["network_stream"].get_extra_info("client_addr")
        time.sleep(0.8)
        second = client.get("/health").extensions["network_stream"].get_extra_info("client_addr")
    assert first == second


def test_what_is_no_http(server: Served) -> None:
    hello = b"\x16\x03\x01\x02\x00\x01\x00"  # of TLS
    no_length = HEAD + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n"
    for data in (hello + b"\r\n\r\n", b"GARBAGE\r\n\r\n", HEAD + b"X: " + b"x" * 70_000, no_length):
        answer = raw(server, data)
        assert b" 400 " in answer.split(b"\r\n")[0]
        assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["message"]
    for many in (HEAD + b"Content-Length: 5\r\n\r\n", HEAD, b"POST "):  # the client goes away in the middle
        with socket.create_connection(server.address) as connection:
            connection.sendall(many)
    assert server.chat().status_code == 200


def test_unknown_fields(server: Served, demo: Any) -> None:
    from served import served

    assert server.chat(temprature=1, user="me", store=True).status_code == 200
    with served(demo, strict=True) as strict:
        error = require_error(strict.chat(temprature=1))
        assert error["param"] == "temprature"
        assert "temperature" in error["message"]
        known = {"user": "me", "store": True, "metadata": {}, "chat_template_kwargs": {"enable_thinking": False}}
        assert strict.chat(**known).status_code == 200
