"""Chat templates that cannot be compiled are told when a model is exported, and no template keeps an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import edit_json

from pard_onnx.export_command import main
from pard_onnx.models.chat_template import LONGEST, environment, template_problem
from pard_onnx.models.manifest import Manifest

BROKEN = [
    ("{{ messages", "line 1: unexpected end of template"),
    ("a\n\n{% if %}", "line 3: Expected an expression"),
    ("{% for m in messages %}\n{{ m.role }}", "line 2: Unexpected end of template"),
    ("\n{{ messages|shout }}", "line 2: No filter named 'shout'"),
    ("{{ messages is loud }}", "line 1: No test named 'loud'"),
    ("{% generation %}", "line 1: Unexpected end of template"),
    ("{% unknown %}", "line 1: Encountered unknown tag 'unknown'"),
    ("{% for i in x %}" * 200 + "{% endfor %}" * 200, "too deeply nested"),
    ("{{" + "(" * 50_000 + "}}", "too deeply nested"),
    ("x" * (LONGEST + 1), f"it has {LONGEST + 1} characters"),
]


@pytest.mark.parametrize(("template", "problem"), BROKEN)
def test_what_is_broken_is_said_with_its_line(template: str, problem: str) -> None:
    found = template_problem(template)
    assert found and problem.lower() in found.lower() and "\n" not in found


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 11 }}",
        "{{ 'a'|center(10 ** 11) }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{{ [1] * 10 ** 10 }}",
        "{% for i in range(10 ** 12) %}{% endfor %}",
        "{% set x = 'a' * 10 ** 11 %}",
        "{{ (range(10 ** 12)|list)[0] }}",
    ],
)
def test_nothing_is_evaluated_while_a_template_is_compiled(template: str) -> None:
    """It would take all memory, or years."""
    assert template_problem(template) is None


def test_constants_are_rendered_as_ever() -> None:
    text = "{{ 1 + 2 }}{{ 'a' ~ 'b' }}{{ 'x'|upper }}{{ ['a', 'b']|join('-') }}{{ none }}{{ {'a': 1} }}{{ '<>&' }}"
    assert environment().from_string(text).render() == "3abXa-bNone{'a': 1}<>&"


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_an_export_says_so_and_goes_on(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    folder = tiny(tmp_path / "model")
    if where == "chat_template.jinja":
        (folder / where).write_text("{{ a }}\n{% if %}", encoding="utf-8")
    else:
        edit_json(folder / where, chat_template="{{ a }}\n{% if %}")
    output = tmp_path / "out"
    arguments = ["--model", str(folder), "--precision", "fp32", "--no-verify", "--output", str(output)]
    assert main(arguments) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert f"{folder / where}: the chat template is broken: line 2: " in warnings[0]
    assert Manifest.read(output).spec.chat_template == "{{ a }}\n{% if %}"
