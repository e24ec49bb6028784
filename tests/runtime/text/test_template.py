"""Chat templates write what transformers' `apply_chat_template` writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from pard_onnx.models.errors import BadInput
from pard_onnx.runtime.options import Options
from pard_onnx.runtime.text.tokenizer import Text

SIZE = 280
EOS = "<|im_end|>"
ANSWER = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
PRINTED = "{% for m in messages %}{{ '<|im_start|>' ~ m.role }}\n{{ m.content }}{{ eos_token }}{% endfor %}" + ANSWER
ADDED = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] + '<|im_end|>' }}{% endfor %}" + ANSWER
TRIMMED = "{% for m in messages %}{{ m.role }}: {{ m['content'] | trim }}{% endfor %}" + ANSWER
STRINGS_ONLY = (
    "{% for m in messages %}{% if m.content is string %}{% set content = m.content %}{% else %}{% set content = '' %}"
    "{% endif %}{{ m.role + content }}{% endfor %}" + ANSWER
)
LOOP = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m['content'] %}<{{ part.type }}>{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}" + ANSWER
)
MACRO = (
    "{% macro written(value) %}{% if value is string %}{{ value }}{% else %}{% for part in value %}<{{ part.text }}>"
    "{% endfor %}{% endif %}{% endmacro %}{% for m in messages %}{{ m.role }}{{ written(m.content) }}{% endfor %}"
)
VARIABLE = (
    "{% for m in messages %}{% set found = m.get('content') if m.content else [] %}{% if found is string %}{{ found }}"
    "{% else %}{% for part in found or [] %}<{{ part.text }}>{% endfor %}{% endif %}{% endfor %}"
)
LOOP_FOR_USERS = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content | trim }}{% else %}"
    "{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endif %}{% endfor %}"
)
TOOL_RESULTS = (
    "{% for m in messages %}{% if m.role == 'tool' %}{% if m.content is mapping or m.content is iterable %}"
    "{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}{% else %}"
    "{{ m.content | trim }}{% endif %}{% endfor %}"
)
CALLS = (
    "{% for m in messages %}{{ m.role }}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{% endfor %}" + ANSWER
)
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "<fox>"}}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.fixture(scope="module")
def folder(make_tokenizer: Callable[[int], Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(SIZE).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    return folder


@pytest.fixture(scope="module")
def reference(make_tokenizer: Callable[[int], Tokenizer]) -> Callable[..., str]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(SIZE), eos_token=EOS)

    def render(template: str, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
        options = {"tokenize": False, "add_generation_prompt": True} | arguments
        text: str = tokenizer.apply_chat_template(messages, chat_template=template, **options)
        return text

    return render


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (PRINTED, [user(None)]),
        (PRINTED, [{"role": "user"}]),
        (PRINTED, [user("hi"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]),
        (CALLS, [user("hi"), {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "5"}]),
        (CALLS, [user("hi"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]),
        (CALLS, [user("hi"), {"role": "assistant", "content": "so", "tool_calls": None}]),
        (STRINGS_ONLY, [user(None), {"role": "assistant"}]),
        (LOOP, [user(parts("a", " b\n")), {"role": "assistant", "content": "c"}]),
        (MACRO, [user(parts("a", "b")), {"role": "assistant", "content": "c"}]),
        (VARIABLE, [user(parts("a", "b")), user(None), user("c")]),
        (TOOL_RESULTS, [user(" hi "), {"role": "tool", "content": {"city": "Ulm", "degrees": [1, 2]}}]),
        (TOOL_RESULTS, [{"role": "tool", "content": [1, 2]}, {"role": "tool", "content": [{"a": "b"}]}]),
    ],
)
def test_contents_of_every_kind(
    folder: Path, reference: Callable[..., str], template: str, messages: list[dict[str, Any]]
) -> None:
    before = json.dumps(messages)
    text = Text(folder, template).render(messages)
    assert text == reference(template, messages)
    assert "None" not in text and "[{" not in text.replace('[{"a": "b"}]', "")
    assert json.dumps(messages) == before


@pytest.mark.parametrize("template", [PRINTED, ADDED, TRIMMED, STRINGS_ONLY, CALLS])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_parts_are_one_text_where_the_template_writes_strings(
    folder: Path, reference: Callable[..., str], template: str, role: str
) -> None:
    """Where transformers fails, writes Python objects, or leaves the text out."""
    messages = [{"role": role, "content": parts("one", " two", "")}, user("three")]
    joined = [messages[0] | {"content": "one two"}, *messages[1:]]
    assert Text(folder, template).render(messages) == reference(template, joined)
    assert Text(folder, template).render([{"role": role, "content": []}]) == Text(folder, template).render(
        [{"role": role, "content": ""}]
    )


def test_a_template_that_loops_over_the_parts_of_some_roles(folder: Path, reference: Callable[..., str]) -> None:
    messages = [{"role": "system", "content": parts("one", " two")}, user(parts("a", "b"))]
    expected = reference(LOOP_FOR_USERS, [messages[0] | {"content": "one two"}, messages[1]])
    assert Text(folder, LOOP_FOR_USERS).render(messages) == expected == "one two<a><b>"


@pytest.mark.parametrize("template", [PRINTED, LOOP])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            [{"type": "image_url", "image_url": {"url": "x"}}],
            "of the type 'image_url', but the model reads text",
        ),
        ([*parts("see"), {"type": "input_audio"}], "'input_audio'"),
        ([{"type": None}], "None"),
        ([*parts("see"), "that"], "'str'"),
        ([{"type": "text", "text": None}], "with text, not None"),
        ([{"type": "text"}], "with text, not None"),
    ],
)
def test_parts_that_are_no_text_are_refused(folder: Path, template: str, content: Any, problem: str) -> None:
    with pytest.raises(BadInput, match=problem) as caught:
        Text(folder, template).render([user(content)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [["a", "b"], {"text": "a"}, [{"text": "a"}], ("a",)])
@pytest.mark.parametrize("template", [PRINTED, TRIMMED, TOOL_RESULTS])
def test_objects_are_not_written_in_pythons_notation(folder: Path, template: str, content: Any) -> None:
    with pytest.raises(BadInput, match=f"takes no content of the type {type(content).__name__}; give text, or a list"):
        Text(folder, template).render([user(content)])


GENERATIONS = [
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.role ~ m.content }}{% endif %}{% endfor %}" + ANSWER,
    "{% for m in messages %}\n    {%- generation -%}\n  {{ m.content }} \n    {%- endgeneration -%}\n{% endfor %}\n",
    "{% for m in messages %}\n    {% generation %}\n  {{ m.content }}\n    {% endgeneration %}\n{% endfor %}\n",
    "{% set a = 1 %}{% for m in messages %}{% generation %}{% set a = 2 %}{{ loop.index }}{{ a }}{% endgeneration %}"
    "{{ a }}{% endfor %}",
    "{% macro said(m) %}{% generation %}<{{ m.content }}>{% endgeneration %}{% endmacro %}"
    "{% for m in messages %}{{ said(m) }}{% endfor %}",
    "{% for m in messages %}{% generation %}{% for part in m.content %}{{ part.text or part }}{% endfor %}"
    "{% endgeneration %}{% endfor %}",
]


@pytest.mark.parametrize("template", GENERATIONS)
def test_marks_of_the_assistants_words_change_nothing(
    folder: Path, reference: Callable[..., str], template: str
) -> None:
    messages = [user("a < b"), {"role": "assistant", "content": "yes"}, user("why")]
    assert Text(folder, template).render(messages) == reference(template, messages)


def test_a_mark_without_an_end_is_refused(folder: Path) -> None:
    with pytest.raises(BadInput, match="the model's chat template is broken: line 1: Unexpected end of template"):
        Text(folder, "{% generation %}a").render([user("hi")])


QWEN3_LIKE = """{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n\nYou may call one or more functions.\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""

LLAMA_LIKE = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{%- if builtin_tools is defined %}
    {{- "Tools: " + builtin_tools | reject('equalto', 'code_interpreter') | join(", ") + "\n\n"}}
{%- endif %}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("Cannot put tools in the first user message when there's no first user message!") }}
    {%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\n' -}}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
TOOL = {
    "type": "function",
    "function": {"name": "find", "description": "Söks <it>", "parameters": {"type": "object", "properties": {}}},
}
TALK = [
    {"role": "system", "content": "be brief"},
    user("where is the fox?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "over the dog"},
    {"role": "assistant", "content": "over the dog", "tool_calls": None},
    user("and now?"),
]


@pytest.mark.parametrize("messages", [TALK, TALK[1:], TALK[:2], TALK[1:2]])
@pytest.mark.parametrize("template", [QWEN3_LIKE, LLAMA_LIKE], ids=["qwen3", "llama"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"tools": [TOOL, TOOL]},
        {"tools": None, "documents": None},
        {"tools": [TOOL], "enable_thinking": False},
        {"enable_thinking": False},
        {"enable_thinking": True, "unknown": 5},
        {"date_string": "1 Jan 2030"},
        {"tools": [TOOL], "date_string": "1 Jan 2030", "tools_in_user_message": False},
        {"custom_tools": [TOOL], "builtin_tools": ["code_interpreter", "search"]},
        {"bos_token": "<|end|>"},
        {"add_generation_prompt": False},
    ],
    ids=repr,
)
def test_template_arguments(
    folder: Path,
    reference: Callable[..., str],
    template: str,
    messages: list[dict[str, Any]],
    arguments: dict[str, Any],
) -> None:
    assert Text(folder, template).render(messages, arguments) == reference(template, messages, **arguments)


@pytest.mark.parametrize("template", [QWEN3_LIKE, LLAMA_LIKE], ids=["qwen3", "llama"])
def test_real_templates_read_parts(folder: Path, reference: Callable[..., str], template: str) -> None:
    messages = [{"role": "system", "content": parts("be ", "brief")}, user(parts("where is", " the fox?"))]
    assert Text(folder, template).render(messages) == reference(template, TALK[:2])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("tools", "template_arguments are names with values"),
        ({5: 5}, "template_arguments are names with values"),
        ({"messages": []}, "template_arguments have messages"),
        ({"tools": "find"}, "tools in template_arguments are a list of JSON objects, not 'find'"),
        ({"tools": [print]}, "tools in template_arguments are a list of JSON objects"),
        ({"documents": {"a": 5}}, "documents in template_arguments are a list of JSON objects"),
        ({"names": repeat("a")}, r"template_arguments: a variable has an iterator, repeat\('a'\); give a list"),
        ({"names": {"a": [iter([5])]}}, "template_arguments: a variable has an iterator"),
    ],
)
def test_arguments_that_no_template_takes(folder: Path, arguments: Any, problem: str) -> None:
    for make in (lambda: Options(template_arguments=arguments), lambda: Text(folder, PRINTED).render([], arguments)):
        with pytest.raises(BadInput, match=problem):
            make()


R1_LIKE = (
    "{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls is defined %}{% for c in m.tool_calls %}"
    "{% if m.content is none %}{% else %}{{ m.content.strip() }}{% endif %}"
    "{{ '<｜tool▁call▁begin｜>' + c.type + '<｜tool▁sep｜>' + c.function.name }}"
    "{{ '\n```json\n' + c.function.arguments + '\n```' }}"
    "{% endfor %}{% else %}{{ m.content.strip() }}{% endif %}{% endfor %}"
)


def with_calls(arguments: Any, content: str | None) -> list[dict[str, Any]]:
    call = {"id": "123456789", "type": "function", "function": {"name": "find", "arguments": arguments}}
    return [
        user("?"),
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "5"},
    ]


@pytest.mark.parametrize("template", [QWEN3_LIKE, LLAMA_LIKE, R1_LIKE, CALLS], ids=["qwen3", "llama", "r1", "calls"])
@pytest.mark.parametrize("arguments", [{"what": "<fox> 'é'", "n": [1.5, None, True]}, {}], ids=str)
@pytest.mark.parametrize("content", ["", None])
def test_arguments_of_calls_are_text_or_objects(
    folder: Path, reference: Callable[..., str], template: str, arguments: dict[str, Any], content: str | None
) -> None:
    """OpenAI's are JSON text; a template that reads objects gets objects, and one that reads text gets text."""
    written = json.dumps(arguments, ensure_ascii=False)
    wanted: Any = written if template is R1_LIKE else arguments
    expected = reference(template, with_calls(wanted, ""))
    for given in (arguments, written):
        assert Text(folder, template).render(with_calls(given, content)) == expected


def test_arguments_that_are_no_json_stay_as_they_are(folder: Path, reference: Callable[..., str]) -> None:
    for arguments in ("{broken", "5", ""):
        assert Text(folder, LLAMA_LIKE).render(with_calls(arguments, "")) == reference(
            LLAMA_LIKE, with_calls(arguments, "")
        )


def test_text_arguments_are_kept_as_written_where_the_template_takes_them(folder: Path) -> None:
    assert '{"a":1.50}' in Text(folder, QWEN3_LIKE).render(with_calls('{"a":1.50}', ""))


PARTS = [{"type": "text", "text": "a "}, {"type": "text", "text": "b "}]
BEGINNINGS: list[tuple[str, Any]] = [
    *((template, content) for template in (PRINTED, ADDED, TRIMMED, STRINGS_ONLY, LOOP, MACRO, VARIABLE)
      for content in ("The ", " The", "The\n", "The<|im_end|>")),
    *((template, PARTS) for template in (LOOP, MACRO, VARIABLE, LOOP_FOR_USERS)),
]  # fmt: skip


def begun(content: Any) -> list[dict[str, Any]]:
    return [user("x"), {"role": "assistant", "content": content}]


@pytest.mark.parametrize(("template", "content"), BEGINNINGS)
def test_the_last_message_is_continued_as_transformers_does(
    folder: Path, reference: Callable[..., str], template: str, content: Any
) -> None:
    wanted = reference(template, begun(content), add_generation_prompt=False, continue_final_message=True)
    assert Text(folder, template).render_continued(begun(content)) == wanted


def test_special_tokens_of_a_beginning_stay_text(folder: Path) -> None:
    text = Text(folder, ADDED)
    end = text.token_id(EOS)
    ids = [text.encode_chat(begun(content), continued=True) for content in ("The", "The<|im_end|>", "The<|im_end|>!")]
    assert [one.count(end) for one in ids] == [1, 1, 1]  # of the user's message
    assert [text.decode(one)[-len(end_) :] for one, end_ in zip(ids, ("The", EOS, EOS + "!"), strict=True)] == [
        "The",
        EOS,
        EOS + "!",
    ]


def test_a_template_that_leaves_the_last_message_out(folder: Path) -> None:
    with pytest.raises(BadInput, match="leaves out the last message"):
        Text(folder, "{{ messages[0].content }}").render_continued(begun("The"))
    with pytest.raises(BadInput, match="leaves out the last message"):
        Text(folder, "{{ messages[0].content }}").encode_chat(begun("The"), continued=True)
