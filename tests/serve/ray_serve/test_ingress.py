"""What the ingress does beside forwarding: lost replicas, clients of other machines, counts of all replicas."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncGenerator
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("ray.serve", reason="ray is not installed; the extra ray has it")

import httpx

with warnings.catch_warnings():  # Ray defines its settings in a way that pydantic warns of
    warnings.simplefilter("ignore")
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import BackPressureError

    from pard_onnx.serve.ray.arguments import Arguments
    from pard_onnx.serve.ray.ingress import Ingress, labelled
    from pard_onnx.serve.ray.model_server import Forwarded

BODY = {"messages": [{"role": "user", "content": "Hello"}]}


def start(kind: bytes = b"application/json") -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind), (b"x-request-id", b"a")]}


def body(data: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


class Answer:
    """As Ray's answers: messages or an exception, one after the other."""

    def __init__(self, steps: list[Any]) -> None:
        self._steps = steps
        self.cancelled = False

    async def __aiter__(self) -> AsyncGenerator[list[Any], None]:
        for step in self._steps:
            if isinstance(step, Exception):
                raise step
            yield [step]

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """As Ray's handles, with scripted answers."""

    def __init__(self, *answers: list[Any]) -> None:
        self.answers = [Answer(steps) for steps in answers]
        self.options_given: list[dict[str, Any]] = []
        self.requests: list[Forwarded] = []

    def options(self, **options: Any) -> Handle:
        self.options_given.append(options)
        return self

    def remote(self, request: Forwarded) -> Answer:
        self.requests.append(request)
        return self.answers[len(self.requests) - 1]


def ask(handle: Handle, client: str = "127.0.0.1", headers: dict[str, str] | None = None, **settings: Any) -> Any:
    app = Ingress(handle, Arguments(target="T", **settings)).__serve_build_asgi_app__()  # type: ignore[arg-type]

    return asyncio.run(sent(app, "/v1/chat/completions", BODY, client, headers))


async def sent(app: Any, path: str, content: Any, client: str = "127.0.0.1", headers: Any = None) -> httpx.Response:
    transport = httpx.ASGITransport(app, client=(client, 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as made:
        return await made.post(path, json=content, headers=headers)


def test_the_answer_is_that_of_the_replica() -> None:
    handle = Handle([start(), body(b"a", True), body(b"b")])
    found = ask(handle, headers={"Origin": "http://localhost", "x-request-id": "mine"})
    assert found.content == b"ab"
    assert "x-request-id" not in found.headers  # Ray's proxy adds it
    headers = dict(handle.requests[0].headers)
    assert headers[b"x-request-id"] == b"mine"
    assert b"origin" not in headers
    assert len(handle.options_given[0]["session_id"]) == 64


def test_a_request_whose_answer_has_not_begun_goes_to_another_replica() -> None:
    assert ask(Handle([RayActorError()], [start(), body(b"a")])).content == b"a"


def test_a_request_that_ends_its_replicas_is_not_sent_on_and_on() -> None:
    handle = Handle(*[[RayActorError()]] * 9)
    found = ask(handle)
    assert (found.status_code, found.json()["error"]["code"]) == (503, "replica_lost")
    assert len(handle.requests) == 2
    assert handle.answers[0].cancelled


def test_a_stream_that_has_begun_ends_with_an_error() -> None:
    found = ask(Handle([start(b"text/event-stream"), body(b"data: 1\n\n", True), RayActorError()], [start()]))
    events = found.text.strip().split("\n\n")
    assert events[0] == "data: 1"
    assert '"code":"replica_lost"' in events[1]
    assert len(events) == 2


def test_a_full_queue_has_its_own_error() -> None:
    found = ask(Handle([BackPressureError(1, 1)]))
    assert (found.status_code, found.json()["error"]["code"]) == (503, "busy")
    assert int(found.headers["retry-after"]) > 0


def test_an_unforeseen_error_says_no_more_than_its_type() -> None:
    found = ask(Handle([ValueError("a secret path")]))
    assert found.status_code == 500
    assert "secret" not in found.text


def test_without_a_key_the_client_must_be_of_this_machine() -> None:
    assert ask(Handle(), client="192.0.2.7").json()["error"]["code"] == "client_not_allowed"
    assert ask(Handle([start(), body(b"a")]), client="::1").content == b"a"
    key = {"Authorization": "Bearer secret"}
    assert ask(Handle([start(), body(b"a")]), client="192.0.2.7", headers=key, api_key="secret").content == b"a"
    assert ask(Handle(), client="192.0.2.7", api_key="secret").status_code == 401


def test_a_body_that_is_too_large_is_refused_here() -> None:
    assert ask(Handle(), max_request_bytes=3).status_code == 413


def test_the_counts_of_replicas_are_told_apart() -> None:
    text = '# HELP pard_a_total A.\n# TYPE pard_a_total counter\npard_a_total{}x="1"{}\n'
    one = text.replace('{}x="1"{}', " 3")
    two = text.replace('{}x="1"{}', '{x="1"} 4')
    assert labelled([("r1", one), ("r2", two)]).splitlines() == [
        "# HELP pard_a_total A.",
        "# TYPE pard_a_total counter",
        'pard_a_total{replica="r1"} 3',
        'pard_a_total{replica="r2",x="1"} 4',
    ]
    assert labelled([]) == ""


def test_a_response_goes_to_the_replica_that_stored_the_one_before() -> None:
    handle = Handle(*[[start(), body(b'{"id":"resp_%d"}' % number)] for number in range(4)])
    app = Ingress(handle, Arguments(target="T")).__serve_build_asgi_app__()  # type: ignore[arg-type]
    for content in (
        {"input": "Hello"},
        {"input": "more", "previous_response_id": "resp_0"},
        {"input": "and more", "previous_response_id": "resp_1"},
        {"input": "another one"},
    ):
        asyncio.run(sent(app, "/v1/responses", content))
    keys = [given["session_id"] for given in handle.options_given]
    assert keys[0] == keys[1] == keys[2] != keys[3]
