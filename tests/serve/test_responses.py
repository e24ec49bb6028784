"""/v1/responses through OpenAI's own client: the texts are the library's, and all objects and events OpenAI's types."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
openai = pytest.importorskip("openai", reason="the package openai is not installed; the extra dev has it")

import httpx  # noqa: E402
import test_replies  # noqa: E402
from response_events import require_event, require_response, require_stream  # noqa: E402
from served import MESSAGES, Served, wait_until  # noqa: E402
from test_bad_requests import HUGE, NO_NUMBERS, NO_TEXTS, require_error  # noqa: E402
from test_openai_client import SCHEMA, WAYS, options  # noqa: E402
from test_replies import QUESTION, TOOLS  # noqa: E402
from test_serving import ENDLESS  # noqa: E402

from pard_onnx.serve.openai_api.response_output import Output  # noqa: E402

talker = test_replies.talker
PATH = "/v1/responses"
INPUT = MESSAGES[0]["content"]
FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]
ASKED = QUESTION[0]["content"]


def connected(server: Served) -> Any:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture
def client(server: Served) -> Iterator[Any]:
    with connected(server) as made:
        yield made


@pytest.fixture
def talks(talker: Served) -> Iterator[Any]:
    with connected(talker) as made:
        yield made


def post(server: Served, **body: Any) -> Any:
    """The response, of openai's type."""
    answer = server.post(PATH, {"input": INPUT, **body})
    assert answer.status_code == 200, answer.text
    require_response(answer.json())
    return answer.json()


def stream(server: Served, **body: Any) -> Any:
    """The last response of a stream whose events are as they must be."""
    with httpx.stream("POST", server.url + PATH, json={"input": INPUT, "stream": True, **body}, timeout=60) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        data = answer.read().decode()
    assert "[DONE]" not in data
    blocks = [block.split("\n", 1) for block in data.split("\n\n") if block and not block.startswith(":")]
    events = [json.loads(second.removeprefix("data: ")) for _, second in blocks]
    assert [first for first, _ in blocks] == [f"event: {event['type']}" for event in events]
    return require_stream(events)


def without_ids(response: dict[str, Any]) -> list[dict[str, Any]]:
    return [{name: value for name, value in item.items() if name != "id"} for item in response["output"]]


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])


@pytest.mark.parametrize("way", WAYS[:2] + WAYS[4:])
def test_a_response_has_the_librarys_text(server: Served, client: Any, way: dict[str, Any]) -> None:
    expected = server.pair.generate(MESSAGES, max_new_tokens=40, **options(way))
    way = {name: value for name, value in options(way).items() if name != "seed"}
    way = (
        {"extra_body": {**way, "seed": expected.stats.seed}} if expected.stats.seed is not None else {"extra_body": way}
    )
    found = client.responses.create(model="demo", input=INPUT, max_output_tokens=40, **way)
    assert found.output_text == expected.text
    complete = expected.finish_reason == "stop"
    assert found.status == ("completed" if complete else "incomplete")
    assert found.incomplete_details == (None if complete else found.incomplete_details)
    assert found.usage.output_tokens == len(expected.tokens)
    assert found.usage.input_tokens == expected.stats.prompt_tokens
    assert found.usage.output_tokens_details.reasoning_tokens == 0
    assert found.pard["finish_reason"] == expected.finish_reason
    assert found.timings["predicted_n"] == len(expected.tokens)
    last = stream(server, max_output_tokens=40, **way["extra_body"])
    assert text_of(last) == expected.text
    if not complete:
        assert last["incomplete_details"] == {"reason": "max_output_tokens"}


def test_the_same_prompt_is_cached(server: Served) -> None:
    post(server, max_output_tokens=4)
    usage = post(server, max_output_tokens=4)["usage"]
    assert 0 < usage["input_tokens_details"]["cached_tokens"] < usage["input_tokens"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_fields_are_repeated(server: Served) -> None:
    given = {
        "instructions": "Be brief.", "max_output_tokens": 3, "temperature": 0.5, "top_p": 0.9, "store": False,
        "metadata": {"a": "b"}, "truncation": "auto", "parallel_tool_calls": False, "tool_choice": "none",
        "top_logprobs": 2, "max_tool_calls": 4,
    }  # fmt: skip
    found = post(server, **given, reasoning={"effort": "low", "summary": "auto"})
    assert {name: found[name] for name in given} == given
    assert found["reasoning"] == {"effort": "low", "summary": None}
    assert found["text"] == {"format": {"type": "text"}}
    defaults = post(server, max_output_tokens=1)
    assert (defaults["temperature"], defaults["top_p"], defaults["store"], defaults["metadata"]) == (0, 1, True, {})


def test_null_is_as_if_it_was_not_given(server: Served) -> None:
    expected = without_ids(post(server, max_output_tokens=5))
    nulls = dict.fromkeys(BAD.keys() - {"input", "max_output_tokens"})
    assert without_ids(post(server, max_output_tokens=5, **nulls)) == expected


def test_the_streams_helper_and_a_pydantic_model(server: Served, client: Any) -> None:
    pydantic = pytest.importorskip("pydantic")
    pytest.importorskip("llguidance")
    kind = pydantic.create_model("Thing", kind=(str, pydantic.Field(pattern="^(red|green)$")), count=(bool, ...))
    parsed = client.responses.parse(model="demo", input=INPUT, text_format=kind).output_parsed
    assert parsed.kind in ("red", "green")
    with client.responses.stream(model="demo", input=INPUT, text_format=kind) as events:
        texts = [event.delta for event in events if event.type == "response.output_text.delta"]
        final = events.get_final_response()
    assert final.output_parsed == parsed
    assert final.output_text == "".join(texts)


def test_structured_output(server: Served) -> None:
    pytest.importorskip("llguidance")
    wanted = {"type": "json_schema", "name": "thing", "schema": SCHEMA, "strict": True}
    for config in (wanted, {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}):
        found = post(server, text={"format": config, "verbosity": "low"})
        assert found["status"] == "completed"
        assert set(json.loads(text_of(found))) == {"kind", "count"}
        assert found["text"]["format"]["schema"] == SCHEMA
    error = require_error(
        server.post(PATH, {"input": "a", "text": {"format": {**wanted, "schema": {"uniqueItems": 1}}}})
    )
    assert error["param"] == "text.format"
    error = require_error(server.post(PATH, {"input": "a", "regex": "a", "text": {"format": wanted}}))
    assert error["message"].startswith("text.format and regex cannot both hold")


def test_log_probabilities_are_the_librarys(server: Served) -> None:
    expected = server.pair.generate(MESSAGES, max_new_tokens=6, logprobs=3)
    assert expected.logprobs is not None
    wanted = [one.openai() for one in expected.logprobs]
    for way in ({}, {"include": ["message.output_text.logprobs"]}):
        body = {"max_output_tokens": 6, "top_logprobs": 3, **way}
        for found in (post(server, **body), stream(server, **body)):
            assert found["output"][0]["content"][0]["logprobs"] == wanted
    found = post(server, max_output_tokens=6, include=["message.output_text.logprobs"])
    tokens = [one["token"] for one in found["output"][0]["content"][0]["logprobs"]]
    assert tokens == [one["token"] for one in wanted]
    assert post(server, max_output_tokens=6)["output"][0]["content"][0]["logprobs"] == []


def test_async_clients(server: Served) -> None:
    expected = server.pair.generate(MESSAGES, max_new_tokens=20).text

    async def one(client: Any) -> str:
        events = await client.responses.create(model="demo", input=INPUT, max_output_tokens=20, stream=True)
        return "".join([event.delta async for event in events if event.type == "response.output_text.delta"])

    async def several() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            whole = await client.responses.create(model="demo", input=INPUT, max_output_tokens=20)
            return [whole.output_text, *await asyncio.gather(*(one(client) for _ in range(6)))]

    assert asyncio.run(several()) == [expected] * 7


# ---- conversations


def test_a_response_goes_on_with_an_earlier_one(server: Served, client: Any) -> None:
    first = client.responses.create(model="demo", input=INPUT, instructions="Be brief.", max_output_tokens=10)
    second = client.responses.create(
        model="demo", input=[{"role": "user", "content": "More"}], previous_response_id=first.id, max_output_tokens=10
    )
    # Instructions are of one response
    messages = [*MESSAGES, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "More"}]
    assert second.output_text == server.pair.generate(messages, max_new_tokens=10).text
    third = client.responses.create(model="demo", input="On", previous_response_id=second.id, max_output_tokens=10)
    messages += [{"role": "assistant", "content": second.output_text}, {"role": "user", "content": "On"}]
    assert third.output_text == server.pair.generate(messages, max_new_tokens=10).text
    # The same by items, by references to them, and from an earlier response again
    again = [{"role": "user", "content": INPUT}, *(item.model_dump() for item in first.output)]
    references = [again[0], *({"type": "item_reference", "id": item.id} for item in first.output)]
    for items in (again, references):
        body = {"input": [*items, {"role": "user", "content": "More"}], "max_output_tokens": 10}
        assert text_of(post(server, **body)) == text_of(stream(server, **body)) == second.output_text
    body = {"input": "More", "previous_response_id": first.id, "max_output_tokens": 10}
    assert text_of(stream(server, **body)) == second.output_text


def test_instructions_are_the_system_message(server: Served) -> None:
    system = {"role": "system", "content": "Be brief."}
    expected = server.pair.generate([system, *MESSAGES], max_new_tokens=10).text
    for body in (
        {"instructions": "Be brief."},
        {"input": [{"role": "developer", "content": "Be brief."}, *MESSAGES]},
        {"input": [{**system, "content": [{"type": "input_text", "text": "Be brief."}]}, *MESSAGES]},
    ):
        assert text_of(post(server, **body, max_output_tokens=10)) == expected


def test_responses_are_kept_and_deleted(server: Served, client: Any) -> None:
    made = client.responses.create(model="demo", input=INPUT, max_output_tokens=5)
    assert client.responses.retrieve(made.id) == made
    kept = stream(server, max_output_tokens=5)
    assert server.get(f"{PATH}/{kept['id']}").json() == kept
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError) as error:
        client.responses.retrieve(made.id)
    assert error.value.body["code"] == "response_not_found"
    other = client.responses.create(model="demo", input=INPUT, max_output_tokens=5, store=False)
    for method in ("GET", "DELETE"):
        for id_ in (made.id, other.id, "x" * 3000, "%00", "resp_"):
            answer = httpx.request(method, f"{server.url}{PATH}/{id_}", timeout=10)
            assert answer.status_code == 404
            require_error(answer)
        answer = httpx.request(method, f"{server.url}{PATH}/{kept['id']}", params={"stream": "true"}, timeout=10)
        assert answer.status_code == (400 if method == "GET" else 200)
    for id_ in (made.id, other.id):
        with pytest.raises(openai.BadRequestError) as error:
            client.responses.create(model="demo", input="More", previous_response_id=id_)
        assert (error.value.body["code"], error.value.body["param"]) == (
            "previous_response_not_found",
            "previous_response_id",
        )


def test_long_conversations(server: Served) -> None:
    many = [{"role": role, "content": "long " * 300} for _ in range(6) for role in ("user", "assistant")]
    body = {"input": [*many, *MESSAGES], "max_output_tokens": 5}
    for way in ({}, {"truncation": "disabled"}):
        assert require_error(server.post(PATH, {**body, **way}))["code"] == "context_length_exceeded"
    expected = server.pair.generate([*many, *MESSAGES], overflow="drop-oldest", max_new_tokens=5)
    assert text_of(post(server, **body, truncation="auto")) == expected.text
    expected = server.pair.generate([*many, *MESSAGES], overflow="drop-middle", max_new_tokens=5)
    assert text_of(post(server, **body, truncation="auto", overflow="drop-middle")) == expected.text


# ---- tools and reasoning

CHOICES: list[tuple[Any, Any]] = [
    ("required", "required"),
    ({"type": "function", "name": "get_weather"}, {"type": "function", "function": {"name": "get_weather"}}),
    (
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "stop"}]},
        {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "stop"}}]},
        },
    ),
]


@pytest.mark.parametrize(("flat", "nested"), CHOICES, ids=["required", "one", "allowed"])
def test_a_loop_of_tools(talker: Served, talks: Any, flat: Any, nested: Any) -> None:
    pytest.importorskip("llguidance")
    own = {"max_reasoning_tokens": 0}  # the demo's model would never end its thinking
    plain = talker.pair.generate(QUESTION, tools=TOOLS, tool_choice=nested, max_new_tokens=300, **own)
    assert plain.tool_calls
    way = {"model": "demo", "tools": FLAT, "tool_choice": flat, "max_output_tokens": 300, "extra_body": own}
    items: list[Any] = [{"role": "user", "content": ASKED}]
    found = talks.responses.create(input=items, **way)
    assert found.tool_choice == flat or found.tool_choice.to_dict() == flat
    calls = [item for item in found.output if item.type == "function_call"]
    expected = [(call.id, call.name, call.arguments) for call in plain.tool_calls]
    assert [(call.call_id, call.name, call.arguments) for call in calls] == expected
    streamed = stream(talker, input=items, tools=FLAT, tool_choice=flat, max_output_tokens=300, **own)
    assert without_ids(streamed) == without_ids(found.to_dict())
    # The chat completion has the same, in its form
    chat = talker.chat(messages=QUESTION, tools=TOOLS, tool_choice=nested, max_tokens=300, **own).json()
    assert [call["id"] for call in chat["choices"][0]["message"]["tool_calls"]] == [call.call_id for call in calls]
    # The results go back, with the whole conversation or by the response's id
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "rain"} for call in calls]
    messages = [
        *QUESTION,
        {"role": "assistant", "content": plain.text, "tool_calls": [call.as_message() for call in plain.tool_calls]},
        *({"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in plain.tool_calls),
    ]
    wanted = talker.pair.generate(messages, tools=TOOLS, max_new_tokens=10).text
    more = {"model": "demo", "tools": FLAT, "max_output_tokens": 10}
    assert talks.responses.create(input=[*items, *found.output, *results], **more).output_text == wanted
    assert talks.responses.create(input=results, previous_response_id=found.id, **more).output_text == wanted


def test_tools_may_be_left_alone(talker: Served) -> None:
    plain = talker.pair.generate(QUESTION, max_new_tokens=20).text
    for tools, choice in ((FLAT, "none"), ([], "auto"), (FLAT, {"type": "none"})):
        found = post(talker, input=ASKED, tools=tools, tool_choice=choice, max_output_tokens=20)
        assert text_of(found) == plain
        assert found["tool_choice"] == (choice if isinstance(choice, str) else "none")
    told = talker.pair.generate(QUESTION, tools=TOOLS, max_new_tokens=20)
    for tools in (FLAT, TOOLS, [{**tool, "strict": True, "parameters": tool.get("parameters")} for tool in FLAT]):
        found = post(talker, input=ASKED, tools=tools, max_output_tokens=20)
        assert (text_of(found), found["usage"]["input_tokens"]) == (told.text, told.stats.prompt_tokens)


def test_reasoning_is_an_item_before_the_message(talker: Served) -> None:
    library: dict[str, Any] = {"template_arguments": {"begun": True}, "max_reasoning_tokens": 12, "max_new_tokens": 40}
    expected = talker.pair.generate(QUESTION, **library)
    assert expected.reasoning
    assert expected.text
    own = {"chat_template_kwargs": {"begun": True}, "max_reasoning_tokens": 12}
    body = {"input": ASKED, "max_output_tokens": 40, **own}
    found = post(talker, **body)
    thought, said = found["output"]
    assert (thought["type"], thought["content"][0]["text"]) == ("reasoning", expected.reasoning)
    assert said["content"][0]["text"] == expected.text
    assert without_ids(stream(talker, **body)) == without_ids(found)
    count = found["usage"]["output_tokens_details"]["reasoning_tokens"]
    before, after = (talker.pair.detokenize(part) for part in (expected.tokens[:count], expected.tokens[count:]))
    assert after == expected.text
    assert expected.reasoning in before
    # It goes back with the items
    messages = [
        *QUESTION,
        {"role": "assistant", "content": expected.text, "reasoning_content": expected.reasoning},
        *MESSAGES,
    ]
    wanted = talker.pair.generate(messages, max_new_tokens=10).text
    items = [*QUESTION, *found["output"], *MESSAGES]
    assert text_of(post(talker, input=items, max_output_tokens=10)) == wanted
    assert text_of(post(talker, input=MESSAGES, previous_response_id=found["id"], max_output_tokens=10)) == wanted


def test_no_effort_is_no_reasoning(talker: Served) -> None:
    body = {"input": ASKED, "chat_template_kwargs": {"begun": True}, "max_output_tokens": 12}
    assert [item["type"] for item in post(talker, **body)["output"]] == ["reasoning"]
    assert [item["type"] for item in post(talker, **body, reasoning={"effort": "none"})["output"]] == ["message"]


# ---- what goes wrong


def test_a_stream_that_fails_says_so(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Output, *, complete: bool) -> Any:
        raise RuntimeError("a secret")

    monkeypatch.setattr(Output, "finish", fail)
    last = stream(server, max_output_tokens=3)
    assert (last["status"], last["error"]["code"]) == ("failed", "server_error")
    assert "secret" not in last["error"]["message"]
    assert server.get(f"{PATH}/{last['id']}").status_code == 404
    answer = server.post(PATH, {"input": INPUT, "max_output_tokens": 3})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")


def test_clients_that_go_away_free_their_place(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    session = server.pair.engine.models[0].session
    step = session.step
    monkeypatch.setattr(session, "step", lambda *of: time.sleep(0.005) or step(*of))  # so that it runs for seconds
    endless = {name: value for name, value in ENDLESS.items() if name not in ("messages", "max_tokens")}
    body = {"input": INPUT, "max_output_tokens": 1900, **endless}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + PATH, json=body, timeout=httpx.Timeout(5, read=0.1))
    wait_until(lambda: server.pair.engine.occupancy == (0, 0))
    kept = len(server.service.responses)
    with httpx.stream("POST", server.url + PATH, json={**body, "stream": True}, timeout=30) as answer:
        next(answer.iter_lines())
        assert server.pair.engine.occupancy != (0, 0)
    wait_until(lambda: server.pair.engine.occupancy == (0, 0) and server.service.registry.open[0].users == 0)
    assert len(server.service.responses) == kept


def test_a_stream_that_fails_before_there_is_a_response() -> None:
    from pard_onnx.serve.errors import bad_field
    from pard_onnx.serve.openai_api.responses import write_error

    name, data = write_error(bad_field("input", "input: no")).decode().split("\n")[:2]
    event = require_event(json.loads(data.removeprefix("data: ")))
    assert name == "event: error"
    assert (event.message, event.param) == ("input: no", "input")


def user(content: Any) -> list[Any]:
    return [{"role": "user", "content": content}]


FUNCTION = {"type": "function", "name": "f", "parameters": {}}
BAD: dict[str, list[Any]] = {
    "input": [
        1, True, {}, [], [1], [[]], [{}], [None], [{"role": "tool", "content": "x"}], user(None), user(1), user([1]),
        user([{}]), user([{"type": "input_image", "image_url": "data:"}]), user([{"type": "input_file"}]),
        user([{"type": "input_text", "text": 1}]), [{"type": "message"}], [{"type": "web_search_call", "id": "ws_1"}],
        [{"type": 1}], [{"type": "function_call", "name": "f"}], [{"id": "msg_x"}],
        [{"type": "function_call_output", "call_id": "x", "output": "y"}], [{"type": "reasoning", "content": [1]}],
    ],
    "instructions": NO_TEXTS,
    "previous_response_id": [*NO_TEXTS, "resp_x", "", "x" * 100_000],
    "model": [*NO_TEXTS, "gpt-5"],
    "temperature": [*NO_NUMBERS, *HUGE, -0.1],
    "top_p": [*NO_NUMBERS, *HUGE, 0],
    "seed": [*NO_NUMBERS, *HUGE, -1],
    "max_output_tokens": [*NO_NUMBERS, *HUGE[:4], 0, -1, 0.5],
    "max_reasoning_tokens": [*NO_NUMBERS, *HUGE[:4], -1],
    "max_tool_calls": [*NO_NUMBERS, *HUGE[:4], 0],
    "top_logprobs": [*NO_NUMBERS, *HUGE, -1, 21],
    "text": [1, "json", [], {"format": 1}, {"format": {}}, {"format": {"type": "xml"}}, {"format": {"type": ["text"]}},
             {"format": {"type": "json_schema"}}, {"format": {"type": "json_schema", "schema": 1}},
             {"format": {"type": "json_schema", "schema": {}, "name": 1}},
             {"format": {"type": "json_schema", "schema": {}, "strict": 1}},
             {"format": {"type": "json_schema", "json_schema": 5}}],
    "reasoning": [1, "high", [], {"effort": "much"}, {"effort": 1}, {"effort": ["low"]}],
    "tools": [1, "x", {}, [1], [{}], [{"type": "web_search"}], [{"type": "mcp"}], [{"type": ["function"]}],
              [{"type": "function"}], [{"type": "function", "name": "a b"}], [{"type": "function", "function": 1}],
              [{**FUNCTION, "strict": 1}], [{"type": "custom", "name": "x"}]],
    "tool_choice": [1, [], {}, "required", {"type": "function", "name": "x"}, {"type": "web_search_preview"},
                    {"type": "mcp", "server_label": "x"}, {"type": "allowed_tools"},
                    {"type": "allowed_tools", "mode": "auto", "tools": []}],
    "parallel_tool_calls": [1, "yes", []],
    "truncation": [1, "no", [], True],
    "include": [1, "x", {}, ["x"], [1], [None]],
    "store": [1, "yes", []],
    "stream": [1, "true", []],
    "stream_options": [1, []],
    "metadata": [1, "x", [], {"a": 1}, {"a": {}}, {"x" * 65: ""}, {"a": "x" * 513}, {str(n): "" for n in range(17)}],
    "background": [True, 1, "x"],
    "conversation": ["conv_1", {"id": "x"}],
    "prompt": [{"id": "pmpt_1"}],
    "messages": [MESSAGES],
    "max_tokens": [5],
    "response_format": [{"type": "json_object"}],
    "n": [2],
    "logprobs": [True],
    "overflow": ["no", 1],
    "chat_template_kwargs": [1, {"messages": []}],
}  # fmt: skip


def test_each_is_refused_within_a_second(server: Served) -> None:
    count = 0
    with httpx.Client(base_url=server.url, timeout=10) as client:
        for name, values in BAD.items():
            for value in values:
                for way in ({}, {"stream": True} if name != "stream" and not count % 3 else {}):
                    body = json.dumps({"input": "a", "max_output_tokens": 2, **way, name: value})
                    answer = client.post(PATH, content=body)
                    error = require_error(answer, (name, value))
                    assert answer.elapsed.total_seconds() < 1
                    assert (error["param"] or "").startswith(name) or name in error["message"], (name, value, error)
                    count += 1
        for body in (b"", b"{", b"[]", b"null", b'{"input": "\xff"}', b'{"input": "\\ud800"}', b"{}"):
            require_error(client.post(PATH, content=body), body)
    assert count >= 200
    assert server.post(PATH, {"input": "a", "max_output_tokens": 1}).status_code == 200


def test_unknown_fields(server: Served, demo: Any) -> None:
    from served import served

    post(server, max_output_tokens=1, temprature=1, user="me")
    with served(demo, strict=True) as strict:
        error = require_error(strict.post(PATH, {"input": "a", "temprature": 1}))
        assert "temperature" in error["message"]
        known = {"user": "me", "service_tier": "auto", "prompt_cache_key": "x", "safety_identifier": "y"}
        post(strict, max_output_tokens=1, **known)
