"""Long use of pard-serve by clients of every kind: right texts, no stuck place, flat memory, a server that answers.

PARD_SOAK_SECONDS says how long (600).
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from statistics import median
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("llguidance")
psutil = pytest.importorskip("psutil")

from served import wait_until  # noqa: E402

from pard_onnx import Pair, load  # noqa: E402

SECONDS = float(os.environ.get("PARD_SOAK_SECONDS", "600"))
CLIENTS = 16
HEALTH = 1.0  # seconds within which /health answers
GROWTH = 24 << 20  # bytes that the later part of the time may add to resident memory
WARM_UP, LAST = (0.2, 0.4), (0.8, 1.0)  # the parts of the time whose memory is compared
MIDDLE = 0.05  # seconds that a client waits at most before it does something unexpected
CHAT = "/v1/chat/completions"
SERVE = "from pard_onnx.entry_points import serve; serve()"
PROMPTS = ("Write a function that adds two numbers", "class Stack:", "def parse(text):", "# read a file\n", "for i in")
NEXT = ("Now with a docstring", "Shorter", "Again, please")
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["red", "green"]}, "count": {"enum": [1, 2, 3]}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
# Fields of requests; the library has options of the same names, but for n
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"draft_length": 0},
    {"temperature": 0.9, "seed": 5, "top_p": 0.9},
    {"temperature": 1.1, "seed": 7, "n": 2},
    {"stop": ["self", "\n\n"]},
    {"response_format": FORMAT},
)
BAD: tuple[bytes, ...] = (
    b"", b"{", b"[1]", b"\xff", b'{"messages": 1}', b'{"messages": []}', b'{"messages": [{"role": "user"}], "n": 0}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}', b'{"model": "none", "messages": []}',
    b"[" * 5000, json.dumps({"messages": [{"role": "user", "content": "x " * 9000}]}).encode(),
)  # fmt: skip
ENDLESS = {
    "max_tokens": 1800,
    "temperature": 1.0,
    "seed": 1,
    "draft_length": 0,
    "logit_bias": {"2039": -100, "2037": -100},
}


@dataclass(frozen=True)
class Asked:
    """A request, and what the library writes for it."""

    body: dict[str, Any]
    texts: tuple[str, ...]


@dataclass
class Soak:
    """What all clients share."""

    address: tuple[str, int]
    requests: tuple[Asked, ...]
    conversations: tuple[tuple[Asked, ...], ...]
    end: float = 0.0  # perf_counter() at which no client begins anything more
    done: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def connect(self) -> HTTPConnection:
        return HTTPConnection(*self.address, timeout=120)

    def post(self, connection: HTTPConnection, body: bytes | dict[str, Any]) -> HTTPResponse:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", CHAT, content, {"Content-Type": "application/json"})
        return connection.getresponse()

    def require(self, condition: object, what: str, *facts: object) -> None:
        if not condition:
            self.problems.append(f"{what}: {' '.join(str(fact)[:300] for fact in facts)}")


def events(answer: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The events of a stream, to its end; one without [DONE] has an event "cut"."""
    for line in iter(answer.readline, b""):
        if line.strip() == b"data: [DONE]":
            return
        if line.startswith(b"data: "):
            yield json.loads(line[6:])
    yield {"cut": True, "choices": []}


def streamed_texts(found: Iterator[dict[str, Any]]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for one in found:
        if "cut" in one or "error" in one:
            return {-1: str(one)}
        for choice in one["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + (choice["delta"].get("content") or "")
    return texts


# ---- what clients do


def whole(soak: Soak, dice: random.Random, asked: Asked | None = None) -> None:
    asked = asked or dice.choice(soak.requests)
    connection = soak.connect()
    try:
        answer = soak.post(connection, asked.body)
        content = json.loads(answer.read())
        texts = tuple(one["message"]["content"] or "" for one in content.get("choices", ()))
        soak.require(texts == asked.texts, "whole", answer.status, asked, texts or content)
    finally:
        connection.close()


def streamed(soak: Soak, dice: random.Random, asked: Asked | None = None, pause: float = 0.0) -> None:
    asked = asked or dice.choice(soak.requests)
    connection = soak.connect()
    try:
        found = events(soak.post(connection, {**asked.body, "stream": True}))

        def slowly() -> Iterator[dict[str, Any]]:
            for one in found:
                time.sleep(pause)
                yield one

        texts = streamed_texts(slowly() if pause else found)
        soak.require(tuple(texts[i] for i in sorted(texts)) == asked.texts, "streamed", asked, texts)
    finally:
        connection.close()


def slow_reader(soak: Soak, dice: random.Random) -> None:
    streamed(soak, dice, pause=0.03)


def goes_on(soak: Soak, dice: random.Random) -> None:
    for asked in dice.choice(soak.conversations):
        (whole if dice.random() < 0.5 else streamed)(soak, dice, asked)


def leaves_before_the_first_byte(soak: Soak, dice: random.Random) -> None:
    connection = soak.connect()
    body = {**dice.choice(soak.requests).body, **ENDLESS, "stream": dice.random() < 0.5}
    connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
    time.sleep(dice.random() * MIDDLE)
    connection.close()


def leaves_in_the_middle(soak: Soak, dice: random.Random) -> None:
    connection = soak.connect()
    answer = soak.post(connection, {**dice.choice(soak.requests).body, **ENDLESS, "stream": True})
    found = events(answer)
    for _ in range(dice.randrange(40)):
        next(found, None)
    answer.close()
    connection.close()


def sends_half(soak: Soak, dice: random.Random) -> None:
    body = json.dumps({**dice.choice(soak.requests).body, "stream": True}).encode()
    whole_request = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (
        CHAT.encode(),
        len(body),
        body,
    )
    with socket.create_connection(soak.address) as client:
        client.sendall(whole_request[: dice.randrange(len(whole_request))])
        time.sleep(dice.random() * MIDDLE)


def sends_nonsense(soak: Soak, dice: random.Random) -> None:
    connection = soak.connect()
    try:
        body = dice.choice(BAD)
        answer = soak.post(connection, body)
        content = json.loads(answer.read())
        right = 400 <= answer.status < 500 and content["error"]["message"]
        soak.require(right, "nonsense", body[:60], answer.status, content)
    finally:
        connection.close()


ACTIONS: dict[Callable[[Soak, random.Random], None], int] = {
    whole: 4,
    streamed: 6,
    slow_reader: 1,
    goes_on: 2,
    leaves_before_the_first_byte: 2,
    leaves_in_the_middle: 4,
    sends_half: 2,
    sends_nonsense: 2,
}


def client(soak: Soak, seed: int) -> None:
    """One client after the other does something at random, until the time is over."""
    dice = random.Random(seed)
    while time.perf_counter() < soak.end and not soak.problems:
        action = dice.choices(list(ACTIONS), list(ACTIONS.values()))[0]
        try:
            action(soak, dice)
        except Exception as error:
            soak.problems.append(f"{action.__name__}: {type(error).__name__}: {error}")
        soak.done[action.__name__] += 1


# ---- the test


@dataclass(frozen=True)
class Usage:
    resident: int
    files: int
    threads: int

    @classmethod
    def of(cls, process: Any) -> Usage:
        files = process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
        return cls(process.memory_info().rss, files, process.num_threads())


def expected(pair: Pair) -> tuple[tuple[Asked, ...], tuple[tuple[Asked, ...], ...]]:
    """Requests and conversations, with the library's texts."""
    requests = []
    for number, prompt in enumerate(PROMPTS):
        for fields in WAYS:
            most, options = 12 + 9 * number, {**base(pair), **fields}
            messages = [{"role": "user", "content": prompt}]
            seeds = range(options["seed"], options["seed"] + options.pop("n", 1)) if "seed" in options else (None,)
            found = [pair.generate(messages, max_new_tokens=most, **{**options, "seed": seed}) for seed in seeds]
            body = {"messages": messages, "max_tokens": most, **fields}
            requests.append(Asked(body, tuple(one.text for one in found)))
    conversations = []
    for prompt in PROMPTS:
        messages, turns = [], []
        for said in (prompt, *NEXT):
            messages = [*messages, {"role": "user", "content": said}]
            text = pair.generate(messages, **base(pair), max_new_tokens=24).text
            turns.append(Asked({"messages": messages, "max_tokens": 24}, (text,)))
            messages = [*messages, {"role": "assistant", "content": text}]
        conversations.append(tuple(turns))
    return tuple(requests), tuple(conversations)


def base(pair: Pair) -> dict[str, Any]:
    """What a server's generations start from."""
    return {"sampling": "model"} if pair.own_sampling is not None else {}


def get(address: tuple[str, int], path: str) -> str:
    connection = HTTPConnection(*address, timeout=30)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def occupancy(address: tuple[str, int]) -> list[int]:
    return [
        int(found) for found in re.findall(r"pard_generations_(?:running|waiting){.*} (\d+)", get(address, "/metrics"))
    ]


def watch(soak: Soak, process: Any, used: list[tuple[float, Usage]]) -> None:
    while time.perf_counter() < soak.end:
        start = time.perf_counter()
        soak.require('"ok"' in get(soak.address, "/health"), "health")
        seconds = time.perf_counter() - start
        soak.require(seconds < HEALTH, "health took", seconds)
        used.append((start, Usage.of(process)))
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
def test_clients_of_every_kind_for_long(demo_folder: Callable[[str, str], Path], tmp_path: Path) -> None:
    folders = str(demo_folder("demo-target", "int4")), str(demo_folder("demo-draft", "int8"))
    with load(*folders) as pair:
        requests, conversations = expected(pair)
    words = ["--target", folders[0], "--draft", folders[1], "--port", "0", "--json", "--cache-bytes", "16MiB"]
    with (tmp_path / "stderr").open("w") as errors:
        process = subprocess.Popen([sys.executable, "-c", SERVE, *words], stdout=subprocess.PIPE, stderr=errors)
    try:
        assert process.stdout
        facts = json.loads(process.stdout.readline())
        host, port = facts["url"].removeprefix("http://").split(":")
        soak = Soak((host, int(port)), requests, conversations)
        for asked in requests:
            whole(soak, random.Random(0), asked)
        soak_for_long(soak, psutil.Process(facts["pid"]))
        stops_while_streams_run(soak, process)
    finally:
        process.kill()
        process.communicate()
    written = (tmp_path / "stderr").read_text()
    assert not written, written[-2000:]


def soak_for_long(soak: Soak, process: Any) -> None:
    idle = settled(soak, process)
    start, used = time.perf_counter(), list[tuple[float, Usage]]()
    soak.end = start + SECONDS
    watcher = threading.Thread(target=watch, args=(soak, process, used))
    watcher.start()
    with ThreadPoolExecutor(CLIENTS) as pool:
        for seed in range(CLIENTS):
            pool.submit(client, soak, seed)
    watcher.join()
    print(dict(soak.done), idle, used[-1][1])
    assert not soak.problems, soak.problems[:5]
    assert all(soak.done[action.__name__] for action in ACTIONS)
    after = settled(soak, process)
    first, last = (
        median(one.resident for at, one in used if part[0] <= (at - start) / SECONDS <= part[1])
        for part in (WARM_UP, LAST)
    )
    print(f"resident {first / 2**20:.1f} MiB, then {last / 2**20:.1f}; idle: {idle}, then {after}")
    assert last - first <= GROWTH, (first, last)
    assert after.files <= idle.files and after.threads <= idle.threads, (idle, after)


def settled(soak: Soak, process: Any) -> Usage:
    """What the process holds when nothing runs and idle threads have ended. No generation may be stuck."""
    wait_until(lambda: occupancy(soak.address) == [0, 0], 15)
    time.sleep(4)
    return Usage.of(process)


def stops_while_streams_run(soak: Soak, process: subprocess.Popen[bytes]) -> None:
    """SIGTERM: the streams get their ends, and the process its exit code."""

    def stream(_: int) -> str:
        connection = soak.connect()
        try:
            found = events(soak.post(connection, {**soak.requests[0].body, **ENDLESS, "stream": True}))
            next(found)
            running.release()
            return "cut" if any("cut" in one for one in found) else "ended"
        finally:
            connection.close()

    running = threading.Semaphore(0)
    with ThreadPoolExecutor(4) as pool:
        ends = pool.map(stream, range(4))
        for _ in range(4):
            assert running.acquire(timeout=30)
        process.send_signal(signal.SIGTERM)
        assert list(ends) == ["ended"] * 4
    assert process.wait(30) == 128 + signal.SIGTERM
