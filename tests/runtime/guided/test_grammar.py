"""Grammars as users give them: forms that are accepted, and one line for those that are not."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from time import perf_counter
from typing import Any

import pytest

from pard_onnx.models.errors import BadInput
from pard_onnx.runtime.guided import matcher as guided
from pard_onnx.runtime.guided.grammar import MOST_CHARACTERS, Grammar
from pard_onnx.runtime.guided.matcher import Grammars
from pard_onnx.runtime.options import Options

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


class Model:
    """As pydantic's classes."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return SCHEMA


@pytest.mark.parametrize(
    "value",
    [
        {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
        {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
        {"type": "json_schema", "schema": SCHEMA},
        {"type": "json_object", "schema": SCHEMA},
        SCHEMA,
        Model,
        Grammar.json_schema(SCHEMA),
    ],
    ids=str,
)
def test_forms_of_a_schema(value: Any) -> None:
    options = Options(grammar=value) if isinstance(value, Grammar) else Options(response_format=value)
    assert options.guide == Grammar.json_schema(SCHEMA)
    assert replace(options, max_new_tokens=3).guide == options.guide
    assert hash(options) == hash(Options(response_format=SCHEMA))
    assert pickle.loads(pickle.dumps(options)) == options


def test_free_text_and_any_object() -> None:
    assert Options().guide is None
    assert Options(response_format={"type": "text"}).guide is None
    assert Options(response_format={"type": "json_object"}).guide == Grammar.json_object()
    assert Options(response_format={}).guide == Grammar.json_schema(True)


def test_a_schema_that_changes_later_changes_nothing() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    options = Options(response_format=schema)
    schema["properties"] = {}
    assert options.guide == Grammar.json_schema(SCHEMA)


ENDLESS: dict[str, Any] = {}
ENDLESS["items"] = ENDLESS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "a", "choice": ["a"]}, "regex and choice cannot both hold; give one of them"),
        ({"response_format": {"type": "json_object"}, "grammar": "start: /a/"}, "response_format and grammar cannot"),
        ({"response_format": 3}, "response_format must be a mapping .*, not 3"),
        ({"response_format": "json"}, "response_format must be a mapping .*, not 'json'"),
        ({"response_format": int}, "response_format must be a mapping"),
        ({"response_format": {"type": "json"}}, "unknown type 'json'; did you mean json_object|known are"),
        ({"response_format": {"type": "json_shema"}}, "unknown type 'json_shema'; did you mean json_schema?"),
        ({"response_format": {"type": "xml"}}, "unknown type 'xml'; known are text, json_object, json_schema and"),
        ({"response_format": {"type": "json_schema"}}, "response_format has no schema; give"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format has no schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}}, r"must be a mapping, not \[\]"),
        ({"response_format": {"const": float("nan")}}, "the JSON schema cannot be written as JSON"),
        ({"response_format": {"const": object()}}, "the JSON schema cannot be written as JSON"),
        ({"response_format": ENDLESS}, "the JSON schema cannot be written as JSON"),
        ({"response_format": {"x": "x" * MOST_CHARACTERS}}, "response_format has 10.* characters; at most 1000000"),
        ({"regex": ""}, "regex must be a regular expression, not ''"),
        ({"regex": 5}, "regex must be a regular expression, not 5"),
        ({"regex": "\ud800"}, "regex is not valid Unicode"),
        ({"regex": "a" * 200_000}, "regex has 200000 characters; at most 100000"),
        ({"choice": []}, "choice has no text; give at least one"),
        ({"choice": "yes"}, "choice must be a list of texts, not 'yes'"),
        ({"choice": ["a", 1]}, "choice: each choice must be text of at least one character, not 1"),
        ({"choice": [""]}, "choice: each choice must be text of at least one character, not ''"),
        ({"grammar": " "}, "grammar must be the text of a Lark grammar, not ' '"),
        ({"grammar": b"start"}, "grammar must be the text of a Lark grammar"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_grammar(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        Options(**options)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def grammars(make_tokenizer: Any) -> Grammars:
    return Grammars(make_tokenizer(264).to_str, "a model", 264, [263])


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"not": {"type": "string"}}, 'the keyword "not" is not supported; leave it out'),
        ({"if": {}, "then": {}}, '"if", "then"'),
        ({"type": "array", "uniqueItems": True}, '"uniqueItems"'),
        ({"type": "array", "contains": {"type": "string"}}, '"contains"'),
        ({"properties": {"a": {"items": {"unevaluatedProperties": False}}}}, '"unevaluatedProperties"'),
        ({"type": "strin"}, '"type": strin is no type of JSON'),
        (
            {"type": "integer", "minimum": 5, "maximum": 3},
            r"no text satisfies it: minimum \(5\) is greater than maximum",
        ),
        ({"type": "string", "minLength": 5, "maxLength": 2}, r"no text satisfies it: minLength \(5\)"),
        ({"enum": []}, '"enum"'),
        ({"enum": [1], "type": "string"}, 'no text satisfies it: "type" excludes'),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "required property 'a'"),
        ({"oneOf": [{"type": "object"}, {"type": "object"}]}, 'write "anyOf"'),
        ({"$ref": "#/$defs/no"}, r'"\$ref": #/\$defs/no does not exist'),
        ({"$ref": "https://example.org/s"}, r'"\$ref": https://example.org/s is not part of the schema'),
        ({"type": "string", "pattern": "(?=a)b"}, r'"pattern" or .*: \(\?=a\)b is no regular expression .*look-around'),
        ({"type": "string", "pattern": "a("}, r'"pattern" or .*: a\( is no regular expression .*unclosed group'),
        ({"type": "string", "format": "odd"}, '"format": odd is not known'),
        ({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, "no text satisfies it"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_schemas_that_cannot_be_followed_name_the_keyword(grammars: Grammars, schema: Any, message: str) -> None:
    with pytest.raises(BadInput, match="^response_format cannot be followed: .*" + message) as caught:
        grammars.compiled(Grammar.json_schema(schema))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}, "required": ["next"]}
PAIR = {"type": "array", "prefixItems": [{"$ref": "#/$defs/n"}], "items": {"$ref": "#/$defs/n"}}


@pytest.mark.parametrize(
    ("node", "endless"),
    [
        (NODE, True),
        (NODE | {"required": []}, False),
        (NODE | {"type": ["object", "null"]}, False),
        ({"anyOf": [NODE, {"type": "null"}]}, False),
        ({"anyOf": [NODE, {"allOf": [{"$ref": "#/$defs/n"}]}]}, True),
        ({"type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": 1}, True),
        ({"type": "array", "items": {"$ref": "#/$defs/n"}}, False),
        (PAIR | {"minItems": 1}, True),
        (PAIR | {"prefixItems": [{"type": "null"}, True], "minItems": 2}, False),
        (PAIR | {"prefixItems": [{"type": "null"}, True], "minItems": 3}, True),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/m"}}, "required": ["a"]}, True),
    ],
    ids=lambda value: str(value)[:60],
)
def test_values_without_end_are_found(grammars: Grammars, node: Any, endless: bool) -> None:
    schema = {"$defs": {"n": node, "m": {"allOf": [{"$ref": "#/$defs/n"}]}}, "$ref": "#/$defs/n"}
    if not endless:
        grammars.compiled(Grammar.json_schema(schema))
        return
    with pytest.raises(
        BadInput, match=r'no text satisfies it: by "required" or "minItems" a value of "\$ref" "#/\$defs'
    ):
        grammars.compiled(Grammar.json_schema(schema))


def test_the_schema_false_is_refused() -> None:
    with pytest.raises(BadInput, match="no text satisfies the schema false"):
        Grammar.json_schema(False)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar.regex("a("), r"regex cannot be followed: a\( is no regular expression .*unclosed group"),
        (Grammar.regex(r"(a)\1"), "regex cannot be followed: .*backreferences are not supported"),
        (Grammar.regex(r"\bfoo"), "regex cannot be followed: .*not supported"),
        (Grammar.lark("start: foo"), 'grammar cannot be followed: .*unknown name: "foo"'),
        (Grammar.lark("begin: /a/"), "grammar cannot be followed: .*start"),
        (Grammar.lark("start: a\na: b\nb: a"), "grammar cannot be followed: no text satisfies it"),
        (Grammar.lark("start: <|no_such_token|>"), "grammar cannot be followed: .*no_such_token"),
        (Grammar.lark("start: " + "(" * 20000 + '"a"' + ")" * 20000), "grammar cannot be followed: it is nested too"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_grammars_that_cannot_be_followed(grammars: Grammars, grammar: Grammar, message: str) -> None:
    with pytest.raises(BadInput, match="^" + message) as caught:
        grammars.compiled(grammar)
    assert "\n" not in str(caught.value)


def deep(schema: Any, times: int) -> Any:
    for _ in range(times):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE = {
    "intersected patterns": {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(1, 30)]},
    "a hundred thousand values": {"enum": [f"v{i}" for i in range(100_000)]},
    "twenty thousand properties": {"properties": {f"p{i}": {"type": "string"} for i in range(20_000)}},
    "products of alternatives": {
        "allOf": [{"anyOf": [{"properties": {f"a{i}": {"const": j}}} for j in range(8)]} for i in range(30)]
    },
    "a thousand references": {
        "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(1000)} | {"d1000": {"not": {}}},
        "$ref": "#/$defs/d0",
    },
    "four hundred endless references": {
        "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{(i + 1) % 400}"}] * 9} for i in range(400)},
        "$ref": "#/$defs/d0",
    },
    "deep": deep({"type": "string"}, 400),
    "a huge multiple": {"type": "integer", "multipleOf": 999_999_937},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_schema_of_a_strangers_ends_soon(grammars: Grammars, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(guided, "SECONDS", 1.0)
    start = perf_counter()
    with pytest.raises(BadInput, match=r"too complex|too deep|written as JSON|no text|not supported"):
        grammars.compiled(Grammar.json_schema(HOSTILE[name]))
    assert perf_counter() - start < 10


@pytest.mark.parametrize(
    "source",
    [
        "start: A\nA: " + " & ".join(f"/(?s:.*)a{{{i}}}(?s:.*)/" for i in range(1, 40)),
        "start: A\nA: " + " & ".join(f"/(?s:.*)a{{{i}}}(?s:.*)/" for i in range(1, 15)),
    ],
    ids=["hangs", "out of fuel"],
)
def test_an_expression_of_a_strangers_ends_soon(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(guided, "SECONDS", 1.0)
    with pytest.raises(BadInput, match=r"grammar cannot be followed: it is too complex .*make it simpler"):
        grammars.compiled(Grammar.lark(source))


def test_a_schema_is_followed_with_bounded_white_space(grammars: Grammars) -> None:
    compiled = grammars.compiled(Grammar.json_schema(SCHEMA))

    def reads(text: str) -> bool:
        found = compiled.deep_copy()
        tokens = list(text.encode())
        ids = grammars._tokenizer.tokenize_bytes(bytes(tokens))
        return found.try_consume_tokens(ids) == len(ids)

    assert reads('{"a":1}') and reads('{ "a": 1}') and reads(json.dumps({"a": 1}, indent=8))
    assert not reads("{" + "\n" * 5) and not reads("{" + " " * 9)
