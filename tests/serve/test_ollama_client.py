"""The server through Ollama's own client: the texts are the library's, and so are errors."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

pytest.importorskip("starlette")
ollama = pytest.importorskip("ollama", reason="the package ollama is not installed; the extra dev has it")

import httpx  # noqa: E402
from pydantic import BaseModel  # noqa: E402
from served import MESSAGES, Served, served, wait_until  # noqa: E402
from test_replies import TEMPLATE  # noqa: E402
from test_serving import ENDLESS, lines_of, streaming  # noqa: E402

from pard_onnx.models.manifest import Manifest  # noqa: E402
from pard_onnx.serve import sse  # noqa: E402
from pard_onnx.serve.sources import Source  # noqa: E402

MODEL = "demo"
# A text of seconds
LONG = {"num_predict": 1900, "draft_length": 0, "temperature": 1.0, "seed": 1, "logit_bias": ENDLESS["logit_bias"]}
# Thinks where it is told to, and has results of tools by their calls' ids
THINKING = TEMPLATE.replace("begun", "enable_thinking").replace(
    "'<|im_start|>' + message.role", "'<|im_start|>' + message.role + (message.tool_call_id or '')"
)
# Calls are JSON without a tag around it, as Llama's are
CALLING = """{%- if tools %}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '{"name": , "parameters": }' }}
{%- endif %}{%- for message in messages %}{{- message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{- call.function.arguments | tojson }}{%- endfor %}{{- '\\n' }}
{%- endfor %}"""


def add_up(first: int, second: int) -> int:
    """Adds two numbers.

    Args:
        first (int): One number
        second (int): Another one
    """
    return first + second


class Colour(BaseModel):
    """What the model is to write."""

    name: Literal["red", "green"]
    share: Literal[1, 2]


@pytest.fixture
def client(server: Served) -> Iterator[Any]:
    with ollama.Client(server.url) as made:
        yield made


def with_template(demo: Source, folder: Path, template: str) -> Source:
    """The shipped pair with another chat template."""
    shutil.copytree(demo.target, folder)
    old = Manifest.read(folder)
    replace(old, spec=replace(old.spec, chat_template=template)).write(folder)
    return replace(demo, target=str(folder))


@pytest.fixture(scope="module")
def talker(demo: Source, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(with_template(demo, tmp_path_factory.mktemp("talker") / "target", THINKING)) as running:
        running.chat()
        yield running


@pytest.fixture(scope="module")
def caller(demo: Source, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(with_template(demo, tmp_path_factory.mktemp("caller") / "target", CALLING)) as running:
        running.chat()
        yield running


# ---- texts

# Options of Ollama, and the same ones of the library
WAYS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"num_predict": 12}, {"max_new_tokens": 12}),
    (
        {"num_predict": 12, "temperature": 0.9, "seed": 5, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
        {"max_new_tokens": 12, "temperature": 0.9, "seed": 5, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    ),
    ({"num_predict": -1, "stop": ["self"]}, {"max_new_tokens": 2000, "stop": "self"}),
    (
        {"num_predict": 12, "repeat_penalty": 1.2, "presence_penalty": 1.5, "frequency_penalty": 0.3},
        {"max_new_tokens": 12, "repetition_penalty": 1.2, "presence_penalty": 1.5, "frequency_penalty": 0.3},
    ),
    ({"num_predict": 12, "num_ctx": 4096, "num_gpu": 1, "mirostat": 0, "draft_length": 0}, {"max_new_tokens": 12}),
]


@pytest.mark.parametrize(("options", "library"), WAYS)
def test_texts_are_the_librarys(server: Served, client: Any, options: Any, library: Any) -> None:
    expected = server.pair.generate(MESSAGES, **library)
    whole = client.chat(MODEL, MESSAGES, options=options)
    assert whole.message.content == expected.text
    assert whole.message.role == "assistant"
    assert (whole.done, whole.done_reason) == (True, expected.finish_reason)
    assert (whole.eval_count, whole.prompt_eval_count) == (expected.stats.new_tokens, expected.stats.prompt_tokens)
    assert whole.total_duration > whole.eval_duration > 0
    parts = list(client.chat(MODEL + ":latest", MESSAGES, options=options, stream=True))
    assert len(parts) > 2
    assert "".join(part.message.content for part in parts) == expected.text
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert (parts[-1].done_reason, parts[-1].eval_count) == (whole.done_reason, whole.eval_count)
    assert {part.model for part in parts} == {MODEL + ":latest"}


def test_the_asynchronous_client(server: Served) -> None:
    expected = server.pair.generate(MESSAGES, max_new_tokens=10).text

    async def ask() -> tuple[str, str]:
        client = ollama.AsyncClient(server.url)
        options = {"num_predict": 10}
        whole = await client.generate(MODEL, MESSAGES[0]["content"], options=options)
        stream = await client.chat(MODEL, MESSAGES, options=options, stream=True)
        text = "".join([part.message.content async for part in stream])
        await client.close()
        return whole.response, text

    assert asyncio.run(ask()) == (expected, expected)


def test_prompts(server: Served, client: Any) -> None:
    pair, options, prompt = server.pair, {"num_predict": 12}, "def fibonacci(n):"
    raw = client.generate(MODEL, prompt, raw=True, options=options)
    assert raw.response == pair.generate(prompt, max_new_tokens=12).text
    assert raw.context is None
    found = client.generate(MODEL, prompt, system="Be brief.", options=options)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]
    expected = pair.generate(messages, max_new_tokens=12)
    assert found.response == expected.text
    assert found.context == [*pair.encode(messages), *expected.tokens]
    parts = list(client.generate(MODEL, prompt, system="Be brief.", options=options, stream=True))
    assert "".join(part.response for part in parts) == expected.text
    assert parts[-1].context == found.context


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_the_context_of_an_answer_is_a_conversation(server: Served, client: Any, system: str) -> None:
    options = {"num_predict": 10}
    messages = [{"role": "system", "content": system}] if system else []
    context: list[int] = []
    for question in ("Add two numbers", "And <|im_end|> three?", "Thanks"):
        messages.append({"role": "user", "content": question})
        expected = server.pair.generate(messages, max_new_tokens=10)
        found = client.generate(MODEL, question, system=system, context=context, options=options)
        assert (found.response, found.prompt_eval_count) == (expected.text, expected.stats.prompt_tokens)
        context = found.context
        assert context == [*server.pair.encode(messages), *expected.tokens]
        messages.append({"role": "assistant", "content": expected.text})


def test_log_probabilities_are_the_librarys(server: Served, client: Any) -> None:
    expected = server.pair.generate(MESSAGES, max_new_tokens=6, logprobs=3).logprobs
    assert expected is not None
    wanted = [(one.text, one.logprob, [(other.text, other.logprob) for other in one.top]) for one in expected]
    way = {"options": {"num_predict": 6}, "logprobs": True, "top_logprobs": 3}

    def told(found: Any) -> list[Any]:
        return [(one.token, one.logprob, [(two.token, two.logprob) for two in one.top_logprobs]) for one in found or ()]

    assert told(client.chat(MODEL, MESSAGES, **way).logprobs) == wanted
    assert told(client.generate(MODEL, MESSAGES[0]["content"], **way).logprobs) == wanted
    streamed = client.chat(MODEL, MESSAGES, stream=True, **way)
    assert [one for part in streamed for one in told(part.logprobs)] == wanted


def test_formats(server: Served, client: Any) -> None:
    pytest.importorskip("llguidance")
    found = client.chat(MODEL, MESSAGES, format=Colour.model_json_schema(), options={"num_predict": 300})
    Colour.model_validate_json(found.message.content)
    parts = client.generate(MODEL, "A colour", format={"enum": [{"a": 1}, {"a": 2}]}, stream=True)
    assert json.loads("".join(part.response for part in parts)) in ({"a": 1}, {"a": 2})
    text = client.chat(MODEL, MESSAGES, format="json", options={"num_predict": 3}).message.content
    assert text.startswith("{")


def test_a_conversation_that_is_too_long_loses_its_oldest_turns(server: Served, client: Any) -> None:
    long = [{"role": "user", "content": "long " * 3000}, {"role": "assistant", "content": "ok"}, *MESSAGES]
    expected = server.pair.generate(MESSAGES, max_new_tokens=8).text
    assert client.chat(MODEL, long, options={"num_predict": 8}).message.content == expected
    answer = server.post("/api/chat", {"model": MODEL, "messages": long, "truncate": False})
    assert answer.status_code == 400
    assert "tokens" in answer.json()["error"]


# ---- tools and thinking


def test_calls_of_python_functions(caller: Served) -> None:
    pytest.importorskip("llguidance")
    # The demo's model never calls a tool by itself
    numbers = {"first": {"const": 2}, "second": {"const": 3}}
    arguments = {"type": "object", "properties": numbers, "required": [*numbers], "additionalProperties": False}
    schema = {"type": "object", "properties": {"name": {"const": "add_up"}, "parameters": arguments},
              "required": ["name", "parameters"], "additionalProperties": False}  # fmt: skip
    with ollama.Client(caller.url) as client:
        way = {"tools": [add_up], "format": schema, "options": {"num_predict": 100}}
        found = client.chat(MODEL, MESSAGES, **way)
        parts = list(client.chat(MODEL, MESSAGES, stream=True, **way))
        (call,) = found.message.tool_calls
        assert (call.function.name, call.function.arguments) == ("add_up", {"first": 2, "second": 3})
        assert found.message.content == ""
        assert found.done_reason == "stop"
        assert [one for part in parts for one in part.message.tool_calls or ()] == [call]
        assert add_up(**call.function.arguments) == 5
        result = {"role": "tool", "tool_name": "add_up", "content": "5"}
        again = client.chat(MODEL, [*MESSAGES, found.message, result], tools=[add_up], options={"num_predict": 5})
        assert again.message.content
        assert "tools" in client.show(MODEL).capabilities


def test_a_result_belongs_to_the_call_of_its_tool(talker: Served) -> None:
    calls = [{"function": {"name": name, "arguments": {"x": 1}}} for name in ("a", "b", "a")]
    results = [{"role": "tool", "tool_name": name, "content": name} for name in ("b", "a", "a")]
    own = [{"id": f"call0000{n}", "type": "function", "function": call["function"]} for n, call in enumerate(calls)]
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": "", "tool_calls": own},
        *(
            {"role": "tool", "tool_call_id": f"call0000{n}", "content": name}
            for n, name in ((1, "b"), (0, "a"), (2, "a"))
        ),
    ]
    expected = talker.pair.generate(messages, max_new_tokens=8)
    with ollama.Client(talker.url) as client:
        asked = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": calls}, *results]
        found = client.chat(MODEL, asked, options={"num_predict": 8})
    assert (found.message.content, found.prompt_eval_count) == (expected.text, expected.stats.prompt_tokens)


@pytest.mark.parametrize("think", [True, "high"])
def test_thinking_is_apart_from_the_answer(talker: Served, think: bool | str) -> None:
    way: dict[str, Any] = {"template_arguments": {"enable_thinking": True}, "max_reasoning_tokens": 12}
    expected = talker.pair.generate(MESSAGES, max_new_tokens=30, **way)
    assert expected.reasoning
    assert expected.text
    options = {"num_predict": 30, "max_reasoning_tokens": 12}
    with ollama.Client(talker.url) as client:
        found = client.chat(MODEL, MESSAGES, think=think, options=options).message
        parts = [part.message for part in client.chat(MODEL, MESSAGES, think=think, options=options, stream=True)]
        prompt = MESSAGES[0]["content"]
        answer = client.generate(MODEL, prompt, think=think, options=options)
        without = client.chat(MODEL, MESSAGES, think=False, options={"num_predict": 10}).message
        context = answer.context
        later = client.generate(MODEL, "And?", think=think, context=context, options={"num_predict": 10})
        assert "thinking" in client.show(MODEL).capabilities
    assert (found.thinking, found.content) == (expected.reasoning, expected.text)
    assert "".join(part.thinking or "" for part in parts) == expected.reasoning
    assert "".join(part.content for part in parts) == expected.text
    assert (answer.thinking, answer.response) == (expected.reasoning, expected.text)
    assert (without.thinking, without.content) == (None, talker.pair.generate(MESSAGES, max_new_tokens=10).text)
    assert later.thinking  # the demo's model does not end its thinking
    assert later.response == ""


def test_models_that_always_think_can_be_told_not_to(demo: Source, tmp_path: Path) -> None:
    always = with_template(demo, tmp_path / "target", TEMPLATE.replace("begun", "true"))
    with served(always) as server, ollama.Client(server.url) as client:
        options = {"num_predict": 10}
        assert client.chat(MODEL, MESSAGES, options=options).message.thinking
        found = client.chat(MODEL, MESSAGES, think=False, options=options).message
        assert not found.thinking
        assert found.content


def test_models_that_cannot_think_say_so(client: Any) -> None:
    with pytest.raises(ollama.ResponseError, match='"demo" does not support thinking') as error:
        client.chat(MODEL, MESSAGES, think=True)
    assert error.value.status_code == 400
    assert client.chat(MODEL, MESSAGES, think=False, options={"num_predict": 2}).message.content


# ---- models


def test_models_are_listed_and_described(server: Served, client: Any) -> None:
    manifest = server.pair.target_manifest
    (listed,) = client.list().models
    assert listed.model == "demo:latest"
    assert listed.size == manifest.bytes
    assert len(listed.digest) == 64
    (running,) = client.ps().models
    assert (running.name, running.digest, running.size_vram) == ("demo:latest", listed.digest, 0)
    assert running.context_length == server.pair.capacity
    for name in ("demo", "demo:latest"):
        found = client.show(name)
        assert found.template == manifest.spec.chat_template
        assert found.capabilities == ["completion"]
        assert found.details == listed.details
        assert found.modelinfo["qwen2.context_length"] == manifest.capacity
    assert server.get("/api/version").json()["version"]


def test_models_are_loaded_and_unloaded(demo: Source) -> None:
    with served(demo) as server, ollama.Client(server.url) as client:
        assert client.list().models  # not loaded yet
        assert not client.ps().models
        for ask in (lambda **way: client.generate(MODEL, **way), lambda **way: client.chat(MODEL, **way)):
            assert (found := ask()).done_reason == "load"
            assert found.done
            assert len(client.ps().models) == 1
            assert ask(keep_alive=0).done_reason == "unload"
            assert not client.ps().models
            assert ask(keep_alive="0s").done_reason == "unload"  # as often as one likes
        client.chat(MODEL, MESSAGES, options={"num_predict": 1}, keep_alive="300ms")
        assert len(client.ps().models) == 1
        wait_until(lambda: not client.ps().models)
        client.chat(MODEL, MESSAGES, options={"num_predict": 1}, keep_alive=0)
        wait_until(lambda: not client.ps().models)
        client.generate(MODEL, keep_alive="1h")
        (running,) = client.ps().models
        assert 3500 < (running.expires_at.timestamp() - server.service.started) < 3700


def test_a_model_in_use_is_unloaded_when_it_is_free(demo: Source) -> None:
    with served(demo) as server, ollama.Client(server.url) as client:
        client.generate(MODEL)
        stream = client.chat(MODEL, MESSAGES, options=LONG, stream=True)
        next(stream)
        assert client.generate(MODEL, keep_alive=0).done_reason == "unload"
        assert len(client.ps().models) == 1
        assert not next(stream).done
        stream.close()
        wait_until(lambda: not client.ps().models)
        assert client.chat(MODEL, MESSAGES, options={"num_predict": 2}).message.content


def test_requests_that_unload_the_model_do_not_disturb_one_another(demo: Source) -> None:
    async def ask(client: Any, number: int) -> str:
        await asyncio.sleep(number * 0.03)
        options = {"num_predict": 5}
        return str((await client.chat(MODEL, MESSAGES, options=options, keep_alive=number % 3 // 2)).message.content)

    async def all_of_them(url: str) -> list[str]:
        client = ollama.AsyncClient(url)
        found = await asyncio.gather(*(ask(client, number) for number in range(16)))
        await client.generate(MODEL, keep_alive=0)
        await client.close()
        return found

    with served(demo) as server:
        assert len(set(asyncio.run(all_of_them(server.url)))) == 1
        wait_until(lambda: not server.service.registry.open)


# ---- errors, and clients that go away

REFUSED: list[tuple[int, str, Callable[[Any], Any]]] = [
    (404, "no model 'gpt'", lambda client: client.chat("gpt", MESSAGES)),
    (404, "no model 'gpt'", lambda client: list(client.generate("gpt", "a", stream=True))),
    (404, "no model", lambda client: client.show("gpt:7b")),
    (400, "temperature", lambda client: client.chat(MODEL, MESSAGES, options={"temperature": -1})),
    (400, "images", lambda client: client.generate(MODEL, "a", images=[b"123"])),
    (400, "suffix", lambda client: client.generate(MODEL, "a", suffix="b")),
    (400, "template", lambda client: client.generate(MODEL, "a", template="{{ .Prompt }}")),
    (400, "capacity|tokens", lambda client: client.generate(MODEL, "long " * 4000)),
    (501, "hidden states", lambda client: client.embed(MODEL, "a")),
    (501, "hidden states", lambda client: client.embeddings(MODEL, "a")),
    (501, "pard-models", lambda client: client.pull("llama3.2")),
    (501, "pard-models", lambda client: list(client.pull("llama3.2", stream=True))),
    (501, "pard-models", lambda client: client.push(MODEL)),
    (501, "pard-models", lambda client: client.create("x", from_=MODEL)),
    (501, "pard-models", lambda client: client.copy(MODEL, "x")),
    (501, "pard-models", lambda client: client.delete(MODEL)),
]


@pytest.mark.parametrize(("status", "words", "ask"), REFUSED)
def test_errors_are_the_clients_own(client: Any, status: int, words: str, ask: Callable[[Any], Any]) -> None:
    with pytest.raises(ollama.ResponseError, match=words) as error:
        ask(client)
    assert error.value.status_code == status


def test_an_error_in_a_stream_is_its_last_line(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fail(part: Any) -> dict[str, Any]:
        asked.append(part)
        return {} if len(asked) < 3 else {"logprobs": asked[99]}

    monkeypatch.setattr("pard_onnx.serve.ollama_api.generation.logprobs_of", fail)
    with pytest.raises(ollama.ResponseError, match="IndexError, not foreseen") as error:
        list(client.chat(MODEL, MESSAGES, stream=True))
    assert error.value.status_code == -1  # the stream had begun


def test_keys_are_asked_for(demo: Source) -> None:
    with served(demo, api_key="secret") as server:
        with ollama.Client(server.url) as client, pytest.raises(ollama.ResponseError, match="API key") as error:
            client.list()
        assert error.value.status_code == 401
        with ollama.Client(server.url, headers={"Authorization": "Bearer secret"}) as client:
            assert client.list().models
        foreign = server.get("/api/tags", headers={"Origin": "http://evil.example"})
        assert (foreign.status_code, type(foreign.json()["error"])) == (403, str)


def test_a_stream_that_is_left_frees_its_place(server: Served, client: Any) -> None:
    stream = client.chat(MODEL, MESSAGES, stream=True, options=LONG)
    next(stream)
    assert server.pair.engine.occupancy != (0, 0)
    stream.close()
    assert wait_until(lambda: server.pair.engine.occupancy == (0, 0)) < 0.5


def test_a_stream_that_waits_is_kept_alive_by_spaces(demo: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE", 0.1)
    with served(demo, max_live=1) as server, ollama.Client(server.url) as client:
        server.chat()
        body = {"model": MODEL, "messages": MESSAGES, "options": {"num_predict": 3}}
        expected = client.chat(**body).message.content
        raw: list[bytes] = []
        texts: list[str] = []

        def ask() -> None:
            with httpx.stream("POST", server.url + "/api/chat", json=body, timeout=30) as answer:
                raw.extend(answer.iter_raw())

        def ask_by_the_client() -> None:
            texts.extend(part.message.content for part in client.chat(**body, stream=True))

        with streaming(server, **ENDLESS) as first:
            rest = lines_of(first)
            next(rest)
            threads = [threading.Thread(target=one) for one in (ask, ask_by_the_client)]
            for thread in threads:
                thread.start()
            wait_until(lambda: len(raw) >= 2)
        for thread in threads:
            thread.join(20)
        assert raw[:2] == [b" ", b" "]
        assert "".join(json.loads(line)["message"]["content"] for line in b"".join(raw).splitlines()) == expected
        assert "".join(texts) == expected


def test_probes(server: Served) -> None:
    assert server.get("/").text.startswith("<!doctype html>")
    assert server.get("/", headers={"Accept": "text/html,application/xhtml+xml"}).text.startswith("<!doctype html>")
    for accepted in ("application/json", "text/plain"):
        assert server.get("/", headers={"Accept": accepted}).text == "Ollama is running"
    for path in ("/", "/api/tags", "/api/version"):
        assert httpx.head(server.url + path, timeout=10).status_code == 200
