"""Real chat templates: the text is that of transformers' apply_chat_template, to the character."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from real import NPM, npm_tokenizer, smollm2_template
from transformers import PreTrainedTokenizerFast

from pard_onnx.models.chat_template import template_problem
from pard_onnx.models.checkpoints.vocabulary import chat_template
from pard_onnx.models.errors import BadInput
from pard_onnx.runtime.text.template import render
from pard_onnx.runtime.text.tokenizer import Text

pytestmark = pytest.mark.real
NAMES = (*NPM, "smollm2")
SMOLLM2_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The weather in a city, "now" — ünïcode',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}},
            "required": ["city"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time", "description": "", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}}


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be brief.\n"}
THOUGHT = "First, count.\nThen answer."
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": [user("How many?")],
    "system": [SYSTEM, user("How many?")],
    "empty system": [{"role": "system", "content": ""}, user("Hi")],
    "several turns": [SYSTEM, user("One?"), assistant("1"), user(" Two? "), assistant("2\n"), user("Three?")],
    "spaces and markup": [user("  <b>&amp;</b> {{ x }} {% raw %} \n\n")],
    "an answer at the end": [user("One?"), assistant("1")],
    "parts": [user([{"type": "text", "text": "One "}, {"type": "text", "text": "two"}])],
    "thinking in the content": [user("?"), assistant(f"<think>\n{THOUGHT}\n</think>\n\n3"), user("Sure?")],
    "thinking of its own": [user("?"), assistant("3", reasoning_content=THOUGHT), user("Sure?")],
    "thinking of the last answer": [user("?"), assistant("3", reasoning_content=THOUGHT)],
    "a call": [user("Weather?"), assistant("", tool_calls=[CALL])],
    "a call without content": [user("Weather?"), assistant(None, tool_calls=[CALL])],
    "a call and its result": [
        SYSTEM,
        user("Weather?"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "name": "get_weather", "content": '{"sun": true}'},
    ],
    "thinking, call, result, answer": [
        user("Weather?"),
        assistant("", tool_calls=[CALL], reasoning_content=THOUGHT),
        {"role": "tool", "content": "sunny"},
        assistant("Sunny.", reasoning_content="It says so."),
        user("Really?"),
    ],
    "a result that is data": [
        user("Weather?"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "content": {"sun": True, "ü": None}},
    ],
    "two calls": [user("?"), assistant("Both.", tool_calls=[CALL, CALL])],
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "none": {},
    "tools": {"tools": [WEATHER]},
    "two tools": {"tools": [WEATHER, TIME]},
    "no thinking": {"enable_thinking": False},
    "thinking": {"enable_thinking": True},
    "date": {"date_string": "26 Jul 2025"},
    "tools in the user's message": {"tools": [WEATHER], "tools_in_user_message": True},
    "tools in the system message": {"tools": [WEATHER], "tools_in_user_message": False},
    "no prompt for an answer": {"add_generation_prompt": False},
}


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, dict[str, str]]]:
    """By name: the template and the special tokens; fetched once."""
    return {}


@pytest.fixture(params=NAMES)
def real_template(
    request: pytest.FixtureRequest,
    templates: dict[str, tuple[str, dict[str, str]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, dict[str, str]]:
    name = request.param
    if name not in templates:
        folder: Path = tmp_path_factory.mktemp(name)
        if name == "smollm2":
            templates[name] = smollm2_template(), SMOLLM2_TOKENS
        else:
            npm_tokenizer(name, folder)
            found = chat_template(folder)
            assert found
            templates[name] = found, dict(Text(folder, None).special_tokens)
    return templates[name]


@pytest.fixture(scope="session")
def blank(make_tokenizer: Any) -> PreTrainedTokenizerFast:
    """transformers' renderer; the template and the special tokens are set in each test."""
    return PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(280))


def expected(
    blank: PreTrainedTokenizerFast, template: str, special: dict[str, str], messages: Any, arguments: dict[str, Any]
) -> str:
    options = {"add_generation_prompt": True} | special | arguments
    text: str = blank.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    return text


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_the_text_is_that_of_transformers(
    real_template: tuple[str, dict[str, str]], blank: PreTrainedTokenizerFast, conversation: str, arguments: str
) -> None:
    template, special = real_template
    messages, given = CONVERSATIONS[conversation], ARGUMENTS[arguments]
    whole = special | given
    ours = joined(messages) if "parts" in conversation else messages
    try:
        try:
            wanted = expected(blank, template, special, ours, given)
        except Exception:  # a template may ask for a content, which OpenAI's calls do not have
            with_content = [message | {"content": message["content"] or ""} for message in ours]
            wanted = expected(blank, template, special, with_content, given)
    except Exception as refusal:  # a template may refuse, such as Llama's does with two calls
        with pytest.raises(type(refusal), match=re.escape(str(refusal))):
            render(template, messages, whole)
        return
    python = [str(one["content"]) for one in messages if isinstance(one["content"], dict)]
    if any(text in wanted for text in python):  # an object in Python's notation, which no model was trained on
        with pytest.raises(BadInput, match="takes no content of the type dict"):
            render(template, messages, whole)
    else:
        assert render(template, messages, whole) == wanted


@pytest.mark.parametrize("conversation", [name for name, said in CONVERSATIONS.items() if "call" in str(said)])
def test_arguments_as_json_text(real_template: tuple[str, dict[str, str]], conversation: str) -> None:
    """As OpenAI's clients send them; only templates that ask for text get text."""
    template, special = real_template
    messages = CONVERSATIONS[conversation]
    written = [
        message | {"tool_calls": [as_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]
    try:
        wanted = render(template, messages, special)
    except Exception as refusal:
        with pytest.raises(type(refusal), match=re.escape(str(refusal))):
            render(template, written, special)
        return
    assert render(template, written, special) == wanted


def as_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Content parts as one text, for templates that take texts alone; transformers would write Python's lists."""
    return [message | {"content": "".join(part["text"] for part in message["content"])} for message in messages]


@pytest.mark.parametrize("name", ["thinking", "reasoning"])
def test_thinking_under_another_name(
    real_template: tuple[str, dict[str, str]], blank: PreTrainedTokenizerFast, name: str
) -> None:
    template, special = real_template
    messages = CONVERSATIONS["thinking, call, result, answer"]
    renamed = [{name if key == "reasoning_content" else key: value for key, value in one.items()} for one in messages]
    assert render(template, renamed, special) == expected(blank, template, special, messages, {})


def test_they_compile(real_template: tuple[str, dict[str, str]]) -> None:
    assert template_problem(real_template[0]) is None
