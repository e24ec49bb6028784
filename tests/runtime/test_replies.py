"""Replies with reasoning and calls of tools, on a toy pair: the same with any draft, in streams and in chats."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jsonschema
import numpy as np
import pytest
from toy_artifacts import QWEN_LIKE

from pard_onnx import BadInput, Chunk, Pair, Result, ToolCall, load
from pard_onnx.models.manifest import File, Manifest
from pard_onnx.runtime.engine import Engine
from pard_onnx.runtime.text.tools import checked_tools

EOS = 279
ROWS = 1024 + 64
IGNORES_TOOLS = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}:"
UNKNOWN_FORM = (
    "{{ tools | tojson if tools else '' }}{% for m in messages %}{{ m.role + m.content }}{% endfor %}<function=>"
)
MISTRAL_LIKE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '[TOOL_CALLS]' + c.function.name + '[ARGS]' }}"
    "{{ c.function.arguments | tojson }}"
    "{% endfor %}{% endfor %}:"
)


def get_weather(city: Literal["Ulm", "Köln"], days: int | None = 1) -> str:
    """The weather.

    Args:
        city: The city
        days: How many days
    """
    raise NotImplementedError


def stop() -> None:
    """Ends it."""


TOOLS = [get_weather, stop]
TOOLS_OF_OPENAI = checked_tools(TOOLS)
WORDS = "the quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def make_pair(write_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """make_pair(template, special): a toy pair with this chat template, whose first special token has this text."""
    made: dict[tuple[str, str], Pair] = {}

    def make(template: str = QWEN_LIKE, special: str = "<|end|>") -> Pair:
        if (template, special) not in made:
            root = tmp_path_factory.mktemp("pair")
            target = write_artifact(root / "target", "target", eos=(EOS,), kv_rows=ROWS)
            draft = write_artifact(root / "draft", "draft", rows=284, kv_rows=ROWS)
            for folder in (target, draft):
                file = folder / "tokenizer.json"
                file.write_text(file.read_text("utf-8").replace("<|end|>", special), "utf-8")
                old = Manifest.read(folder)
                files = tuple(File.of(folder / one.name) for one in old.files)
                replace(old, spec=replace(old.spec, chat_template=template), files=files).write(folder)
            made[template, special] = load(target, draft, threads=1)
        return made[template, special]

    yield make
    for pair in made.values():
        pair.close()


class Script:
    """A row edit that makes the model write these tokens, and then EOS."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids
        self.start: int | None = None

    def edit(self, row: Any, tokens: Sequence[int]) -> Any:
        self.start = len(tokens) if self.start is None else self.start
        at = len(tokens) - self.start
        row.fill(-np.inf)
        row[self.ids[at] if at < len(self.ids) else EOS] = 1
        return row


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Pair, str], None]:
    """writes(pair, text): the model writes this text."""
    usual = Engine.row_edits

    def script(pair: Pair, text: str) -> None:
        ids = pair.text.encode_plain(text)
        monkeypatch.setattr(
            Engine, "row_edits", lambda self, options, matcher: (*usual(self, options, matcher), Script(ids))
        )

    return script


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def streamed(pair: Pair, **options: Any) -> tuple[Result, list[Chunk]]:
    """A generation whose chunks agree with its result."""
    stream = pair.stream([user("hi")], **({"max_new_tokens": 300} | options))
    chunks = list(stream)
    result = stream.result
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert all("".join(chunk.pieces) == chunk.text and len(chunk.pieces) >= len(chunk.tokens) for chunk in chunks)
    assert "".join(chunk.reasoning for chunk in chunks) == result.reasoning
    calls: dict[int, list[Any]] = {}
    for delta in (delta for chunk in chunks for delta in chunk.tool_calls):
        call = calls.setdefault(delta.index, [delta.id, delta.name, ""])
        assert delta.id in (None, call[0]) and delta.name in (None, call[1])
        call[2] += delta.arguments
    assert [ToolCall(*call) for call in calls.values()] == list(result.tool_calls)
    return result, chunks


def test_the_first_chunk_has_the_facts(make_pair: Any, writes: Callable[[Pair, str], None]) -> None:
    pair = make_pair()
    writes(pair, WORDS)
    result, chunks = streamed(pair, draft_length=1)
    assert len(chunks) > 2
    assert [chunk.facts is not None for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    facts, stats = chunks[0].facts, result.stats
    assert facts is not None
    assert (facts.prompt_tokens, facts.cached_tokens) == (stats.prompt_tokens, stats.cached_tokens)


def test_the_stop_string_is_named(make_pair: Any, writes: Callable[[Pair, str], None]) -> None:
    pair = make_pair()
    writes(pair, WORDS)
    assert streamed(pair, stop=["dog", "fox"])[0].stop_string == "fox"
    assert streamed(pair, stop=["cat"])[0].stop_string is None
    assert streamed(pair)[0].stop_string is None


def test_a_reply_goes_on_with_the_last_message(make_pair: Any, writes: Callable[[Pair, str], None]) -> None:
    """Its reasoning and its calls are read as of any reply, also where the message has begun the thinking."""
    pair = make_pair()
    options: dict[str, Any] = {"continue_final_message": True, "tools": TOOLS, "max_new_tokens": 300}
    asked = [user("hi"), {"role": "assistant", "content": "Well, "}]
    writes(pair, f"I look.\n{CALLS}")
    result = pair.generate(asked, **options)
    assert result.text == "I look."
    assert [call.name for call in result.tool_calls] == ["get_weather", "stop"]
    whole = pair.text.render(asked, {"tools": list(TOOLS_OF_OPENAI), "add_generation_prompt": False})
    assert result.stats.prompt_tokens == len(pair.text.encode_plain(whole[: whole.index("Well, ") + 6]))
    assert pair.count_tokens(asked, **options) == result.stats.prompt_tokens
    thought = [user("hi"), {"role": "assistant", "content": "<think>\nthe quick"}]
    writes(pair, f" brown\n</think>\n\n{WORDS}")
    result = pair.generate(thought, **options)
    assert (result.reasoning, result.text) == (" brown", WORDS)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([user("hi")], "the role 'user'"),
        (
            [user("hi"), {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}],
            "calls tools",
        ),
        ([user("hi"), {"role": "assistant", "content": None}], "has no text"),
        ([user("hi"), {"role": "assistant", "content": []}], "has no text"),
        ("hi", "is for chats"),
    ],
)
def test_what_cannot_go_on(make_pair: Any, prompt: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make_pair().generate(prompt, continue_final_message=True)


def test_a_turn_of_a_chat_does_not_go_on(make_pair: Any) -> None:
    with pytest.raises(BadInput, match="continue_final_message"):
        make_pair().chat().send("hi", continue_final_message=True)


LENGTHS = [0, 1, 4, "auto"]
CALLS = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln", "days": 1.50}}\n</tool_call>\n'
    '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
)


@pytest.mark.parametrize(
    ("k", "special"),
    [*((k, "<|end|>") for k in LENGTHS), *((4, tag) for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>"))],
)
@pytest.mark.parametrize("begun", [False, True])
def test_the_parts_of_a_reply(
    make_pair: Any, writes: Callable[[Pair, str], None], k: Any, special: str, begun: bool
) -> None:
    """Tags may be special tokens, which are not in the decoded text."""
    pair = make_pair(special=special)
    writes(pair, ("" if begun else "<think>\n") + f"{WORDS} ünd.\n</think>\n\nI look.\n{CALLS}")
    arguments = {"begun": True} if begun else {}
    result, _ = streamed(pair, tools=TOOLS, draft_length=k, template_arguments=arguments)
    assert (result.reasoning, result.text) == (f"{WORDS} ünd.", "I look.")
    assert [(call.name, call.arguments) for call in result.tool_calls] == [
        ("get_weather", '{"city": "Köln", "days": 1.50}'),
        ("stop", "{}"),
    ]
    assert result.finish_reason == "tool_calls"
    again = pair.generate([user("hi")], tools=TOOLS, max_new_tokens=300, template_arguments=arguments)
    assert again.tool_calls == result.tool_calls and again.tokens == result.tokens
    assert len({call.id for call in result.tool_calls}) == 2


@pytest.mark.parametrize("special", ["[TOOL_CALLS]", "[ARGS]"])
def test_special_tokens_of_mistral(make_pair: Any, writes: Callable[[Pair, str], None], special: str) -> None:
    pair = make_pair(MISTRAL_LIKE, special)
    writes(pair, 'So:[TOOL_CALLS]get_weather[ARGS]{"city": "Ulm"}[TOOL_CALLS]stop[ARGS]{}')
    result, _ = streamed(pair, tools=TOOLS)
    assert result.text == "So:"
    assert [(call.name, call.arguments) for call in result.tool_calls] == [
        ("get_weather", '{"city": "Ulm"}'),
        ("stop", "{}"),
    ]
    assert all(len(call.id) == 9 and call.id.isalnum() for call in result.tool_calls)


def test_only_chats_have_parts(make_pair: Any, writes: Callable[[Pair, str], None]) -> None:
    pair = make_pair()
    text = "<think>\na\n</think>\n\nb" + CALLS
    writes(pair, text)
    assert pair.generate("hi", max_new_tokens=300).text == text
    assert pair.generate(pair.encode([user("hi")]), max_new_tokens=300).text == text
    result = pair.generate("hi", chat=True, max_new_tokens=300)
    assert (result.reasoning, result.text, result.tool_calls) == ("a", "b" + CALLS, ())
    assert result.finish_reason == "stop"
    result = pair.generate([user("hi")], tools=TOOLS, tool_choice="none", max_new_tokens=300)
    assert result.text == "b" + CALLS


def test_one_call_only(make_pair: Any, writes: Callable[[Pair, str], None]) -> None:
    pair = make_pair()
    writes(pair, CALLS)
    for k in LENGTHS:
        result, _ = streamed(pair, tools=TOOLS, parallel_tool_calls=False, draft_length=k)
        assert [call.name for call in result.tool_calls] == ["get_weather"]
        assert (result.text, result.finish_reason) == ("", "tool_calls")
        assert pair.text.decode(result.tokens) == CALLS[: CALLS.index("</tool_call>") + len("</tool_call>")]


def test_cut_short(make_pair: Any, writes: Callable[[Pair, str], None]) -> None:
    """Whatever ends the reply: what is no whole call is text, and thinking is reasoning."""
    pair = make_pair()
    writes(pair, "<think>\na b c\n</think>\n\nd" + CALLS)
    whole = pair.generate([user("hi")], tools=TOOLS, max_new_tokens=300).tokens
    for length in (*range(1, len(whole), 4), len(whole)):
        result = pair.generate([user("hi")], tools=TOOLS, max_new_tokens=length)
        text = pair.text.decode(whole[:length])
        assert result.finish_reason == ("length" if length <= len(whole) else "stop")
        if "</think>" not in text:
            assert result.text == ("" if text.startswith("<think>") else text)
        else:
            calls = text.count("1.50}}") + text.count("{}}")
            assert len(result.tool_calls) == calls and result.reasoning == "a b c"
            answer = text.partition("</think>")[2].lstrip("\n")
            assert result.text == answer if not calls else result.text[1:].strip() in CALLS
    result = pair.generate([user("hi")], tools=TOOLS, max_new_tokens=300, stop='"days"')
    assert (result.text, result.finish_reason) == ("d" + CALLS[: CALLS.index('"days"')], "stop")
    result = pair.generate([user("hi")], tools=TOOLS, max_new_tokens=300, stop="b c")
    assert (result.text, result.reasoning, result.finish_reason) == ("", "a ", "stop")


@pytest.mark.parametrize(("budget", "special"), [(0, "<|end|>"), (5, "<|end|>"), (1, "<think>"), (1, "</think>")])
@pytest.mark.parametrize("begun", [False, True])
def test_a_budget_ends_the_thinking(
    make_pair: Any, writes: Callable[[Pair, str], None], budget: int, special: str, begun: bool
) -> None:
    pair = make_pair(special=special)
    start = "" if begun else "<think>"
    writes(pair, start + WORDS * 3)
    arguments = {"begun": True} if begun else {}
    results = [
        streamed(pair, max_reasoning_tokens=budget, draft_length=k, template_arguments=arguments)[0] for k in LENGTHS
    ]
    assert len({result.tokens for result in results}) == 1
    thought = pair.text.encode_plain(start + WORDS * 3)[: len(pair.text.encode_plain(start)) + budget]
    begin = pair.text.decode(thought).removeprefix("<think>")
    assert all(result.reasoning == begin for result in results)
    written = pair.text.decode(results[0].tokens)
    assert written.startswith(("" if special == "<think>" else start) + begin + "\n")
    assert results[0].text and results[0].text in WORDS * 3


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 5}], ids=["greedy", "drawn"])
def test_a_budget_is_exact_under_speculation(make_pair: Any, options: dict[str, Any]) -> None:
    pair = make_pair()
    found = {
        (budget, k): pair.generate(
            [user("hi")],
            max_new_tokens=40,
            draft_length=k,
            max_reasoning_tokens=budget,
            template_arguments={"begun": True},
            **options,
        )
        for budget in (0, 1, 7, 30, None)
        for k in LENGTHS
    }
    for (budget, _), result in found.items():
        assert result.tokens == found[budget, 0].tokens and result.text == found[budget, 0].text
        assert (result.text != "") == (budget is not None)


def test_a_budget_that_is_not_reached_changes_nothing(make_pair: Any, writes: Callable[[Pair, str], None]) -> None:
    pair = make_pair()
    text = f"<think>\n{WORDS}\n</think>\n\n{WORDS}"
    writes(pair, text)
    result, _ = streamed(pair, max_reasoning_tokens=100)
    assert (result.reasoning, result.text) == (WORDS, WORDS)
    writes(pair, WORDS)  # no thinking at all
    assert streamed(pair, max_reasoning_tokens=0)[0].text == WORDS


@pytest.mark.parametrize("template", [QWEN_LIKE, MISTRAL_LIKE], ids=["hermes", "mistral"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3}], ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    "choice", ["required", "stop", {"type": "function", "function": {"name": "get_weather"}}], ids=str
)
def test_calls_that_must_be_made_always_parse(
    make_pair: Any, template: str, options: dict[str, Any], choice: Any
) -> None:
    """Of a model of random weights, which would never write a call."""
    pytest.importorskip("llguidance")
    special = "[TOOL_CALLS]" if template == MISTRAL_LIKE else "<|end|>"
    pair = make_pair(template, special)
    wanted = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "max_reasoning_tokens": 5}
    wanted |= options
    results = [streamed(pair, draft_length=k, **wanted)[0] for k in (0, 4, "auto")]
    assert len({(result.tokens, result.text, result.tool_calls) for result in results}) == 1
    result = results[0]
    assert result.text == "" and result.finish_reason == "tool_calls"
    (call,) = result.tool_calls
    schema = {"stop": {"type": "object", "maxProperties": 0}, "get_weather": {
        "type": "object", "required": ["city"], "additionalProperties": False,
        "properties": {"city": {"enum": ["Ulm", "Köln"]}, "days": {"type": ["integer", "null"]}},
    }}[call.name]  # fmt: skip
    jsonschema.validate(json.loads(call.arguments), schema)
    if choice != "required":
        assert call.name == (choice if isinstance(choice, str) else "get_weather")


@pytest.mark.parametrize("template", [QWEN_LIKE, MISTRAL_LIKE], ids=["hermes", "mistral"])
def test_of_calls_that_must_be_made_no_beginning_is_text(make_pair: Any, template: str) -> None:
    pytest.importorskip("llguidance")
    pair = make_pair(template, "[TOOL_CALLS]" if template == MISTRAL_LIKE else "<|end|>")
    for most in range(1, 80, 3):
        wanted = {"tools": [stop], "tool_choice": "required", "max_reasoning_tokens": 0, "max_new_tokens": most}
        result, _ = streamed(pair, temperature=1.5, seed=most, **wanted)
        assert result.text == "" and all(call.name == "stop" for call in result.tool_calls), most


def test_tools_and_choices_of_the_responses_api(make_pair: Any) -> None:
    pytest.importorskip("llguidance")
    pair = make_pair()
    flat = {"type": "function", "name": "stop", "description": "Ends it.", "parameters": {}, "strict": True}
    nested = {"type": "function", "function": {key: value for key, value in flat.items() if key != "type"}}
    named = {"type": "function", "function": {"name": "stop"}}
    expected, _ = streamed(pair, tools=[nested], tool_choice=named, max_reasoning_tokens=0)
    choice = {"type": "function", "name": "stop"}
    found, _ = streamed(pair, tools=[flat], tool_choice=choice, max_reasoning_tokens=0)
    assert (found.tokens, found.tool_calls) == (expected.tokens, expected.tool_calls) and found.tool_calls


FLAT, NESTED = {"type": "function", "name": "stop"}, {"type": "function", "function": {"name": "stop"}}


@pytest.mark.parametrize("tool", [FLAT, NESTED], ids=["flat", "nested"])
@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools(make_pair: Any, mode: str, tool: dict[str, Any]) -> None:
    pytest.importorskip("llguidance")
    pair = make_pair()
    allowed = {"mode": mode, "tools": [tool]}
    wanted = {"max_reasoning_tokens": 0}
    forms = ({"type": "allowed_tools", **allowed}, {"type": "allowed_tools", "allowed_tools": allowed})
    one, other = (streamed(pair, tools=TOOLS, tool_choice=form, **wanted)[0] for form in forms)
    assert (one.tokens, one.tool_calls) == (other.tokens, other.tool_calls)
    if mode == "auto":  # as if there were no other tools
        assert one.tokens == streamed(pair, tools=[stop], **wanted)[0].tokens
        assert one.stats.prompt_tokens == streamed(pair, tools=[stop], **wanted)[0].stats.prompt_tokens
    else:
        assert {call.name for call in one.tool_calls} == {"stop"}
        assert one.stats.prompt_tokens == streamed(pair, tools=TOOLS, **wanted)[0].stats.prompt_tokens


def test_a_mode_may_be_the_type_of_an_object(make_pair: Any) -> None:
    pytest.importorskip("llguidance")
    for mode in ("auto", "none", "required"):
        wanted = {"tools": TOOLS, "max_reasoning_tokens": 0}
        one, other = (streamed(make_pair(), tool_choice=form, **wanted)[0] for form in (mode, {"type": mode}))
        assert (one.tokens, one.tool_calls) == (other.tokens, other.tool_calls)


@pytest.mark.parametrize("begun", [False, True])
def test_a_call_that_must_be_made_comes_after_the_reasoning(make_pair: Any, begun: bool) -> None:
    pytest.importorskip("llguidance")
    pair = make_pair()
    results = [
        streamed(
            pair,
            tools=TOOLS,
            tool_choice="stop",
            draft_length=k,
            max_reasoning_tokens=5,
            template_arguments={"begun": True} if begun else {},
        )[0]
        for k in LENGTHS
    ]
    assert len({(result.tokens, result.reasoning, result.tool_calls) for result in results}) == 1
    assert [call.name for call in results[0].tool_calls] == ["stop"] and results[0].text == ""
    assert not begun or pair.text.decode(results[0].tokens).count("</think>") == 1


def test_a_grammar_is_for_the_answer(make_pair: Any) -> None:
    pytest.importorskip("llguidance")
    pair = make_pair()
    for k in LENGTHS:
        result, _ = streamed(
            pair, choice=["yes", "no"], max_reasoning_tokens=4, draft_length=k, template_arguments={"begun": True}
        )
        assert result.text in ("yes", "no") and pair.text.decode(result.tokens).endswith("</think>" + result.text)


def test_a_chat_with_calls_and_results(make_pair: Any, writes: Callable[[Pair, str], None]) -> None:
    pair = make_pair()
    with pair.chat() as chat:
        writes(pair, f"<think>\n{WORDS}\n</think>\n\n" + CALLS)
        result = chat.send("Weather?", tools=TOOLS, max_new_tokens=300)
        answer = chat.messages[-1]
        assert answer == {
            "role": "assistant",
            "content": "",
            "reasoning_content": WORDS,
            "tool_calls": [call.as_message() for call in result.tool_calls],
        }
        assert answer["tool_calls"][0]["function"] == {
            "name": "get_weather",
            "arguments": '{"city": "Köln", "days": 1.50}',
        }
        writes(pair, "Sunny.")
        results = [
            {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": "sun"} for call in result.tool_calls
        ]
        said = chat.send(results, tools=TOOLS, max_new_tokens=300)
        assert chat.messages[-4:] == [answer, *results, {"role": "assistant", "content": "Sunny."}]
        assert said.text == "Sunny." and said.finish_reason == "stop"
        writes(pair, "Yes.")
        chat.send({"role": "user", "content": "Really?"}, max_new_tokens=300)
        assert chat.messages[-2:] == [user("Really?"), {"role": "assistant", "content": "Yes."}]
        for wrong in ([], [5], 5, b"x"):
            with pytest.raises(BadInput, match=r"message"):
                chat.send(wrong)  # type: ignore[arg-type]


TOOL = {"type": "function", "function": {"name": "a", "parameters": {"type": "object"}}}


def allowed(mode: str, *names: object) -> dict[str, Any]:
    return {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": name} for name in names]}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"tools": "stop"}, "tools are a list"),
        ({"tools": TOOL}, "tools are a list"),
        ({"tools": [5]}, "a tool is a Python function or a JSON object"),
        ({"tools": [{"name": "a"}]}, "a tool is a Python function or a JSON object"),
        ({"tools": [TOOL, TOOL]}, "two tools have the name 'a'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "the name of a tool"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}, "parameters of the tool a"),
        ({"tools": [{"type": "function", "function": {"name": "a", "description": {1}}}]}, "the tool a is not JSON"),
        ({"tools": [TOOL], "tool_choice": "b"}, "tool_choice names 'b', which is not one of the tools: a"),
        ({"tools": [TOOL], "tool_choice": {"name": "a"}}, "tool_choice must be 'auto'"),
        ({"tools": [TOOL], "tool_choice": 5}, "tool_choice must be 'auto'"),
        ({"tools": [TOOL], "tool_choice": {"type": "any"}}, "tool_choice must be 'auto'"),
        ({"tools": [TOOL], "tool_choice": {"type": ["auto"]}}, "tool_choice must be 'auto'"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "the mode of allowed_tools"),
        ({"tools": [TOOL], "tool_choice": allowed("none", "a")}, "the mode of allowed_tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": 5}}, "the mode of allowed_tools"),
        ({"tools": [TOOL], "tool_choice": allowed("auto")}, "the tools of allowed_tools"),
        ({"tools": [TOOL], "tool_choice": allowed("auto", 5)}, "the tools of allowed_tools"),
        ({"tools": [TOOL], "tool_choice": allowed("required", "a", "b")}, "names 'b', which is not one of the tools"),
        ({"tool_choice": allowed("required", "a")}, "but there are no tools"),
        ({"tool_choice": "required"}, "but there are no tools"),
        ({"tools": [TOOL], "tool_choice": "required", "regex": "a"}, "regex and a tool_choice that makes calls"),
        ({"tools": [TOOL], "parallel_tool_calls": "no"}, "parallel_tool_calls must be"),
        ({"tools": [TOOL], "template_arguments": {"tools": [TOOL]}}, "tools are given twice"),
        ({"max_reasoning_tokens": -1}, "max_reasoning_tokens must be"),
        ({"max_reasoning_tokens": 1.5}, "max_reasoning_tokens must be"),
        ({"tols": [TOOL]}, "did you mean tools"),
    ],
    ids=repr,
)
def test_bad_options(make_pair: Any, options: dict[str, Any], problem: str) -> None:
    pair = make_pair()
    with pytest.raises(BadInput, match=problem) as caught:
        pair.stream([user("hi")], **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match=problem):
        pair.chat().stream("hi", **options)


@pytest.mark.parametrize("options", [{"tools": [stop]}, {"max_reasoning_tokens": 5}], ids=["tools", "budget"])
def test_plain_prompts_have_no_tools(make_pair: Any, options: dict[str, Any]) -> None:
    pair = make_pair()
    for prompt in ("hi", [1, 2]):
        with pytest.raises(BadInput, match="is for chats; give messages as the prompt, or chat=True"):
            pair.stream(prompt, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("template", "problem"),
    [(IGNORES_TOOLS, "chat template ignores tools"), (UNKNOWN_FORM, "a form that is not known")],
)
def test_models_without_tools(make_pair: Any, template: str, problem: str) -> None:
    pair = make_pair(template)
    for call in (pair.stream, pair.chat().stream):
        with pytest.raises(BadInput, match=problem):
            call([user("hi")], tools=[stop])
    assert pair.generate([user("hi")], tools=[stop], tool_choice="none", max_new_tokens=2).stats.new_tokens == 2
