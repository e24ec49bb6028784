"""Tools and reasoning over HTTP, by the shipped pair with a chat template that knows both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("llguidance")
openai = pytest.importorskip("openai", reason="the package openai is not installed; the extra dev has it")

from served import Served, served  # noqa: E402
from test_openai_client import TOOL  # noqa: E402

from pard_onnx.models.manifest import Manifest  # noqa: E402
from pard_onnx.serve.sources import Source  # noqa: E402

TEMPLATE = """{%- if tools %}{{- '<|im_start|>system\\n<tools>' }}{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}
{%- endfor %}{{- '\\n</tools><|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content %}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}{{- '\\n<tool_call>\\n{"name": "' + call.function.name }}
{{- '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- if begun %}{{- '<think>\\n' }}{%- endif %}
{%- endif %}"""
QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "Do I need an umbrella?"}]
TOOLS = [TOOL, {"type": "function", "function": {"name": "stop", "description": "Ends it"}}]


@pytest.fixture(scope="module")
def talker(demo: Source, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pytest.importorskip("uvicorn")
    target = tmp_path_factory.mktemp("talker") / "target"
    shutil.copytree(demo.target, target)
    old = Manifest.read(target)
    replace(old, spec=replace(old.spec, chat_template=TEMPLATE)).write(target)
    with served(replace(demo, target=str(target))) as running:
        running.chat()
        yield running


@pytest.fixture
def client(talker: Served) -> Any:
    with openai.OpenAI(base_url=talker.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_calls_that_must_be_made(talker: Served, client: Any, choice: Any) -> None:
    own = {"max_reasoning_tokens": 0}  # the demo's model would never end its thinking
    expected = talker.pair.generate(QUESTION, tools=TOOLS, tool_choice=choice, max_new_tokens=300, **own)
    assert expected.tool_calls
    wanted = [call.as_message() for call in expected.tool_calls]
    way = {"model": "demo", "messages": QUESTION, "tools": TOOLS, "tool_choice": choice, "max_tokens": 300}
    way["extra_body"] = own
    found = client.chat.completions.create(**way).choices[0]
    assert found.finish_reason == expected.finish_reason
    calls = [call.model_dump() for call in found.message.tool_calls]
    assert calls == wanted
    assert found.message.content == (expected.text or None)
    parts: dict[int, dict[str, Any]] = {}
    for chunk in client.chat.completions.create(stream=True, **way):
        for call in chunk.choices[0].delta.tool_calls or ():
            part = parts.setdefault(call.index, {"id": call.id, "name": call.function.name, "arguments": ""})
            part["arguments"] += call.function.arguments
    assert [(part["id"], part["name"], part["arguments"]) for part in parts.values()] == [
        (call.id, call.name, call.arguments) for call in expected.tool_calls
    ]
    # The results go back, as the client has the calls
    answers = [{"role": "tool", "tool_call_id": call["id"], "content": "rain"} for call in calls]
    messages = [*QUESTION, found.message.model_dump(exclude_none=True), *answers]
    again = client.chat.completions.create(model="demo", messages=messages, tools=TOOLS, max_tokens=10)
    assert again.choices[0].message.content == talker.pair.generate(messages, tools=TOOLS, max_new_tokens=10).text


def test_tools_may_be_left_alone(talker: Served, client: Any) -> None:
    plain = talker.pair.generate(QUESTION, max_new_tokens=20).text
    for tools, choice in ((TOOLS, "none"), ([], "auto")):
        found = client.chat.completions.create(
            model="demo", messages=QUESTION, tools=tools, tool_choice=choice, max_tokens=20
        )
        assert found.choices[0].message.content == plain
        assert found.choices[0].message.tool_calls is None


def test_reasoning_is_apart_from_the_answer(talker: Served, client: Any) -> None:
    library = {"template_arguments": {"begun": True}, "max_reasoning_tokens": 12, "max_new_tokens": 40}
    expected = talker.pair.generate(QUESTION, **library)  # type: ignore[arg-type]
    assert expected.reasoning
    assert expected.text
    way = {
        "model": "demo",
        "messages": QUESTION,
        "max_tokens": 40,
        "extra_body": {"chat_template_kwargs": {"begun": True}, "max_reasoning_tokens": 12},
    }
    message = client.chat.completions.create(**way).choices[0].message
    assert (message.reasoning_content, message.content) == (expected.reasoning, expected.text)
    reasoning = text = ""
    for chunk in client.chat.completions.create(stream=True, **way):
        delta = chunk.choices[0].delta
        reasoning += getattr(delta, "reasoning_content", None) or ""
        text += delta.content or ""
    assert (reasoning, text) == (expected.reasoning, expected.text)


def test_the_role_developer_is_that_of_the_system(talker: Served) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, *QUESTION]
    system = [{**messages[0], "role": "system"}, *QUESTION]
    found = talker.chat(messages=messages, max_tokens=10).json()
    assert found["choices"][0]["message"]["content"] == talker.pair.generate(system, max_new_tokens=10).text


def test_structured_output_follows_the_reasoning(talker: Served) -> None:
    found = talker.chat(
        messages=QUESTION,
        max_tokens=200,
        chat_template_kwargs={"begun": True},
        max_reasoning_tokens=5,
        response_format={"type": "json_schema", "json_schema": {"schema": {"enum": ["yes", "no"]}}},
    ).json()["choices"][0]
    assert json.loads(found["message"]["content"]) in ("yes", "no")
    assert found["message"]["reasoning_content"]


def test_the_folder_is_a_real_one(talker: Served) -> None:
    assert Path(talker.pair.target_name).is_dir()
