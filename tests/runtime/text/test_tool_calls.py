"""Calls of tools in a reply's text: every form, any chunking of it, and what only looks like a call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pard_onnx.runtime.text.tool_calls import ToolCall, ToolCallDelta
from pard_onnx.runtime.text.tool_formats import TOOL_FORMATS, ToolFormat, tool_format

FORMS = {form.name: form for form in TOOL_FORMATS}
OFFERED: dict[str, Sequence[str]] = {"get_weather": ("city", "days"), "find": (), "python": ("code",)}
Calls = list[tuple[str, str]]


def read(
    form: ToolFormat, pieces: Sequence[str], *, guided: bool = False, tags: dict[str, str] | None = None
) -> tuple[str, Calls, list[ToolCallDelta]]:
    reader = form.reader(OFFERED, lambda index: f"id{index}", guided=guided, tags=tags)
    found = [reader.push(piece) for piece in pieces] + [reader.finish()]
    deltas = [delta for one in found for delta in one.calls]
    assert joined(deltas) == reader.calls
    assert [call.id for call in reader.calls] == [f"id{index}" for index in range(len(reader.calls))]
    return "".join(one.text for one in found), [(call.name, call.arguments) for call in reader.calls], deltas


def joined(deltas: Sequence[ToolCallDelta]) -> list[ToolCall]:
    """The calls, put together as clients of OpenAI's streams do."""
    calls: list[ToolCall] = []
    for delta in deltas:
        if delta.index == len(calls):
            assert delta.id and delta.name
            calls.append(ToolCall(delta.id, delta.name, delta.arguments))
        else:
            assert delta.index == len(calls) - 1 and delta.id is delta.name is None and delta.arguments
            last = calls[-1]
            calls[-1] = ToolCall(last.id, last.name, last.arguments + delta.arguments)
    return calls


# As model cards, templates and the parsers of serving engines have them
EXAMPLES: list[tuple[str, str, str, Calls]] = [
    (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "San Francisco, CA, USA"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "find", "arguments": {"what": "Köln \\u00e9", "n": 1.50e2}}\n</tool_call>',
        "",
        [("get_weather", '{"city": "San Francisco, CA, USA"}'), ("find", '{"what": "Köln \\u00e9", "n": 1.50e2}')],
    ),
    ("hermes", 'I look.\n\n<tool_call>{"arguments":{},"name":"x"}</tool_call>', "I look.", [("x", "{}")]),
    ("hermes", '<tool_call>\n{"name": "find"}\n</tool_call>\n\nDone.\n', "Done.\n", [("find", "{}")]),
    ("hermes", 'A\n<tool_call>{"name": "find"}</tool_call>\nB', "A\nB", [("find", "{}")]),
    ("hermes", '<tool_call>\n{"name": "find", "arguments": {"a": 1}}\n', "", [("find", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "find", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("find", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "find", "arguments": null}</tool_call>', "", [("find", "{}")]),
    (
        "hermes",
        '<tool_call>[{"name": "a", "arguments": {}}, {"name": "b"}]</tool_call>',
        "",
        [("a", "{}"), ("b", "{}")],
    ),
    (
        "hermes",
        '<tool_call>{"name": "find", "arguments": {"a": "</tool_call> \\" <tool_call>"}}</tool_call>',
        "",
        [("find", '{"a": "</tool_call> \\" <tool_call>"}')],
    ),
    ("llama", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [("get_weather", '{"city": "Paris"}')]),
    (
        "llama",
        '\n{"name": "find", "parameters": {}}; {"type": "function", "name": "find", "arguments": {"a": [1]}}',
        "",
        [("find", "{}"), ("find", '{"a": [1]}')],
    ),
    ("llama", '<|python_tag|>{"name": "brave", "parameters": {"q": "x"}}', "", [("brave", '{"q": "x"}')]),
    ("llama", '<|python_tag|>brave_search.call(query="a \\"b\\"")', "", [("brave_search", '{"query": "a \\"b\\""}')]),
    (
        "llama",
        "<|python_tag|>import math\nprint(math.pi)",
        "",
        [("python", '{"code": "import math\\nprint(math.pi)"}')],
    ),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "VvvODy9mT"}, {"name": "b"}]',
        "",
        [("get_weather", '{"city": "Paris"}'), ("b", "{}")],
    ),
    (
        "mistral-args",
        'So:[TOOL_CALLS]get_weather[CALL_ID]VvvODy9mT[ARGS]{"city": "Paris"}[TOOL_CALLS]find[ARGS]{"a": {"b": []}}',
        "So:",
        [("get_weather", '{"city": "Paris"}'), ("find", '{"a": {"b": []}}')],
    ),
    ("mistral-args", '[TOOL_CALLS]find{"a": 1}', "", [("find", '{"a": 1}')]),
    ("smollm3", '<tool_call>{"name": "find", "arguments": {"a": 1}}</tool_call>', "", [("find", '{"a": 1}')]),
    (
        "smollm3",
        "<code>\nw = get_weather('Ulm', days=1_0)\n"
        'print(find(a=[1.0, -2, (None, True)], b={\'c\': """d\n\'e"""}))\n</code>',
        "",
        [
            ("get_weather", '{"city": "Ulm", "days": 10}'),
            ("find", '{"a": [1.0, -2, [null, true]], "b": {"c": "d\\n\'e"}}'),
        ],
    ),
    (
        "tool-code",
        'Sure.\n```tool_code\nget_weather(city="Ulm", days=3)\n```',
        "Sure.",
        [("get_weather", '{"city": "Ulm", "days": 3}')],
    ),
    (
        "pythonic",
        '[get_weather(city="San Francisco", days=2), find()]',
        "",
        [("get_weather", '{"city": "San Francisco", "days": 2}'), ("find", "{}")],
    ),
    (
        "deepseek-r1",
        "Look:<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Tokyo"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>find\n```json\n{}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Look:",
        [("get_weather", '{"city": "Tokyo"}'), ("find", "{}")],
    ),
]


@pytest.mark.parametrize(("name", "text", "rest", "calls"), EXAMPLES)
def test_published_examples(name: str, text: str, rest: str, calls: Calls) -> None:
    for pieces in ([text], list(text)):
        assert read(FORMS[name], pieces)[:2] == (rest, calls)
    assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)


def test_every_form_has_an_example() -> None:
    assert {name for name, *_ in EXAMPLES} == FORMS.keys()


@pytest.mark.parametrize("form", TOOL_FORMATS, ids=lambda form: form.name)
@settings(max_examples=80)
@given(data=st.data())
def test_any_chunking_finds_the_same(form: ToolFormat, data: st.DataObject) -> None:
    """Of texts that are made of pieces of calls, with or without special tokens."""
    marks = {tag: chr(0xDC00 + number) for number, tag in enumerate(form.tags)}
    tags = marks if data.draw(st.booleans()) else {}
    whole = [text for name, text, *_ in EXAMPLES if name == form.name]
    parts = [*form.tags, *form.begins, *form.firsts, *"{}[]\":,.()='\\\n", " ", "find", "get_weather", '"name": "find"']
    parts += ['"arguments": {', '"parameters": {}', "function", "é", "print(", "True", "12", '{"name": "find", ', "**{"]
    cut = st.sampled_from(whole).flatmap(
        lambda text: st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).map(
            lambda ends: text[min(ends) : max(ends)]
        )
    )
    text = "".join(data.draw(st.lists(st.one_of(st.sampled_from(parts), st.sampled_from(whole), cut), max_size=12)))
    for tag, mark in tags.items():
        text = text.replace(tag, mark)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    expected = read(form, [text], tags=tags)
    assert read(form, pieces, tags=tags) == expected
    assert read(form, list(text), tags=tags) == expected
    shown, calls, _ = expected
    assert not any(0xD800 <= ord(character) < 0xE000 for character in shown)
    assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)
    if not calls:
        assert shown == "".join(character for character in text if not 0xD800 <= ord(character) < 0xE000)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)


@settings(max_examples=150)
@given(
    arguments=st.dictionaries(st.text(max_size=5), JSON, max_size=4),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 2]),
)
def test_arguments_are_kept_as_written(arguments: dict[str, Any], ascii_only: bool, indent: int | None) -> None:
    written = json.dumps(arguments, ensure_ascii=ascii_only, indent=indent)
    if not ascii_only:
        written.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    for name in ("hermes", "llama", "mistral", "mistral-args", "smollm3", "deepseek-r1"):
        form, call = FORMS[name].written, ""
        call = form.begin + form.before + "find" + form.between + written + form.after + form.end
        text, calls, _ = read(FORMS[name], [call[:7], call[7:30], call[30:]])
        assert (text, calls) == ("", [("find", written)])


PYTHON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=5), inner, max_size=3),
    ),
    max_leaves=8,
)


@settings(max_examples=150)
@given(city=PYTHON, days=PYTHON)
def test_python_literals_become_json(city: Any, days: Any) -> None:
    for name, text in (
        ("pythonic", f"[get_weather(city={city!r}, days={days!r})]"),
        ("tool-code", f"```tool_code\nget_weather({city!r}, days={days!r})\n```"),
        ("smollm3", f"<code>get_weather({city!r}, {days!r},)</code>"),
        ("llama", f"<|python_tag|>get_weather.call(city={city!r}, days={days!r})"),
    ):
        rest, calls, _ = read(FORMS[name], list(text))
        assert rest == "" and [call for call, _ in calls] == ["get_weather"], text
        assert json.loads(calls[0][1]) == json.loads(json.dumps({"city": city, "days": days}))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "find", "arguments": {"a": 1}</tool_call>'),
        ("hermes", '<tool_call>{"name": "find", "arguments": {"a": 1,}}</tool_call>'),
        ("hermes", "<tool_call>{'name': 'find'}</tool_call>"),
        ("hermes", '<tool_call>{"name": "find", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "find", "arguments": "text"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "find", "arguments": {"a": NaN}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "find", "arguments": {"a": 01}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "find", "arguments": {"a": "line\nend"}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "two words", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "find", "arguments": {"a": "cut sh'),
        ("hermes", "<tool_call>" + '{"a":' * 5000),
        ("hermes", "<tool_call></tool_call>"),
        ("hermes", "a <tool_call> tag, and < others"),
        ("llama", '{"name": "unknown", "parameters": {}}'),
        ("llama", '{"name": "find"}'),
        ("llama", '{"answer": 5}'),
        ("llama", "{not json"),
        ("llama", 'Text, then {"name": "find", "parameters": {}}'),
        ("mistral", "[TOOL_CALLS]"),
        ("mistral", '[TOOL_CALLS][{"name": 5}]'),
        ("mistral-args", "[TOOL_CALLS]find[ARGS][1]"),
        ("pythonic", "[1, 2]"),
        ("pythonic", "[unknown(a=1)]"),
        ("pythonic", "[find(a=b)]"),
        ("pythonic", "[find(a=1, a=2)]"),
        ("pythonic", "[find(1)]"),
        ("pythonic", "[find(a=" + "[" * 5000),
        ("pythonic", "[get_weather(1, city=2)]"),
        ("pythonic", "[find(a='\\ud800')]"),
        ("pythonic", "[find(a=__import__('os'))]"),
        ("pythonic", "[find(a=1e999999)]x"[:0] + "[find(a=0x)]"),
        ("smollm3", "<code>import os</code>"),
        ("smollm3", "<code></code>"),
        ("tool-code", "```tool_code\nfind()"),
        ("deepseek-r1", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>class<｜tool▁sep｜>find\n```json\n{}\n```"),
    ],
)
def test_what_is_no_call_stays_text(name: str, text: str) -> None:
    assert read(FORMS[name], [text])[:2] == (text, [])
    assert read(FORMS[name], list(text))[:2] == (text, [])


def test_a_beginning_is_held_back_and_released_at_once() -> None:
    reader = FORMS["hermes"].reader(OFFERED, str)
    assert [reader.push(piece).text for piece in ("a <tool", "_call", "ed> b", "<", "x")] == [
        "a",
        "",
        " <tool_called> b",
        "",
        "<x",
    ]
    reader = FORMS["llama"].reader(OFFERED, str)
    found = [reader.push(piece).text for piece in (" ", "{", '"', "a", '"', ": ", "b", " c")]
    assert found == [*[""] * 6, ' {"a": b', " c"]


def test_guided_calls_are_given_as_they_come() -> None:
    pieces = ['<tool_call>\n{"name": "find", "argu', 'ments": {"a"', ': "b', 'c"}', "}\n</tool_", "call>"]
    _, calls, deltas = read(FORMS["hermes"], pieces, guided=True)
    assert calls == [("find", '{"a": "bc"}')]
    assert [delta.arguments for delta in deltas] == ["", '{"a"', ': "b', 'c"}']
    assert read(FORMS["hermes"], pieces[:3], guided=True)[1] == [("find", '{"a": "b')]
    assert read(FORMS["hermes"], ["".join(pieces[:3])], guided=True)[1] == [("find", '{"a": "b')]
    assert read(FORMS["hermes"], pieces[:1], guided=True)[:2] == (pieces[0], [])


@settings(max_examples=60)
@given(cuts=st.sets(st.integers(0, 200), max_size=10), stop=st.integers(0, 200))
@pytest.mark.parametrize("name", ["hermes", "llama", "mistral", "mistral-args", "deepseek-r1"])
def test_guided_calls_that_are_cut_short(name: str, cuts: set[int], stop: int) -> None:
    form = FORMS[name].written
    one = form.before + "find" + form.between + '{"a": "\\u00e9x", "b": [1.50, {}]}' + form.after
    text = (form.begin + (one if form.separator is None else one + form.separator + one) + form.end)[:stop]
    ends = sorted(cut for cut in cuts if cut < len(text))
    pieces = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    assert read(FORMS[name], pieces, guided=True)[:2] == read(FORMS[name], [text], guided=True)[:2]


TEMPLATES = {
    "hermes": '{{- \'<tool_call>\\n{"name": "\' }}',
    "llama": "{{- '\"parameters\": ' }}",
    "mistral": "{{ '[TOOL_CALLS] [' }}",
    "mistral-args": "{{ '[TOOL_CALLS]' + name + '[ARGS]' }}",
    "smollm3": "{% if xml_tools or python_tools %}<tool_call>{% endif %}",
    "tool-code": "use ```tool_code",
    "pythonic": "[func_name1(params_name1=params_value1)]",
    "deepseek-r1": "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + '```json'",
}


@pytest.mark.parametrize("name", FORMS)
def test_the_form_is_found_in_the_template(name: str) -> None:
    found = tool_format(TEMPLATES[name])
    assert found is not None and found.name == name


def test_forms_that_are_not_known() -> None:
    assert tool_format("{{ messages }}") is None
    assert tool_format("<tool_call>\n<function=example>") is None


def test_long_arguments_take_linear_time() -> None:
    """Each character is read about once: 200,000 of them, one at a time."""
    reader = FORMS["hermes"].reader(OFFERED, str)
    reader.push('<tool_call>{"name": "find", "arguments": {"a": "')
    for _ in range(20_000):
        assert not reader.push("0123456789").text
    reader.push('"}}</tool_call>')
    assert len(reader.calls[0].arguments) == 200_000 + len('{"a": ""}')
