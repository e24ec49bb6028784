"""The server through Anthropic's own client: the texts are the library's, and so are errors."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("llguidance")
anthropic = pytest.importorskip("anthropic", reason="the package anthropic is not installed; the extra dev has it")

from anthropic.lib.streaming._messages import accumulate_event  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from served import MESSAGES, Served, served  # noqa: E402
from test_replies import QUESTION, TEMPLATE  # noqa: E402

from pard_onnx import Pair  # noqa: E402
from pard_onnx.models.manifest import Manifest  # noqa: E402
from pard_onnx.runtime.result import Chunk  # noqa: E402
from pard_onnx.runtime.text.tool_calls import ToolCallDelta  # noqa: E402
from pard_onnx.serve.anthropic_api.messages import StreamedBlocks  # noqa: E402
from pard_onnx.serve.sources import Source  # noqa: E402

MODEL = "demo"
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Ulm", "Bonn"]}, "days": {"enum": [1, 2]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
STOP: dict[str, Any] = {
    "name": "stop", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}
}  # fmt: skip
TOOLS = [WEATHER, STOP]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["red", "green"]}},
    "required": ["kind"],
    "additionalProperties": False,
}
SWITCHED = TEMPLATE.replace("{%- if begun %}", "{%- if enable_thinking %}")


def opened(url: str, **more: Any) -> Any:
    return anthropic.Anthropic(**{"base_url": url, "api_key": "none", "max_retries": 0, **more})


@pytest.fixture
def client(server: Served) -> Any:
    with opened(server.url) as made:
        yield made


@pytest.fixture(scope="module")
def talker(demo: Source, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of the shipped pair with a chat template that knows tools and a switch for the thinking."""
    target = tmp_path_factory.mktemp("talker") / "target"
    shutil.copytree(demo.target, target)
    old = Manifest.read(target)
    replace(old, spec=replace(old.spec, chat_template=SWITCHED)).write(target)
    with served(replace(demo, target=str(target))) as running:
        running.chat()
        yield running


def library_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools in OpenAI's form."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool["name"],
                **({"description": tool["description"]} if "description" in tool else {}),
                "parameters": tool["input_schema"],
            },
        }
        for tool in tools
    ]


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def plain(message: Any) -> list[dict[str, Any]]:
    """The blocks of a message, without what the client adds."""
    return [block.model_dump(exclude={"parsed_output"}) for block in message.content]


def require_order(events: list[Any]) -> None:
    """The events come in the order that is documented."""
    kinds = [event["type"] for event in events if event["type"] != "ping"]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    open_: int | None = None
    count = 0
    for event in events:
        if event["type"] == "content_block_start":
            assert open_ is None
            assert event["index"] == count
            open_, count = count, count + 1
        elif event["type"] == "content_block_delta":
            assert event["index"] == open_
        elif event["type"] == "content_block_stop":
            assert event["index"] == open_
            open_ = None
    assert open_ is None


def raw_events(server: Served, body: dict[str, Any]) -> list[Any]:
    """The events of a stream as they are sent. Each has its type as its name."""
    answer = server.post("/v1/messages", {"model": MODEL, "max_tokens": 40, "stream": True, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    out = []
    for part in answer.text.split("\n\n"):
        if part and not part.startswith(":"):
            name, data = part.split("\n")
            out.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {out[-1]['type']}"
    return out


WAYS: list[tuple[dict[str, Any], dict[str, Any]]] = [  # the request's fields, and the library's options
    ({}, {}),
    ({"extra_body": {"temperature": 0.9, "top_p": 0.9, "seed": 5}}, {"temperature": 0.9, "top_p": 0.9, "seed": 5}),
    ({"stop_sequences": ["self", "zzz"]}, {"stop": ["self", "zzz"]}),
    ({"extra_body": {"top_k": 9, "temperature": 1.1, "seed": 1, "min_p": 0.02, "draft_length": 0}},
     {"top_k": 9, "temperature": 1.1, "seed": 1, "min_p": 0.02, "draft_length": 0}),
    ({"extra_body": {"draft_length": 7, "repetition_penalty": 1.1}}, {"draft_length": 7, "repetition_penalty": 1.1}),
    ({"metadata": {"user_id": "me"}, "service_tier": "auto", "cache_control": {"type": "ephemeral"}}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("way", "options"), WAYS)
def test_a_message_has_the_librarys_text(
    server: Served, client: Any, way: dict[str, Any], options: dict[str, Any]
) -> None:
    expected = server.pair.generate(MESSAGES, max_new_tokens=40, **options)
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 40, **way}
    found = client.messages.create(**asked)
    assert [block.type for block in found.content] == ["text"]
    assert text_of(found) == expected.text
    assert (found.type, found.role, found.model) == ("message", "assistant", MODEL)
    stopped = expected.stop_string is not None
    reasons = {"stop": "stop_sequence" if stopped else "end_turn", "length": "max_tokens"}
    assert (found.stop_reason, found.stop_sequence) == (reasons[expected.finish_reason], expected.stop_string)
    usage = found.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == expected.stats.prompt_tokens
    assert usage.output_tokens == len(expected.tokens)
    assert found.pard["finish_reason"] == expected.finish_reason
    assert found.timings["predicted_n"] == len(expected.tokens)
    with client.messages.stream(**asked) as stream:
        pieces = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert pieces == expected.text
    assert plain(final) == plain(found)
    assert (final.stop_reason, final.stop_sequence) == (found.stop_reason, found.stop_sequence)
    assert final.usage.input_tokens + final.usage.cache_read_input_tokens == expected.stats.prompt_tokens
    assert final.usage.output_tokens == len(expected.tokens)


def test_a_stop_sequence_is_named(server: Served, client: Any) -> None:
    text = server.pair.generate(MESSAGES, max_new_tokens=40).text
    wanted = text[8:12]
    found = client.messages.create(model=MODEL, messages=MESSAGES, max_tokens=40, stop_sequences=["\0", wanted])
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", wanted)
    assert text_of(found) == text[: text.index(wanted)]


def test_events_as_they_are_sent(server: Served) -> None:
    expected = server.pair.generate(MESSAGES, max_new_tokens=40)
    events = raw_events(server, {"messages": MESSAGES, "draft_length": 7})
    require_order(events)
    start, delta = events[0]["message"], events[-2]
    assert start["content"] == []
    assert start["stop_reason"] is None
    read = ("input_tokens", "cache_read_input_tokens")
    assert sum(start["usage"][name] for name in read) == expected.stats.prompt_tokens
    assert [start["usage"][name] for name in read] == [delta["usage"][name] for name in read]
    pieces = [piece for event in events for piece in event.get("pard", {}).get("pieces", ())]
    assert "".join(pieces) == expected.text
    assert delta["pard"]["mean_accepted"] > 1
    assert delta["timings"]["draft_n"] > 0
    assert any(event["type"] == "ping" for event in events)


def test_async_clients(server: Served) -> None:
    expected = server.pair.generate(MESSAGES, max_new_tokens=30).text

    async def one(client: Any) -> list[str]:
        asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 30}
        texts = [text_of(await client.messages.create(**asked))]
        async with client.messages.stream(**asked) as stream:
            texts.append(text_of(await stream.get_final_message()))
        text = ""
        async for event in await client.messages.create(stream=True, **asked):
            if event.type == "content_block_delta":
                text += event.delta.text
        assert (await client.messages.count_tokens(model=MODEL, messages=MESSAGES)).input_tokens
        assert [model.id async for model in client.models.list()] == [MODEL]
        return [*texts, text]

    async def several() -> list[list[str]]:
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client) for _ in range(3)))

    assert asyncio.run(several()) == [[expected] * 3] * 3


def blocks(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}} for text in texts]


USER = {"role": "user", "content": "Hello"}
SAME: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [  # requests, and the library's messages
    ({"system": "Be brief.", "messages": [USER]}, [{"role": "system", "content": "Be brief."}, USER]),
    ({"system": blocks("Be ", "brief."), "messages": [{"role": "user", "content": blocks("Hel", "lo")}]},
     [{"role": "system", "content": "Be brief."}, USER]),
    ({"messages": [{"role": "system", "content": "Be brief."}, USER]},
     [{"role": "system", "content": "Be brief."}, USER]),
    ({"messages": [USER, {"role": "assistant", "content": blocks("Yes")}, USER]},
     [USER, {"role": "assistant", "content": "Yes"}, USER]),
    ({"messages": [USER, USER]}, [{"role": "user", "content": "Hello\n\nHello"}]),
    ({"messages": [USER, {"role": "assistant", "content": ""}]}, [USER]),
    ({"messages": [USER, {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "Hm", "signature": "x"}, {"type": "redacted_thinking", "data": "x"},
        {"type": "text", "text": "Yes"}, {"type": "tool_use", "id": "a", "name": "stop", "input": {}}]},
        {"role": "user", "content": [
            {"type": "text", "text": "And?"}, {"type": "tool_result", "tool_use_id": "a", "is_error": True,
                                               "content": blocks("no", "way")}]}]},
     [USER, {"role": "assistant", "content": "Yes", "reasoning_content": "Hm", "tool_calls": [
         {"id": "a", "type": "function", "function": {"name": "stop", "arguments": "{}"}}]},
      {"role": "tool", "tool_call_id": "a", "name": "stop", "content": "Error: no\nway"},
      {"role": "user", "content": "And?"}]),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "messages"), SAME)
def test_messages_are_the_librarys(talker: Served, asked: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    expected = talker.pair.generate(messages, max_new_tokens=8)
    with opened(talker.url) as client:
        assert text_of(client.messages.create(model=MODEL, max_tokens=8, **asked)) == expected.text
        count = client.messages.count_tokens(model=MODEL, **asked).input_tokens
    assert count == expected.stats.prompt_tokens


@pytest.mark.parametrize("which", ["server", "talker"])
@pytest.mark.parametrize(
    "said", ["def add(", " A sum ", [{"type": "text", "text": "def "}, {"type": "text", "text": "f"}]]
)
def test_a_reply_that_has_begun_goes_on(request: pytest.FixtureRequest, which: str, said: Any) -> None:
    running = request.getfixturevalue(which)
    messages = [*MESSAGES, {"role": "assistant", "content": said}]
    expected = running.pair.generate(messages, max_new_tokens=12, continue_final_message=True)
    with opened(running.url) as client:
        found = client.messages.create(model=MODEL, max_tokens=12, messages=messages)
        assert text_of(found) == expected.text
        count = client.messages.count_tokens(model=MODEL, messages=messages).input_tokens
        assert count == expected.stats.prompt_tokens
        for more in ({"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
                     {"thinking": {"type": "enabled", "budget_tokens": 1024}}):  # fmt: skip
            with pytest.raises(anthropic.BadRequestError, match="the last message begins the reply"):
                client.messages.create(model=MODEL, max_tokens=2000, messages=messages, **more)


@pytest.mark.parametrize(
    ("choice", "library"),
    [
        ({"type": "any"}, {"tool_choice": "required"}),
        ({"type": "any", "disable_parallel_tool_use": True}, {"tool_choice": "required", "parallel_tool_calls": False}),
        ({"type": "tool", "name": "get_weather"}, {"tool_choice": "get_weather"}),
    ],
)
def test_the_loop_of_tools(talker: Served, choice: dict[str, Any], library: dict[str, Any]) -> None:
    pair: Pair = talker.pair
    own = {"tools": library_tools(TOOLS), "max_new_tokens": 300}
    off = {"template_arguments": {"enable_thinking": False}, "max_reasoning_tokens": 0}
    expected = pair.generate(QUESTION, **own, **library, **off)
    assert expected.tool_calls
    asked = {"model": MODEL, "tools": TOOLS, "tool_choice": choice, "max_tokens": 300, "thinking": {"type": "disabled"}}
    with opened(talker.url) as client:
        found = client.messages.create(messages=QUESTION, **asked)
        with client.messages.stream(messages=QUESTION, **asked) as stream:
            events = list(stream)
            final = stream.get_final_message()
        calls = [block for block in found.content if block.type == "tool_use"]
        assert [(call.id, call.name, call.input) for call in calls] == [
            (call.id, call.name, json.loads(call.arguments)) for call in expected.tool_calls
        ]
        assert plain(final) == plain(found)
        reason = "tool_use" if expected.finish_reason == "tool_calls" else "max_tokens"
        assert found.stop_reason == final.stop_reason == reason
        written = [event.snapshot for event in events if event.type == "input_json"]
        assert written[-1] == calls[-1].input
        # The results go back, as the client has the calls
        results = [{"type": "tool_result", "tool_use_id": call.id, "content": "rain"} for call in calls]
        messages = [*QUESTION, {"role": "assistant", "content": found.content}, {"role": "user", "content": results}]
        again = client.messages.create(model=MODEL, messages=messages, tools=TOOLS, max_tokens=10)
    spoken = [*QUESTION, {"role": "assistant", "content": expected.text or None,
                          "tool_calls": [call.as_message() for call in expected.tool_calls]}]  # fmt: skip
    spoken += [
        {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": "rain"} for call in expected.tool_calls
    ]
    assert text_of(again) == pair.generate(spoken, tools=own["tools"], max_new_tokens=10).text


def test_a_call_that_is_cut_short(talker: Served) -> None:
    asked = {"model": MODEL, "messages": QUESTION, "tools": [WEATHER], "tool_choice": {"type": "any"}, "max_tokens": 12}
    asked["thinking"] = {"type": "disabled"}
    with opened(talker.url) as client:
        found = client.messages.create(**asked)
        assert found.stop_reason == "max_tokens"
        assert all(isinstance(block.input, dict) for block in found.content if block.type == "tool_use")
        with client.messages.stream(**asked) as stream:
            assert stream.get_final_message().stop_reason == "max_tokens"


def test_tools_may_be_left_alone(talker: Served) -> None:
    plain = talker.pair.generate(QUESTION, max_new_tokens=20).text
    with opened(talker.url) as client:
        for more in ({"tools": TOOLS, "tool_choice": {"type": "none"}}, {"tools": []}):
            found = client.messages.create(model=MODEL, messages=QUESTION, max_tokens=20, **more)
            assert text_of(found) == plain


@pytest.mark.parametrize("display", ["summarized", "omitted", None])
def test_thinking_is_a_block_of_its_own(talker: Served, display: str | None) -> None:
    library = {"template_arguments": {"enable_thinking": True}, "max_reasoning_tokens": 12, "max_new_tokens": 40}
    expected = talker.pair.generate(QUESTION, **library)  # type: ignore[arg-type]
    assert expected.reasoning
    assert expected.text
    thinking = {"type": "enabled", "budget_tokens": 12, **({"display": display} if display else {})}
    asked = {"model": MODEL, "messages": QUESTION, "max_tokens": 40, "thinking": thinking}
    with opened(talker.url) as client:
        found = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            events = list(stream)
            final = stream.get_final_message()
        thought, said = found.content
        assert thought.type == "thinking"
        assert thought.thinking == ("" if display == "omitted" else expected.reasoning)
        assert thought.signature
        assert said.text == expected.text
        assert plain(final) == plain(found)
        pieces = "".join(event.thinking for event in events if event.type == "thinking")
        assert pieces == thought.thinking
        events = raw_events(talker, asked)
        require_order(events)
        kinds = [event["delta"]["type"] for event in events if event["type"] == "content_block_delta"]
        assert ("thinking_delta" in kinds) == (display != "omitted")
        assert [a for a, b in pairwise(kinds) if a != b] == [*kinds[:1], "signature_delta"][display == "omitted" :]
        # Clients send the blocks back
        messages = [*QUESTION, {"role": "assistant", "content": found.content}, *QUESTION]
        again = client.messages.create(model=MODEL, messages=messages, max_tokens=8)
        spoken = {"role": "assistant", "content": said.text, "reasoning_content": thought.thinking or None}
        assert text_of(again) == talker.pair.generate([QUESTION[0], spoken, QUESTION[0]], max_new_tokens=8).text


def test_thinking_is_switched_by_the_template_or_cut(talker: Served, server: Served) -> None:
    with opened(talker.url) as client:
        for kind, on in (("disabled", False), ("adaptive", True)):
            expected = talker.pair.generate(
                QUESTION,
                max_new_tokens=20,
                template_arguments={"enable_thinking": on},
                max_reasoning_tokens=None if on else 0,
            )
            asked = {"model": MODEL, "messages": QUESTION, "max_tokens": 20, "thinking": {"type": kind}}
            found = client.messages.create(**asked)
            assert text_of(found) == expected.text
            assert [block.type for block in found.content] == (["thinking"] if on else ["text"])
            given = {"chat_template_kwargs": {"enable_thinking": not on}}  # what is named beats it
            assert text_of(client.messages.create(**asked, extra_body=given)) != expected.text
    with opened(server.url) as client:  # its template knows no switch
        found = client.messages.create(model=MODEL, messages=MESSAGES, max_tokens=8, thinking={"type": "disabled"})
        assert text_of(found) == server.pair.generate(MESSAGES, max_new_tokens=8).text


@pytest.mark.parametrize(
    "more",
    [
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "low"}},
        {"extra_body": {"output_format": {"type": "json_schema", "schema": SCHEMA}}},
    ],
)
def test_structured_output(client: Any, more: dict[str, Any]) -> None:
    found = client.messages.create(model=MODEL, messages=MESSAGES, max_tokens=60, **more)
    assert found.stop_reason == "end_turn"
    assert json.loads(text_of(found))["kind"] in ("red", "green")


def test_structured_output_by_a_pydantic_model(client: Any) -> None:
    pydantic = pytest.importorskip("pydantic")
    thing = pydantic.create_model("Thing", kind=(bool, ...))
    found = client.messages.parse(model=MODEL, messages=MESSAGES, max_tokens=60, output_format=thing)
    assert found.parsed_output.kind in (True, False)


def test_models_are_in_anthropics_form(server: Served, client: Any) -> None:
    page = client.models.list()
    assert [(model.id, model.type) for model in page] == [(MODEL, "model")]
    assert (page.first_id, page.last_id, page.has_more) == (MODEL, MODEL, False)
    found = client.models.retrieve(MODEL)
    assert found.max_input_tokens == server.pair.capacity
    assert found.created_at.year >= 2026
    assert server.get("/v1/models").json()["object"] == "list"
    assert list(client.models.list(after_id=MODEL)) == []
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("claude")


def test_models_come_in_pages(demo: Source) -> None:
    names = [f"m{number}" for number in range(7)]
    with served(*(replace(demo, name=name) for name in names)) as running, opened(running.url) as client:
        for limit in (1, 3, 7, 20):
            assert [model.id for model in client.models.list(limit=limit)] == names
        page = client.models.list(limit=2, before_id="m5")
        assert [model.id for model in page.data] == ["m3", "m4"]
        assert page.has_more
        for bad in ({"limit": 0}, {"limit": 1001}, {"after_id": "x"}, {"before_id": "x"}):
            with pytest.raises(anthropic.BadRequestError):
                client.models.list(**bad)


@pytest.mark.parametrize(
    ("kind", "type_", "more"),
    [
        ("NotFoundError", "not_found_error", {"model": "claude-opus-4-8"}),
        ("BadRequestError", "invalid_request_error", {"extra_body": {"temperature": -1}}),
        ("BadRequestError", "invalid_request_error", {"messages": [{"role": "user", "content": "long " * 4000}]}),
        ("BadRequestError", "invalid_request_error", {"tools": [{"type": "web_search_20250305", "name": "x"}]}),
        ("BadRequestError", "invalid_request_error", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        ("ContentTooLargeError", "request_too_large", {"messages": [{"role": "user", "content": "x" * (1 << 18)}]}),
    ],
)  # fmt: skip
def test_errors_are_the_clients_own(client: Any, kind: str, type_: str, more: dict[str, Any]) -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4, **more}
    for ask in (client.messages.create, lambda **own: client.messages.stream(**own).__enter__()):
        with pytest.raises(getattr(anthropic, kind)) as error:
            ask(**asked)
        found = error.value
        assert found.type == type_
        assert set(found.body) == {"type", "error", "request_id"}
        assert found.body["request_id"] == found.request_id
        if "long" in str(more):
            assert found.api_message.startswith("prompt is too long: ")
        if "tools" in more:
            assert "web_search_20250305" in found.api_message


def test_a_busy_server_is_overloaded(demo: Source) -> None:
    with served(demo, max_live=1, max_queue=0) as running, opened(running.url) as client:
        running.chat()
        with client.messages.create(model=MODEL, messages=MESSAGES, max_tokens=2000, stream=True) as stream:
            next(iter(stream))
            with pytest.raises(anthropic.APIStatusError) as error:
                client.messages.create(model=MODEL, messages=MESSAGES, max_tokens=4)
        assert (error.value.status_code, error.value.type) == (529, "overloaded_error")
        assert error.value.response.headers["retry-after"]


def test_an_error_within_a_stream(server: Served, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pard_onnx.serve.anthropic_api import messages

    def fail(*_: object) -> dict[str, Any]:
        raise RuntimeError("secret")

    monkeypatch.setattr(messages, "stop", fail)
    stream = client.messages.create(model=MODEL, messages=MESSAGES, max_tokens=4, stream=True)
    with pytest.raises(anthropic.APIStatusError) as error:
        list(stream)
    assert error.value.type == "api_error"
    assert "secret" not in str(error.value.body)


def test_keys_and_hosts(demo: Source) -> None:
    with served(demo, api_key="right") as running:
        for header in ({"x-api-key": "right"}, {"Authorization": "Bearer right"},
                       {"Authorization": "Bearer other", "x-api-key": "right"}):  # fmt: skip
            assert running.get("/v1/models", headers=header).status_code == 200
        with opened(running.url, api_key="right") as client:
            assert [model.id for model in client.models.list()] == [MODEL]
        with opened(running.url, api_key="wrong") as client:
            for ask in (client.models.list, lambda: client.messages.count_tokens(model=MODEL, messages=MESSAGES)):
                with pytest.raises(anthropic.AuthenticationError) as error:
                    ask()
                assert error.value.type == "authentication_error"
        answer = running.post("/v1/messages", {}, headers={"Origin": "http://evil", "x-api-key": "right"})
        assert answer.status_code == 403
        assert answer.json()["error"]["type"] == "permission_error"


def test_paths_and_methods(server: Served) -> None:
    for method, path, status, type_ in (
        ("GET", "/v1/messages", 405, "invalid_request_error"), ("POST", "/v1/messages/batches", 404, "not_found_error"),
        ("DELETE", "/v1/messages/count_tokens", 405, "invalid_request_error"),
    ):  # fmt: skip
        import httpx

        answer = httpx.request(method, server.url + path)
        assert answer.status_code == status
        body = answer.json()
        assert body["type"] == "error"
        assert body["error"]["type"] == type_
        assert body["request_id"] == answer.headers["request-id"]
    assert server.post("/v1/messages?beta=true", {"messages": MESSAGES, "max_tokens": 2}).status_code == 200


PIECES = st.text("ab é", max_size=3)


@st.composite
def chunks(draw: st.DrawFn) -> list[Chunk]:
    """The chunks of a reply: thinking, then text and calls in any order, cut anywhere."""
    out = [Chunk("", (), (), (), reasoning=draw(PIECES)) for _ in range(draw(st.integers(0, 3)))]
    calls = 0
    for _ in range(draw(st.integers(0, 6))):
        deltas: list[ToolCallDelta] = []
        if calls and draw(st.booleans()) and out[-1].tool_calls and not out[-1].text:
            deltas.append(ToolCallDelta(calls - 1, arguments=""))
        for _ in range(draw(st.integers(0, 2))):
            deltas += [ToolCallDelta(calls, f"c{calls}", "f"), ToolCallDelta(calls, arguments='{"a": 1}')]
            calls += 1
        out.append(Chunk(draw(PIECES), (), (), (), tool_calls=tuple(deltas)))
    return out


@given(chunks(), st.booleans())
def test_any_chunks_make_blocks_that_the_client_reads(made: list[Chunk], shows_thinking: bool) -> None:
    blocks = StreamedBlocks(shows_thinking=shows_thinking)
    events = [event for chunk in made for event in blocks.add(chunk)] + blocks.end()
    begun: dict[str, Any] = {"id": "m", "type": "message", "role": "assistant", "model": "m", "content": []}
    begun |= {"stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 0}}
    start = {"type": "message_start", "message": begun}
    end = [{"type": "message_delta", "delta": {}, "usage": {"output_tokens": 0}}, {"type": "message_stop"}]
    require_order([start, *events, *end])
    message, buffers = None, dict[int, bytes]()
    for event in [start, *events]:
        message = accumulate_event(event=event, current_snapshot=message, json_bufs=buffers)
    assert message is not None
    assert message.content
    reasoning, text = "".join(chunk.reasoning for chunk in made), "".join(chunk.text for chunk in made)
    found = plain(message)
    thoughts = [block for block in found if block["type"] == "thinking"]
    assert len(thoughts) == bool(reasoning)
    assert all(block["thinking"] == (reasoning if shows_thinking else "") for block in thoughts)
    assert all(block["signature"] for block in thoughts)
    assert "".join(block["text"] for block in found if block["type"] == "text") == text
    ids = [delta.id for chunk in made for delta in chunk.tool_calls if delta.id]
    assert [(block["id"], block["input"]) for block in found if block["type"] == "tool_use"] == [
        (id_, {"a": 1}) for id_ in ids
    ]
