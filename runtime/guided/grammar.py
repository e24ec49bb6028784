"""`Grammar`: what a generated text must be, as a value. llguidance, which follows it, is not imported here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pard_onnx.models.checks import listed, nearest_name
from pard_onnx.models.errors import BadInput, shown

MOST_CHARACTERS = 1_000_000  # of a grammar's text
MOST_REGEX = 100_000  # of a regular expression, whose characters cost more
JSON_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
FORMATS = ("text", "json_object", "json_schema")  # the types of OpenAI's response_format
ANSWER = "answer"  # the name of the answer's part in a grammar with reasoning


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A block of free text before the answer."""

    end: str  # the text that ends the block; a token of its own in most models
    begin: str | None  # the text that begins it, where the model may begin one; None where the prompt has begun it


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a generated text must be. BadInput names the argument, the value and the fix.

    Make one with `json_object`, `json_schema`, `regex`, `choice` or `lark`. Whether llguidance can follow it is found
    out when a generation begins.
    """

    kind: Literal["json", "regex", "choice", "lark"]
    text: str  # a JSON schema, a regular expression, a JSON list of texts, or a Lark grammar
    argument: str  # the option that it comes from, for messages
    reasoning: Reasoning | None = None

    def __post_init__(self) -> None:
        most = MOST_REGEX if self.kind == "regex" else MOST_CHARACTERS
        if len(self.text) > most:
            raise BadInput(f"{self.argument} has {len(self.text)} characters; at most {most} are allowed")
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"{self.argument} is not valid Unicode: {error}") from None

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def json_schema(cls, schema: object, argument: str = "response_format") -> Grammar:
        """JSON of this schema: a mapping, or true or false as JSON schemas may be."""
        if not isinstance(schema, Mapping | bool):
            raise BadInput(f"{argument}: a JSON schema must be a mapping, not {shown(schema)}")
        try:
            # Through text, so that no object of the user's is left
            found = json.loads(json.dumps(dict(schema) if isinstance(schema, Mapping) else schema, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise BadInput(f"{argument}: the JSON schema cannot be written as JSON: {error}") from None
        if found is False:
            raise BadInput(f"{argument}: no text satisfies the schema false; leave it out, or take another schema")
        return cls("json", json.dumps({} if found is True else found, ensure_ascii=False), argument)

    @classmethod
    def regex(cls, expression: object, argument: str = "regex") -> Grammar:
        """Text that a regular expression matches as a whole, in the syntax of Rust's regex library."""
        if not isinstance(expression, str) or not expression:
            raise BadInput(f"{argument} must be a regular expression, not {shown(expression)}")
        return cls("regex", expression, argument)

    @classmethod
    def choice(cls, texts: object, argument: str = "choice") -> Grammar:
        """One of these texts."""
        if not isinstance(texts, Iterable) or isinstance(texts, str | bytes | bytearray | Mapping):
            raise BadInput(f"{argument} must be a list of texts, not {shown(texts)}")
        found = list(dict.fromkeys(checked_choice(text, argument) for text in listed(texts, argument)))
        if not found:
            raise BadInput(f"{argument} has no text; give at least one")
        return cls("choice", json.dumps(found, ensure_ascii=False), argument)

    @classmethod
    def lark(cls, text: object, argument: str = "grammar") -> Grammar:
        """Text of a grammar in llguidance's variant of Lark, which begins with the rule `start`."""
        if not isinstance(text, str) or not text.strip():
            raise BadInput(f"{argument} must be the text of a Lark grammar, not {shown(text)}")
        return cls("lark", text, argument)

    def after(self, end: str, begun: bool, begin: str | None = None) -> Grammar:
        """This grammar for the answer alone, after a block of reasoning, which is free text and ends in `end`.

        begun: whether the prompt has begun the block already. Otherwise the model may begin one, or answer at once.
        begin: the text that begins a block; None: `<name>` for an end `</name>`.
        Line ends may follow the block.
        """
        if not begun and begin is None:
            begin = end.replace("</", "<", 1)
        return replace(self, reasoning=Reasoning(end, None if begun else begin))


def checked_choice(text: object, argument: str) -> str:
    if not isinstance(text, str) or not text:
        raise BadInput(f"{argument}: each choice must be text of at least one character, not {shown(text)}")
    return text


def chosen_grammar(response_format: object, regex: object, choice: object, grammar: object) -> Grammar | None:
    """The grammar of these options, at most one of which may be given (not None); None where the text is free."""
    given = {"response_format": response_format, "regex": regex, "choice": choice, "grammar": grammar}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise BadInput(f"{' and '.join(given)} cannot both hold; give one of them")
    if response_format is not None:
        return from_response_format(response_format)
    if regex is not None:
        return Grammar.regex(regex)
    if choice is not None:
        return Grammar.choice(choice)
    if grammar is None or isinstance(grammar, Grammar):
        return grammar
    return Grammar.lark(grammar)


def from_response_format(value: Any) -> Grammar | None:
    """OpenAI's response_format, a JSON schema as it is, or a pydantic model; None for free text."""
    if isinstance(value, type) and callable(schema_of := getattr(value, "model_json_schema", None)):
        return Grammar.json_schema(schema_of())
    if not isinstance(value, Mapping):
        wanted = 'a mapping such as {"type": "json_object"}, a JSON schema, or a pydantic model'
        raise BadInput(f"response_format must be {wanted}, not {shown(value)}")
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":  # llama.cpp's servers and others take a schema here, too
        return Grammar.json_schema(value["schema"]) if "schema" in value else Grammar.json_object()
    if kind == "json_schema":
        inner = value.get("json_schema", value)
        if not isinstance(inner, Mapping) or "schema" not in inner:
            raise BadInput(
                'response_format has no schema; give {"type": "json_schema", "json_schema": {"schema": ...}}'
            )
        return Grammar.json_schema(inner["schema"])
    if isinstance(kind, str) and kind not in JSON_TYPES:
        nearest = nearest_name(kind, (*FORMATS, *JSON_TYPES))
        hint = f"did you mean {nearest}?" if nearest else f"known are {', '.join(FORMATS)} and those of JSON schemas"
        raise BadInput(f"response_format: unknown type {shown(kind)}; {hint}")
    return Grammar.json_schema(value)
