"""The grammar of calls that a reply must make, for every form in which models write them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from pard_onnx.runtime.text.tool_formats import ToolFormat
from pard_onnx.runtime.text.tools import ToolUse, schema_parameters, tool_name

from .endless import refuse_endless
from .grammar import Grammar
from .matcher import with_own_settings

# Keywords beside which an object's properties may be named elsewhere
COMBINED = {"$ref", "allOf", "anyOf", "oneOf", "if", "not", "patternProperties", "unevaluatedProperties"}


def call_grammar(form: ToolFormat, use: ToolUse, token: Callable[[str], int | None]) -> Grammar:
    """The grammar of a reply that calls the forced tools and has no other text.

    token: the id of a text that is one token of the vocabulary; None where it is none.
    """
    written = form.written

    def rule(*parts: str) -> str:
        return " ".join(symbol for part in parts for symbol in symbols(part, form, token))

    more = ""
    if use.several and written.separator is not None:
        more = f"({rule(written.separator)} call)*"
    lines = [
        f"start: {rule(written.begin)} call {more} {rule(written.end)}",
        f"call: {' | '.join(f'call_{number}' for number in range(len(use.forced)))}",
    ]
    for number, tool in enumerate(use.forced):
        before = rule(written.before + tool_name(tool) + written.between)
        lines.append(f"call_{number}: {before} arguments_{number} {rule(written.after)}")
        schema = closed(with_null(schema_parameters(tool)))
        refuse_endless(json.dumps(schema), f"tool_choice: the parameters of {tool_name(tool)}")
        lines.append(f"arguments_{number}: %json {json.dumps(with_own_settings(schema))}")
    return Grammar.lark("\n".join(lines), "tool_choice")


def symbols(text: str, form: ToolFormat, token: Callable[[str], int | None]) -> Iterator[str]:
    """The symbols of a text in a Lark rule: tags that are tokens of the vocabulary are these tokens."""
    tags = "|".join(re.escape(tag) for tag in form.tags) or "(?!)"
    for part in re.split(f"({tags})", text):
        id_ = token(part) if part in form.tags else None
        if id_ is not None:
            yield f"<[{id_}]>"
        elif part:
            yield json.dumps(part, ensure_ascii=False)


def with_null(schema: Any) -> Any:
    """The schema, in which `nullable`, as schemas of functions have it, is written as a type."""
    if isinstance(schema, list):
        return [with_null(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: with_null(value) for key, value in schema.items() if key != "nullable" or isinstance(value, dict)}
    return {"anyOf": [inner, {"type": "null"}]} if schema.get("nullable") is True else inner


def closed(schema: Any) -> Any:
    """The schema, whose objects have no other properties than those that it names, unless it says that they may.

    A call with other arguments is of no use to a function, and a model that may add some need not come to an end.
    """
    if not isinstance(schema, dict) or COMBINED & schema.keys():
        return schema
    out = dict(schema)
    if isinstance(schema.get("properties"), dict):
        out["properties"] = {name: closed(inner) for name, inner in schema["properties"].items()}
        out.setdefault("additionalProperties", False)
    if "items" in schema:
        out["items"] = closed(schema["items"])
    return out
