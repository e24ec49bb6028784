"""The server on two local nodes of Ray, with the shipped pair and OpenAI's client."""

from __future__ import annotations

import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("ray.serve", reason="ray is not installed; the extra ray has it")
openai = pytest.importorskip("openai", reason="the package openai is not installed; the extra dev has it")

import httpx  # noqa: E402

with warnings.catch_warnings():  # Ray defines its settings in a way that pydantic warns of
    warnings.simplefilter("ignore")
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

from pard_onnx import Pair, load  # noqa: E402
from pard_onnx.serve.ray import app  # noqa: E402
from pard_onnx.serve.sources import Source  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of Ray and what it imports

OBJECT_STORE = 80 << 20
# A long text, a round for each token: no draft, and no end of text
ENDLESS: dict[str, Any] = {
    "max_tokens": 1900,
    "temperature": 1.0,
    "seed": 1,
    "logit_bias": {"2039": -100, "2037": -100},
    "extra_body": {"draft_length": 0},
}


def chat(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Write a function that adds {number} numbers and prints their sum"}]


def wait_until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    start = time.perf_counter()
    while not condition():
        assert time.perf_counter() - start < seconds
        time.sleep(0.1)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of Ray's HTTP proxy, on a cluster of two nodes with a core each."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": OBJECT_STORE, "include_dashboard": False},
    )
    cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE)
    ray.init(address=cluster.address, log_to_driver=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "0.0.0.0", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


def deploy(demo: Source, **arguments: Any) -> None:
    serve.run(app({"target": demo.target, "draft": demo.drafts[0], "name": "demo", **arguments}))


def running_models() -> int:
    deployments = serve.status().applications["default"].deployments
    return deployments["ModelServer"].replica_states.get("RUNNING", 0)


@pytest.fixture(scope="module")
def deployed(url: str, demo: Source) -> str:
    """A deployment that starts with one replica, and goes up to two."""
    deploy(demo, max_replicas="2", target_ongoing_requests="1", upscale_delay_s="1", grace="20")
    return url


@pytest.fixture(scope="module")
def two_replicas(deployed: str) -> str:
    """The same after a load that needs a second replica."""
    stop = threading.Event()

    def load_it(number: int) -> None:
        with client_of(deployed) as client:
            while not stop.is_set():
                client.chat.completions.create(model="demo", messages=chat(number), **{**ENDLESS, "max_tokens": 300})

    with ThreadPoolExecutor(8) as pool:
        working = [pool.submit(load_it, number) for number in range(8)]
        try:
            wait_until(lambda: running_models() == 2 or any(one.done() for one in working), 120)
        finally:
            stop.set()
        for one in working:
            one.result()
    return deployed


HEADERS = {"Authorization": "Bearer secret", "Origin": "http://page.example"}


@pytest.fixture(scope="module")
def guarded(url: str, demo: Source) -> str:
    """A deployment with a key, and with place for two requests and one that waits. It takes the place of the others."""
    deploy(demo, api_key="secret", cors="http://page.example", max_live="1", max_queue="1")
    return url


def client_of(url: str, key: str = "none") -> Any:
    return openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0, timeout=120)


def numbers_of(url: str, name: str) -> dict[str, float]:
    """The samples whose names begin so, by name and labels."""
    lines = httpx.get(url + "/metrics").text.splitlines()
    found = (line.rsplit(" ", 1) for line in lines if line.startswith(name))
    return {labels: float(value) for labels, value in found}


@pytest.fixture(scope="module")
def pair(demo: Source) -> Iterator[Pair]:
    with load(demo.target, demo.drafts[0]) as opened:
        yield opened


def test_the_texts_of_concurrent_chats_are_the_librarys(deployed: str, pair: Pair) -> None:
    def one(number: int) -> tuple[str, Any]:
        with client_of(deployed) as client:
            ask: dict[str, Any] = {"model": "demo", "messages": chat(number), "max_tokens": 60, "seed": number}
            ask["temperature"] = 0.9 if number % 2 else 0.0
            if number < 4:
                return client.chat.completions.create(**ask).choices[0].message.content, ask
            with client.chat.completions.create(**ask, stream=True) as stream:
                return "".join(chunk.choices[0].delta.content or "" for chunk in stream), ask

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(8)))
    for number, (text, ask) in enumerate(found):
        options = {"seed": number, "temperature": ask["temperature"]}
        assert text == pair.generate(chat(number), max_new_tokens=60, **options).text
    assert len({text for text, _ in found}) > 4


def test_the_other_endpoints_answer(deployed: str) -> None:
    assert httpx.get(deployed + "/health").json() == {"status": "ok"}
    assert [one["id"] for one in httpx.get(deployed + "/v1/models").json()["data"]] == ["demo"]
    assert httpx.get(deployed + "/").headers["content-type"].startswith("text/html")
    missing = httpx.get(deployed + "/nothing")
    assert missing.status_code == 404
    assert missing.json()["error"]["message"].startswith("there is nothing at /nothing")
    assert "," not in missing.headers["x-request-id"]
    for body in (b"{", b'{"messages": 3}', b"\xff"):
        refused = httpx.post(deployed + "/v1/chat/completions", content=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["type"] == "invalid_request_error"


def test_without_a_key_other_machines_are_refused(deployed: str) -> None:
    port = deployed.rpartition(":")[2]
    elsewhere = f"http://{ray.util.get_node_ip_address()}:{port}"
    refused = httpx.get(elsewhere + "/v1/models", headers={"Host": "localhost"})
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "client_not_allowed"


def test_a_client_that_goes_away_ends_its_text(deployed: str) -> None:
    def running() -> float:
        return sum(numbers_of(deployed, "pard_generations_running").values())

    with client_of(deployed) as client:
        with client.chat.completions.create(model="demo", messages=chat(1), stream=True, **ENDLESS) as stream:
            next(iter(stream))
            assert running() == 1
        wait_until(lambda: running() == 0, 2)


def test_the_load_starts_a_second_replica(two_replicas: str) -> None:
    assert running_models() == 2  # on two nodes, since each has one core


def replica_names() -> list[str]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return [one["name"] for one in named if "#ModelServer#" in one["name"]]


def test_the_second_turn_goes_to_the_replica_that_has_the_first(two_replicas: str) -> None:
    used = numbers_of(two_replicas, "pard_prompt_tokens_total")
    with client_of(two_replicas) as client:
        for number in range(100, 112):
            messages: list[Any] = chat(number)
            first = client.chat.completions.create(model="demo", messages=messages, max_tokens=30)
            messages += [
                {"role": "assistant", "content": first.choices[0].message.content},
                {"role": "user", "content": "And now the product"},
            ]
            second = client.chat.completions.create(model="demo", messages=messages, max_tokens=5)
            assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1
    grown = numbers_of(two_replicas, "pard_prompt_tokens_total")
    assert len(grown) == 2
    assert all(grown[name] > used[name] for name in grown)  # conversations are spread


def test_the_service_recovers_from_a_killed_replica(two_replicas: str) -> None:
    with client_of(two_replicas) as client:
        with client.chat.completions.create(model="demo", messages=chat(1), stream=True, **ENDLESS) as stream:
            chunks = iter(stream)
            next(chunks)
            for name in replica_names():
                ray.kill(ray.get_actor(name, namespace="serve"))
            with pytest.raises(openai.APIError, match="the replica that had this request has ended"):
                list(chunks)
        again = client.chat.completions.create(model="demo", messages=chat(1), max_tokens=5)
        assert again.usage.completion_tokens == 5
    wait_until(lambda: running_models() >= 1)


def test_keys_and_origins(guarded: str) -> None:
    assert httpx.get(guarded + "/health").status_code == 200
    assert httpx.get(guarded + "/v1/models").status_code == 401
    allowed = httpx.get(guarded + "/v1/models", headers=HEADERS)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "http://page.example"
    refused = httpx.get(guarded + "/v1/models", headers={**HEADERS, "Origin": "http://other.example"})
    assert refused.status_code == 403


def test_a_full_queue_is_busy(guarded: str) -> None:
    stop = threading.Event()

    def hold_a_place(number: int) -> None:
        with client_of(guarded, "secret") as client:
            ask: dict[str, Any] = {"model": "demo", "messages": chat(number), **ENDLESS}
            while not stop.is_set():
                try:
                    with client.chat.completions.create(**ask, stream=True) as stream:
                        for _ in stream:
                            if stop.is_set():
                                break
                except openai.InternalServerError:  # requests that come at once may be refused before places are given
                    time.sleep(0.05)

    def answer() -> httpx.Response | None:
        body = {"messages": chat(9), "max_tokens": 1}
        try:
            return httpx.post(guarded + "/v1/chat/completions", json=body, headers=HEADERS, timeout=0.5)
        except httpx.ReadTimeout:
            return None  # it had a place in the queue

    with ThreadPoolExecutor(4) as pool:
        for number in range(4):
            pool.submit(hold_a_place, number)
        try:
            found: list[httpx.Response | None] = []
            wait_until(lambda: found.append(answer()) or (found[-1] and found[-1].status_code == 503), 20)
        finally:
            stop.set()
    busy = found[-1]
    assert busy is not None
    assert busy.json()["error"]["code"] == "busy"
    assert int(busy.headers["retry-after"]) >= 1


def test_a_text_that_runs_is_finished_when_the_service_stops(url: str, demo: Source) -> None:
    deploy(demo)
    with client_of(url) as client:
        ask: dict[str, Any] = {"model": "demo", "messages": chat(3), **ENDLESS}
        with client.chat.completions.create(**ask, stream=True) as stream:
            chunks = iter(stream)
            next(chunks)
            serve.delete("default", _blocking=False)
            rest = list(chunks)
    assert rest[-1].choices[0].finish_reason == "length"
