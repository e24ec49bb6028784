"""Chat templates write what transformers' `apply_chat_template` writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from pard_onnx.models.errors import BadInput
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
    with pytest.raises(BadInput, match="the chat template refuses these messages: Unexpected end of template"):
        Text(folder, "{% generation %}a").render([user("hi")])
