"""Frameworks and programs that speak OpenAI's API, as docs/apps.md configures them.

They bring many packages, so the extra dev has none of them. CONTRIBUTING.md says how to run these tests.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest

pytest.importorskip("starlette")
pytest.importorskip("llguidance")
pytest.importorskip("openai", reason="the package openai is not installed; the extra dev has it")

from pydantic import BaseModel
from served import MESSAGES, Served
from test_openai_client import MODEL
from test_replies import talker  # noqa: F401 a fixture

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # warnings of other packages are theirs
TEXT = MESSAGES[0]["content"]
PAGE = Path(__file__).parents[2] / "docs" / "apps.md"


def shown(heading: str, server: Served) -> str:
    """The configuration that docs/apps.md shows below a heading, for this server."""
    part = PAGE.read_text().partition(f"\n## {heading}\n")[2]
    (block, *_) = re.findall(r"```(?:python|yaml)\n(.*?)```", part, re.DOTALL)
    assert "http://127.0.0.1:8000" in block and "MODEL" in block
    return str(block).replace("http://127.0.0.1:8000", server.url).replace("MODEL", MODEL)


def shown_model(heading: str, server: Served) -> Any:
    """The object `model` that the page's Python makes."""
    names: dict[str, Any] = {}
    exec(shown(heading, server), names)
    return names["model"]


class Thing(BaseModel):
    """A thing and how many of it."""

    kind: Literal["red", "green"]
    count: Literal[1, 2, 3]


# ---- LangChain


def chat_openai(server: Served, **more: Any) -> Any:
    module = pytest.importorskip("langchain_openai")
    given = {"model": MODEL, "base_url": server.url + "/v1", "api_key": "none", "max_retries": 0, **more}
    return module.ChatOpenAI(**given)


def test_langchain_invokes_and_streams(server: Served) -> None:
    model = chat_openai(server, temperature=0, max_tokens=40, stream_usage=True)
    expected = server.pair.generate(MESSAGES, max_new_tokens=40)
    found = model.invoke(TEXT)
    assert found.content == expected.text
    assert found.usage_metadata["output_tokens"] == len(expected.tokens)
    assert found.response_metadata["finish_reason"] == expected.finish_reason
    chunks = list(model.stream(TEXT))
    assert "".join(chunk.content for chunk in chunks) == expected.text
    assert len(chunks) > 5
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == len(
        expected.tokens
    )
    assert [one.content for one in model.batch([TEXT] * 4)] == [expected.text] * 4


def test_langchain_as_the_page_shows_it(server: Served) -> None:
    pytest.importorskip("langchain_openai")
    found = shown_model("LangChain", server).bind(max_tokens=20, temperature=0).invoke(TEXT)
    assert found.content == server.pair.generate(MESSAGES, max_new_tokens=20).text


def test_langchain_streams_in_tasks(server: Served) -> None:
    async def several() -> list[str]:
        async with httpx.AsyncClient() as http:  # LangChain's own one is never closed
            model = chat_openai(server, temperature=0, max_tokens=40, http_async_client=http)

            async def one() -> str:
                return "".join([chunk.content async for chunk in model.astream(TEXT)])

            return await asyncio.gather(*(one() for _ in range(4)))

    assert asyncio.run(several()) == [server.pair.generate(MESSAGES, max_new_tokens=40).text] * 4


def test_langchain_samples_as_the_library(server: Served) -> None:
    own = {"draft_length": 3, "top_k": 20, "min_p": 0.01}
    model = chat_openai(server, temperature=0.8, seed=4, max_tokens=30, extra_body=own)
    expected = server.pair.generate(MESSAGES, max_new_tokens=30, temperature=0.8, seed=4, **own)
    assert model.invoke(TEXT).content == expected.text


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_langchain_gets_structured_output(talker: Served, method: str) -> None:  # noqa: F811
    model = chat_openai(talker, temperature=0, max_tokens=300, extra_body={"max_reasoning_tokens": 0})
    if method == "json_mode":  # JSON of any form: the model need not know the fields
        found = model.with_structured_output(None, method=method, include_raw=True).invoke(TEXT)
        assert found["parsed"] is not None or found["raw"].response_metadata["finish_reason"] == "length"
    else:
        assert isinstance(model.with_structured_output(Thing, method=method).invoke(TEXT), Thing)


def test_langchain_calls_tools_in_a_loop(talker: Served) -> None:  # noqa: F811
    pytest.importorskip("langchain_openai")
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    @tool
    def get_weather(city: Literal["Ulm", "Bonn"], days: Literal[1, 2]) -> str:
        """The weather of a city."""
        return f"It rains in {city} for {days} days"

    model = chat_openai(talker, temperature=0, max_tokens=300, extra_body={"max_reasoning_tokens": 0})
    messages: list[Any] = [HumanMessage("Do I need an umbrella?")]
    messages.append(model.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False).invoke(messages))
    calls = messages[-1].tool_calls
    assert calls and not messages[-1].invalid_tool_calls
    for call in calls:
        message = get_weather.invoke(call)
        assert isinstance(message, ToolMessage) and "rains" in message.content
        messages.append(message)
    answer = model.bind_tools([get_weather], tool_choice="none").invoke(messages)
    assert answer.content and not answer.tool_calls
    parts = model.bind_tools([get_weather], tool_choice="get_weather", parallel_tool_calls=False).stream(messages[:1])
    whole = next(parts)
    for part in parts:
        whole += part
    assert [call["name"] for call in whole.tool_calls] == ["get_weather"]


def test_langchain_raises_openais_errors(server: Served) -> None:
    model = chat_openai(server, model="gpt-4o")
    import openai

    with pytest.raises(openai.NotFoundError, match="gpt-4o"):
        model.invoke(TEXT)
    with pytest.raises(openai.BadRequestError, match="top_k"):
        list(chat_openai(server, extra_body={"top_k": "all"}).stream(TEXT))


# ---- llm


@pytest.fixture
def llm(server: Served, tmp_path: Path) -> Any:
    """Runs `llm` with the models of docs/apps.md."""
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(shown("llm", server))
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llm", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    return run


@pytest.mark.parametrize("way", [(), ("--no-stream",)])
def test_llm_answers(server: Served, llm: Any, way: tuple[str, ...]) -> None:
    found = llm("-m", "pard", "-o", "max_tokens", "40", "-o", "temperature", "0", *way, TEXT)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == server.pair.generate(MESSAGES, max_new_tokens=40).text.strip()


def test_llm_goes_on_and_takes_a_schema(server: Served, llm: Any) -> None:
    assert "pard" in llm("models").stdout
    first = llm("-m", "pard", "-s", "Be brief", "-o", "max_tokens", "10", TEXT)
    assert first.returncode == 0, first.stderr
    assert llm("-c", "-o", "max_tokens", "10", "And then?").returncode == 0
    found = llm("-m", "pard", "--no-stream", "--schema", json.dumps(Thing.model_json_schema()), TEXT)
    assert found.returncode == 0, found.stderr
    Thing.model_validate_json(found.stdout)


# ---- LlamaIndex


def test_llama_index_answers(server: Served) -> None:
    module = pytest.importorskip("llama_index.llms.openai_like")
    from llama_index.core.llms import ChatMessage

    given = {"model": MODEL, "api_base": server.url + "/v1", "api_key": "none", "max_tokens": 40, "temperature": 0.0}
    model = module.OpenAILike(is_chat_model=True, context_window=2048, **given)
    expected = server.pair.generate(MESSAGES, max_new_tokens=40).text
    assert model.chat([ChatMessage(role="user", content=TEXT)]).message.content == expected
    assert model.complete(TEXT).text == expected
    assert "".join(part.delta or "" for part in model.stream_chat([ChatMessage(role="user", content=TEXT)])) == expected

    async def complete() -> str:
        async with httpx.AsyncClient() as http:
            text: str = (
                await module.OpenAILike(is_chat_model=True, async_http_client=http, **given).acomplete(TEXT)
            ).text
            return text

    assert asyncio.run(complete()) == expected
    assert shown_model("LlamaIndex", server).complete(TEXT, max_tokens=40, temperature=0).text == expected
    plain = module.OpenAILike(is_chat_model=False, context_window=2048, **given)
    assert plain.complete("def add(").text == server.pair.generate("def add(", max_new_tokens=40).text
