"""The server through OpenAI's own client: the texts are the library's, and so are errors."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

pytest.importorskip("starlette")
openai = pytest.importorskip("openai", reason="the package openai is not installed; the extra dev has it")

from served import MESSAGES, Served  # noqa: E402

MODEL = "demo"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Ulm", "Bonn"]}, "days": {"enum": [1, 2]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["red", "green"]}, "count": {"enum": [1, 2, 3]}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}


@pytest.fixture
def client(server: Served) -> Any:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 5, "top_p": 0.9},
    {"stop": ["self"]},
    {"presence_penalty": 1.5, "frequency_penalty": 0.3, "logit_bias": {"312": 3.0}},
    {
        "extra_body": {"top_k": 9, "min_p": 0.02, "repetition_penalty": 1.1, "draft_length": 0},
        "temperature": 1.1,
        "seed": 1,
    },
    {"extra_body": {"draft_length": 7}},
]


def options(way: dict[str, Any]) -> dict[str, Any]:
    """The same as options of the library."""
    out = {**way, **way.get("extra_body", {})}
    out.pop("extra_body", None)
    if "logit_bias" in out:
        out["logit_bias"] = {int(key): value for key, value in out["logit_bias"].items()}
    return out


@pytest.mark.parametrize("way", WAYS)
def test_a_chat_has_the_librarys_text(server: Served, client: Any, way: dict[str, Any]) -> None:
    expected = server.pair.generate(MESSAGES, max_new_tokens=40, **options(way))
    found = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=40, **way)
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].finish_reason == expected.finish_reason
    assert found.usage.completion_tokens == len(expected.tokens)
    assert found.usage.prompt_tokens == expected.stats.prompt_tokens
    with client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=40, stream=True, **way
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [expected.finish_reason]
    pieces = [piece for chunk in chunks for piece in getattr(chunk, "pard", {}).get("pieces", ())]
    assert "".join(pieces) == expected.text


def test_async_streams_end_with_the_usage(server: Served) -> None:
    expected = server.pair.generate(MESSAGES, max_new_tokens=30)

    async def one(client: Any) -> tuple[str, Any]:
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=30, stream=True, stream_options={"include_usage": True}
        )
        text, usage = "", None
        async for chunk in stream:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = usage or chunk.usage
        return text, usage

    async def several() -> list[tuple[str, Any]]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client) for _ in range(8)))

    for text, usage in asyncio.run(several()):
        assert text == expected.text
        assert usage.total_tokens == expected.stats.prompt_tokens + len(expected.tokens)


def test_several_choices_have_seeds_of_their_own(server: Served, client: Any) -> None:
    way = {"temperature": 1.3, "seed": 7}
    expected = [server.pair.generate(MESSAGES, max_new_tokens=12, **{**way, "seed": 7 + i}).text for i in range(3)]
    found = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12, n=3, **way)
    assert [choice.message.content for choice in found.choices] == expected
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12, n=3, stream=True, **way):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == expected


def test_a_reply_goes_on_with_the_last_message(server: Served, client: Any) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "def add("}]
    expected = server.pair.generate(messages, max_new_tokens=12, continue_final_message=True).text
    more = {"continue_final_message": True}
    found = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, extra_body=more)
    assert found.choices[0].message.content == expected


def test_structured_output(client: Any) -> None:
    pytest.importorskip("llguidance")
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    found = client.chat.completions.create(model=MODEL, messages=MESSAGES, response_format=wanted)
    assert found.choices[0].finish_reason == "stop"
    value = json.loads(found.choices[0].message.content)
    assert value["kind"] in ("red", "green")
    assert value["count"] in (1, 2, 3)
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as error:
        bad = {**wanted, "json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}}}
        client.chat.completions.create(model=MODEL, messages=MESSAGES, response_format=bad)
    assert error.value.type == "invalid_request_error"


def test_log_probabilities_are_the_librarys(server: Served, client: Any) -> None:
    expected = server.pair.generate(MESSAGES, max_new_tokens=6, logprobs=3)
    assert expected.logprobs is not None
    wanted = [one.openai() for one in expected.logprobs]
    way = {"model": MODEL, "messages": MESSAGES, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    found = client.chat.completions.create(**way).choices[0].logprobs
    assert [one.model_dump() for one in found.content] == wanted
    streamed = [
        one.model_dump()
        for chunk in client.chat.completions.create(stream=True, **way)
        if chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content
    ]
    assert streamed == wanted


def test_completions(server: Served, client: Any) -> None:
    pair, prompt = server.pair, "def fibonacci(n):"
    expected = pair.generate(prompt, max_new_tokens=16, prompt_logprobs=2, logprobs=2)
    ids = pair.encode(prompt)
    assert client.completions.create(model=MODEL, prompt=prompt).choices[0].text == expected.text  # 16 by default
    found = client.completions.create(model=MODEL, prompt=[prompt, "class A"], max_tokens=16, n=2)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in found.choices[:2]] == [expected.text] * 2
    assert client.completions.create(model=MODEL, prompt=[ids, ids]).choices[1].text == expected.text
    text = "".join(chunk.choices[0].text for chunk in client.completions.create(model=MODEL, prompt=ids, stream=True))
    assert text == expected.text
    found = client.completions.create(model=MODEL, prompt=prompt, max_tokens=16, echo=True, logprobs=2).choices[0]
    assert found.text == prompt + expected.text
    assert expected.prompt_logprobs is not None
    assert expected.logprobs is not None
    both = (*expected.prompt_logprobs, *expected.logprobs)
    assert found.logprobs.token_logprobs == [one and one.logprob for one in both]
    assert "".join(found.logprobs.tokens) == found.text
    for offset, token in zip(found.logprobs.text_offset, found.logprobs.tokens, strict=True):
        assert found.text[offset:].startswith(token)
    alone = client.completions.create(model=MODEL, prompt=prompt, max_tokens=0, echo=True, logprobs=2).choices[0]
    assert alone.text == prompt
    assert alone.logprobs.token_logprobs == found.logprobs.token_logprobs[: len(ids)]


def test_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "pard-onnx"


@pytest.mark.parametrize(
    ("kind", "request_"),
    [
        ("NotFoundError", {"model": "gpt-4o"}),
        ("BadRequestError", {"temperature": -1}),
        ("BadRequestError", {"messages": [{"role": "user", "content": "long " * 4000}]}),
        ("BadRequestError", {"messages": [{"role": "user", "content": [IMAGE]}]}),
    ],
)
def test_errors_are_the_clients_own(client: Any, kind: str, request_: dict[str, Any]) -> None:
    with pytest.raises(getattr(openai, kind)) as error:
        client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, **request_})
    body = error.value.body
    assert body["message"]
    codes = {"NotFoundError": "model_not_found"}
    if kind in codes:
        assert body["code"] == codes[kind]
    if "long" in str(request_):
        assert body["code"] == "context_length_exceeded"
    if "temperature" in request_:
        assert body["param"] == "temperature"
    if "image_url" in str(request_):
        assert "image_url" in body["message"]


def test_embeddings_are_refused_with_the_reason(client: Any) -> None:
    with pytest.raises(openai.APIStatusError, match="hidden states") as error:
        client.embeddings.create(model=MODEL, input="text")
    assert error.value.status_code == 501
