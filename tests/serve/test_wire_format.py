"""What goes over the wire: answers and chunks against the types that OpenAI generates from its public description of
the API, and curl, which shows the bytes as they come."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("openai", reason="the package openai is not installed; the extra dev has it")

from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.shared import ErrorObject
from pydantic import BaseModel
from served import MESSAGES, Served, served, wait_until
from test_openai_client import SCHEMA
from test_replies import QUESTION, TOOLS, talker  # noqa: F401 a fixture
from test_serving import ENDLESS

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
CHATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampled": {"temperature": 1.2, "seed": 3, "n": 2},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "length": {"max_tokens": 1},
    "stop": {"stop": ["self", "("]},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
}
TEXTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "several": {"prompt": ["a", "b"], "n": 2},
    "logprobs": {"logprobs": 2},  # with echo the first one is null, as OpenAI's is, though its types say otherwise
    "echo": {"echo": True},
}
# Fields that the description requires though they may be null; the types have a default for them
NULLABLE = {"choices": {"logprobs"}, "message": {"content", "refusal"}}


def checked(kind: type[BaseModel], value: Any) -> Any:
    """The value as the type, which must have all fields and no wrong ones."""
    return kind.model_validate(value, strict=True)


def events(server: Served, path: str, body: dict[str, Any]) -> list[Any]:
    """The data of all events of a stream but the last."""
    answer = server.post(path, {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines[:-1]]


def require_same(server: Served, body: dict[str, Any]) -> ChatCompletion:
    """The answer, which has the types of OpenAI's and is the same as a stream."""
    whole = server.post(CHAT, body).json()
    typed: ChatCompletion = checked(ChatCompletion, whole)
    for choice in whole["choices"]:
        assert NULLABLE["choices"] <= choice.keys()
        assert NULLABLE["message"] <= choice["message"].keys()
    assert typed.usage is not None
    assert typed.usage.total_tokens == typed.usage.prompt_tokens + typed.usage.completion_tokens
    chunks = [checked(ChatCompletionChunk, one) for one in events(server, CHAT, body)]
    assert len({(chunk.id, chunk.model, chunk.created) for chunk in chunks}) == 1
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == typed.usage.total_tokens
    for index, choice in enumerate(typed.choices):
        own = [part for chunk in chunks for part in chunk.choices if part.index == index]
        assert [part.delta.role for part in own] == ["assistant"] + [None] * (len(own) - 1)
        assert "".join(part.delta.content or "" for part in own) == (choice.message.content or "")
        assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        calls = [call for part in own for call in part.delta.tool_calls or []]
        assert all(call.id for call in calls if call.function.name) and not any(
            call.id for call in calls if not call.function.name
        )
        assert len({call.index for call in calls}) == len(choice.message.tool_calls or [])
    return typed


@pytest.mark.parametrize("name", CHATS)
def test_chats(server: Served, name: str) -> None:
    if name == "schema":
        pytest.importorskip("llguidance")
    require_same(server, {"messages": MESSAGES, "max_tokens": 60, **CHATS[name]})


def test_chats_with_calls(talker: Served) -> None:  # noqa: F811
    body = {"messages": QUESTION, "tools": TOOLS, "tool_choice": "required", "max_reasoning_tokens": 0}
    body["parallel_tool_calls"] = False
    (choice,) = require_same(talker, {**body, "max_tokens": 300}).choices
    assert choice.finish_reason == "tool_calls"
    assert all(json.loads(call.function.arguments) is not None for call in choice.message.tool_calls)


@pytest.mark.parametrize("name", TEXTS)
def test_completions(server: Served, name: str) -> None:
    body = {"prompt": "def add(a, b):", "max_tokens": 12, **TEXTS[name]}
    whole = server.post(PLAIN, body).json()
    typed = checked(Completion, whole)
    assert all(NULLABLE["choices"] <= choice.keys() for choice in whole["choices"])
    found = events(server, PLAIN, body)
    for chunk in found:
        for choice in chunk["choices"]:
            assert "finish_reason" in choice  # null until the end, which only the description allows
            choice["finish_reason"] = choice["finish_reason"] or "stop"
    chunks = [checked(Completion, chunk) for chunk in found]
    for index, choice in enumerate(typed.choices):
        assert "".join(p.text for chunk in chunks for p in chunk.choices if p.index == index) == choice.text


def test_models_and_errors(server: Served) -> None:
    listed = server.get("/v1/models").json()
    assert listed["object"] == "list"
    (model,) = [checked(Model, one) for one in listed["data"]]
    assert checked(Model, server.get(f"/v1/models/{model.id}").json()) == model
    for answer in (
        server.chat(temperature=-1),
        server.chat(model="gpt-4o"),
        server.get("/v1/models/gpt-4o"),
        server.get("/nothing"),
        server.post("/v1/embeddings", {"input": "a"}),
    ):
        assert answer.status_code >= 400
        assert set(answer.json()) == {"error"}
        checked(ErrorObject, answer.json()["error"])


# ---- curl


@pytest.fixture(scope="module")
def curl(server: Served) -> Callable[..., subprocess.CompletedProcess[str]]:
    """curl of a path, with further arguments; a dict is the JSON that is posted."""
    program = shutil.which("curl")
    if program is None:
        pytest.skip("curl is not installed")

    def run(path: str, *more: Any) -> subprocess.CompletedProcess[str]:
        words = [word for one in more for word in (["--json", json.dumps(one)] if isinstance(one, dict) else [one])]
        command = [program, "--silent", "--show-error", "--noproxy", "*", "--max-time", "30", *words, server.url + path]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return run


ASK = {"messages": MESSAGES, "max_tokens": 30}


def test_curl_gets_an_answer(server: Served, curl: Callable[..., Any]) -> None:
    found = curl(CHAT, "--fail-with-body", ASK)
    assert found.returncode == 0
    expected = server.pair.generate(MESSAGES, max_new_tokens=30).text
    assert json.loads(found.stdout)["choices"][0]["message"]["content"] == expected


def test_curl_gets_a_stream(server: Served, curl: Callable[..., Any]) -> None:
    lines = curl(CHAT, "-N", {**ASK, "stream": True}).stdout.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == server.pair.generate(MESSAGES, max_new_tokens=30).text
    assert lines[-2:] == ["data: [DONE]", ""]


def test_curl_shows_a_stream_while_it_comes(server: Served, curl: Callable[..., Any]) -> None:
    command = [shutil.which("curl") or "", "-sN", "--noproxy", "*", "--json", json.dumps({**ENDLESS, "stream": True})]
    with subprocess.Popen([*command, server.url + CHAT], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(4):
            process.stdout.readline()
        assert server.service.generations.count == 1  # seconds of it are still to come
        process.terminate()
    wait_until(lambda: server.service.generations.count == 0)


def test_curl_tells_of_errors(curl: Callable[..., Any]) -> None:
    refused = curl(CHAT, "--fail-with-body", {**ASK, "temperature": "hot"})
    assert refused.returncode == 22  # of --fail
    assert json.loads(refused.stdout)["error"]["param"] == "temperature"
    streamed = curl(CHAT, "--fail-with-body", "-N", {**ASK, "stream": True, "n": 0})
    assert streamed.returncode == 22
    assert json.loads(streamed.stdout)["error"]["param"] == "n"
    unknown = curl("/v1/chat", "--write-out", "%{http_code}", "--output", "/dev/null")
    assert unknown.stdout == "404"


def test_curl_with_a_file_and_without_a_type(curl: Callable[..., Any], tmp_path: Any) -> None:
    """A body of --data has the type of a form, and is JSON all the same; a large one waits for 100 Continue."""
    file = tmp_path / "body.json"
    file.write_text(json.dumps(ASK))
    assert curl(CHAT, "--fail", "--data", f"@{file}").returncode == 0
    assert curl(CHAT, "--fail", "-H", "Expect: 100-continue", "--data", f"@{file}").returncode == 0
    assert curl(CHAT, "--fail", "-H", "Transfer-Encoding: chunked", "--data", f"@{file}").returncode == 0
    assert curl("/health", "--fail", "--http1.0").returncode == 0


def test_curl_with_a_key(demo: Any) -> None:
    program = shutil.which("curl")
    if program is None:
        pytest.skip("curl is not installed")
    with served(demo, api_key="secret") as server:
        command = [program, "-s", "--noproxy", "*", "--fail", server.url + "/v1/models"]
        codes = [
            subprocess.run([*command, *more], capture_output=True, timeout=30).returncode
            for more in ([], ["--oauth2-bearer", "wrong"], ["--oauth2-bearer", "secret"], ["-H", "x-api-key: secret"])
        ]
    assert codes == [22, 22, 0, 0]
