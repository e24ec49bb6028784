"""What a server does beside generating: queues, clients that go away, keys, origins, limits, metrics, the page."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import threading
import time
from typing import Any

import pytest

pytest.importorskip("starlette")

import httpx
from served import MESSAGES, Served, served, wait_until

from pard_onnx.models.errors import BadInput
from pard_onnx.serve import sse
from pard_onnx.serve.page import load_page
from pard_onnx.serve.settings import Settings
from pard_onnx.serve.sources import Source

# A long text, a round for each token: no draft, and no end of text
ENDLESS = {
    "messages": MESSAGES,
    "max_tokens": 1900,
    "draft_length": 0,
    "temperature": 1.0,
    "seed": 1,
    "logit_bias": {"2039": -100, "2037": -100},
}


def is_free(server: Served) -> bool:
    return server.pair.engine.occupancy == (0, 0)


def lines_of(answer: httpx.Response) -> Any:
    return (line for line in answer.iter_lines() if line)


# ---- clients that go away


def test_a_client_that_goes_away_frees_its_place_within_a_step(server: Served) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + "/v1/chat/completions", json=ENDLESS, timeout=httpx.Timeout(5, read=0.1))
    assert wait_until(lambda: is_free(server)) < 0.5


def test_a_stream_that_is_left_frees_its_place_within_a_step(server: Served) -> None:
    with streaming(server, **ENDLESS) as answer:
        lines = lines_of(answer)
        next(lines)
        assert not is_free(server)
    assert wait_until(lambda: is_free(server)) < 0.5


def test_clients_that_go_away_at_random_leave_no_stuck_slot(server: Served) -> None:
    expected = server.chat(max_tokens=30).json()["choices"]

    async def one(number: int, client: httpx.AsyncClient) -> None:
        dice = random.Random(number)
        body = {**ENDLESS, "seed": number, "stream": dice.random() < 0.6}
        try:
            async with asyncio.timeout(dice.random() * 0.25):
                async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    async for _ in answer.aiter_bytes():
                        pass
        except TimeoutError:
            return

    async def all_of_them() -> None:
        async with httpx.AsyncClient(base_url=server.url, limits=httpx.Limits(max_connections=12)) as client:
            await asyncio.gather(*(one(number, client) for number in range(60)))

    asyncio.run(all_of_them())
    wait_until(lambda: is_free(server))
    assert server.service.generations.count == 0
    wait_until(lambda: server.service.registry.open[0].users == 0)
    assert server.chat(max_tokens=30).json()["choices"] == expected


@pytest.mark.slow
def test_a_client_that_does_not_read_is_given_up(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE", 0.1)
    monkeypatch.setattr(sse, "STALLED", 0.3)
    large = {"n": 128, "logprobs": True, "top_logprobs": 20, "temperature": 0, "draft_length": 7}
    body = json.dumps({**ENDLESS, **large, "stream": True}).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(server.address)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        client.sendall((head % len(body)).encode() + body)
        wait_until(lambda: server.service.generations.count == 1)
        wait_until(lambda: server.service.generations.count == 0 and server.service.registry.open[0].users == 0, 20)
    assert is_free(server)


# ---- the queue


def streaming(server: Served, **body: Any) -> Any:
    body = {"messages": MESSAGES, "stream": True, **body}
    return httpx.stream("POST", server.url + "/v1/chat/completions", json=body, timeout=30)


def test_a_full_queue_is_busy(demo: Source) -> None:
    with served(demo, max_live=1, max_queue=1) as server:
        server.chat()
        with streaming(server, **ENDLESS) as answer:
            lines = lines_of(answer)  # without a reference, httpx would close the connection
            next(lines)
            waiting = threading.Thread(target=lambda: server.chat(max_tokens=1))
            waiting.start()
            wait_until(lambda: server.pair.engine.occupancy == (1, 1))
            for stream in (False, True):
                refused = server.chat(stream=stream)
                assert refused.status_code == 503
                assert 1 <= int(refused.headers["retry-after"]) <= 60
                assert refused.json()["error"]["code"] == "busy"
            assert server.get("/health").status_code == 200
            numbers = metrics_of(server)
            assert numbers['pard_generations_running{model="demo"}'] == 1
            assert numbers['pard_generations_waiting{model="demo"}'] == 1
        waiting.join(20)
        assert server.chat().status_code == 200


def test_a_request_that_waits_is_kept_alive(demo: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE", 0.1)
    with served(demo, max_live=1) as server:
        server.chat()
        with streaming(server, **ENDLESS) as first:
            rest = lines_of(first)
            next(rest)
            got: list[str] = []

            def wait_in_line() -> None:
                with streaming(server, max_tokens=2) as second:
                    got.extend(lines_of(second))

            thread = threading.Thread(target=wait_in_line)
            thread.start()
            wait_until(lambda: len(got) >= 2)
        thread.join(20)
        assert got[:2] == [": waiting"] * 2
        assert got[-1] == "data: [DONE]"


def test_the_timeout_ends_a_text(demo: Source) -> None:
    with served(demo, timeout=0.15) as server:
        server.chat()
        start = time.perf_counter()
        found = server.post("/v1/chat/completions", ENDLESS).json()
        assert time.perf_counter() - start < 1
        assert found["choices"][0]["finish_reason"] == "length"
        assert found["pard"]["finish_reason"] == "timeout"


def test_running_streams_end_when_the_server_stops(demo: Source) -> None:
    got: list[str] = []

    def read() -> None:
        with streaming(server, **ENDLESS) as answer:
            got.extend(lines_of(answer))

    with served(demo, grace_seconds=0.2) as server:
        server.chat()
        thread = threading.Thread(target=read)
        thread.start()
        wait_until(lambda: len(got) > 3)
    thread.join(20)
    assert got[-1] == "data: [DONE]"
    assert json.loads(got[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


# ---- who may use it


def test_a_key_is_demanded(demo: Source) -> None:
    with served(demo, api_key="secret") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"x-api-key": "wrong"}):
            for path in ("/v1/models", "/metrics"):
                refused = server.get(path, headers=headers)
                assert refused.status_code == 401
                assert refused.json()["error"]["code"] == "invalid_api_key"
        for headers in (
            {"Authorization": "Bearer secret"},
            {"authorization": "bearer secret"},
            {"x-api-key": "secret"},
        ):
            assert server.get("/v1/models", headers=headers).status_code == 200
        assert server.get("/").status_code == 200
        assert server.get("/health").status_code == 200
        assert server.get("/v1/models", headers={"Authorization": b"Bearer \xff"}).status_code == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("127.0.0.1:8000", 200), ("[::1]:80", 200), ("127.1.2.3", 200), ("evil.example", 403),
     ("localhost.evil.example", 403), ("192.168.1.5:8000", 403)],
)  # fmt: skip
def test_without_a_key_only_this_machines_names_are_answered(server: Served, host: str, status: int) -> None:
    assert server.get("/v1/models", headers={"Host": host}).status_code == status


def test_pages_of_other_sites(server: Served, demo: Source) -> None:
    for origin in ("http://evil.example", "null", "http://localhost:1"):
        assert server.get("/v1/models", headers={"Origin": origin}).status_code == 403
    assert server.get("/v1/models", headers={"Origin": server.url}).status_code == 200
    with served(demo, cors=("http://app.example",), api_key="secret") as allowing:
        asked = {"Origin": "http://app.example", "Access-Control-Request-Method": "POST",
                 "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
        answer = httpx.options(allowing.url + "/v1/chat/completions", headers=asked)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "http://app.example"
        answer = allowing.get("/v1/models", headers={"Origin": "http://app.example", "Authorization": "Bearer secret"})
        assert answer.headers["access-control-allow-origin"] == "http://app.example"
        refused = allowing.get("/v1/models", headers={"Origin": "http://app.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "http://app.example"  # so that the page can read it
        assert allowing.get("/v1/models", headers={"Origin": "http://evil.example"}).status_code == 403


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"host": "0.0.0.0"}, "--api-key"), ({"host": "example.org"}, "--api-key"), ({"api_key": ""}, "empty"),
        ({"api_key": "ü"}, "ASCII"), ({"cors": ("app.example",)}, "http://HOST"), ({"timeout": 0}, "timeout"),
        ({"max_live": 0}, "max_live"), ({"max_queue": -1}, "max_queue"), ({"memory": 0}, "memory"),
        ({"timeout": float("nan")}, "timeout"), ({"cors": ("http://a/",)}, "without a path"),
    ],
)  # fmt: skip
def test_settings_are_checked(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=re.escape(words)):
        Settings(**settings)


# ---- ids, metrics, the page, tokens


def test_each_answer_has_an_id(server: Served) -> None:
    assert server.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for given in ("", "a b", "x" * 200, "a\tb"):
        made = server.get("/nothing", headers={"X-Request-Id": given}).headers["x-request-id"]
        assert re.fullmatch(r"req-[0-9a-f]{24}", made)


def metrics_of(server: Served) -> dict[str, float]:
    answer = server.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    for line in lines:
        assert re.fullmatch(r'# (HELP|TYPE) pard_\w+ .+|pard_\w+(\{(\w+="[^"]*",?)+\})? [-+.\de]+', line), line
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_metrics_count_what_was_done(server: Served) -> None:
    before = metrics_of(server)
    found = server.chat(max_tokens=20).json()
    server.get("/nothing")
    after = metrics_of(server)

    def grown(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    assert grown("pard_generated_tokens_total") == found["usage"]["completion_tokens"]
    assert grown("pard_prompt_tokens_total") == found["usage"]["prompt_tokens"]
    assert grown("pard_accepted_tokens_total") == found["pard"]["matched"]
    assert grown('pard_requests_total{path="/v1/chat/completions",status="200"}') == 1
    assert grown('pard_requests_total{path="other",status="404"}') == 1
    assert grown("pard_time_to_first_chunk_seconds_count") == 1
    assert after["pard_mean_accepted_tokens"] >= 1


def test_the_page_has_its_headers(server: Served) -> None:
    page, answer = load_page(), server.get("/")
    assert answer.content == page.body
    for name, value in page.headers.items():
        assert answer.headers[name] == value
    again = server.get("/", headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_tokens_go_there_and_back(server: Served) -> None:
    text = "def f(x):  # größer <|im_end|>"
    for name in ("prompt", "content"):
        found = server.post("/tokenize", {name: text}).json()
        assert found["count"] == len(found["tokens"])
        assert found["tokens"] == server.pair.tokenize(text)
        assert server.post("/detokenize", {"tokens": found["tokens"]}).json()["content"] == text
    assert server.post("/tokenize", {"messages": MESSAGES}).json()["tokens"] == server.pair.encode(MESSAGES)


def test_the_extension_fields(server: Served) -> None:
    with streaming(server, max_tokens=30, logit_bias=ENDLESS["logit_bias"]) as answer:
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines_of(answer) if line != "data: [DONE]"]
    last = chunks[-1]
    rounds = [chunk["pard"]["round"] for chunk in chunks if "round" in chunk.get("pard", {})]
    assert len(rounds) == last["pard"]["rounds"]
    assert sum(one["proposed"] for one in rounds) == last["pard"]["drafted"] == last["timings"]["draft_n"]
    assert sum(one["matched"] for one in rounds) == last["pard"]["matched"] == last["timings"]["draft_n_accepted"]
    accepted = [flag for chunk in chunks for flag in chunk.get("pard", {}).get("accepted", ())]
    assert len(accepted) == last["timings"]["predicted_n"]
    assert sum(accepted) <= last["pard"]["matched"]
    assert chunks[-2]["pard"]["mean_accepted"] == last["pard"]["mean_accepted"]
