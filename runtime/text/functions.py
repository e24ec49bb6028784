"""Python functions as tools: their type hints and docstrings become JSON schemas.

The schemas are those of transformers' `get_json_schema`: a docstring in Google's style describes the function and each
argument; `(choices: [...])` at the end of an argument's description lists its values.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pard_onnx.models.errors import BadInput, shown

Schema = dict[str, Any]

SECTIONS = r"(?:Args:|Returns:|Raises:|\Z)"
DESCRIPTION = re.compile(rf"^(.*?)\s*{SECTIONS}", re.DOTALL)
ARGUMENTS = re.compile(r"\n\s*Args:\n(.*?)\s*(?:Returns:|Raises:|\Z)", re.DOTALL)
RETURNED = re.compile(r"\n\s*Returns:\n\s*(.*?)\s*(?:Raises:|\Z)", re.DOTALL)
ARGUMENT = re.compile(r"([ \t]*)(\w+):\s*(.*)", re.DOTALL)
CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)
TYPES: dict[object, Schema] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    NoneType: {"type": "null"},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}
SCALARS = (int, float, str, bool, NoneType)


class NoSchema(Exception):
    """Why a type hint has no JSON schema."""


def function_tool(function: Callable[..., Any]) -> Schema:
    """The tool, in OpenAI's form, that describes this function; BadInput, naming the argument, where it cannot."""
    name = getattr(function, "__name__", None)
    doc = inspect.getdoc(function)
    if not isinstance(name, str) or not name.isidentifier():
        raise BadInput(f"a tool is a function with a name, or a JSON object, not {shown(function)}")
    if not doc or not doc.strip():
        raise BadInput(f"the tool {name} has no docstring; the model reads there what it does")
    about, described, returned = read_docstring(doc.strip())
    hints, required = read_signature(name, function)
    properties = {argument: hint_schema(name, argument, hint) for argument, hint in hints.items()}
    for argument, schema in properties.items():
        if argument not in described:
            raise BadInput(
                f"the tool {name} does not describe its argument {argument}; add it to Args: in the docstring"
            )
        describe(name, argument, schema, described[argument])
    parameters: Schema = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    tool: Schema = {"name": name, "description": about, "parameters": parameters}
    if (returns := return_schema(function)) is not None:
        tool["return"] = returns | ({} if returned is None else {"description": returned})
    return {"type": "function", "function": tool}


def read_signature(name: str, function: Callable[..., Any]) -> tuple[dict[str, Any], list[str]]:
    """The arguments' type hints, and the names of those without a default; self and cls without a hint are left out."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
        hints = get_type_hints(function)
    except (NameError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"the type hints of the tool {name} cannot be read: {error}; give a JSON object") from error
    if parameters and parameters[0].name in ("self", "cls") and parameters[0].annotation is inspect.Parameter.empty:
        parameters = parameters[1:]
    for parameter in parameters:
        if parameter.annotation is inspect.Parameter.empty:
            raise BadInput(f"the argument {parameter.name} of the tool {name} has no type hint; add one")
    known = [parameter.name for parameter in parameters]
    required = [one.name for one in parameters if one.default is inspect.Parameter.empty]
    return {argument: hint for argument, hint in hints.items() if argument in known}, required


def hint_schema(name: str, argument: str, hint: Any) -> Schema:
    try:
        return schema_of(hint)
    except NoSchema as error:
        raise BadInput(
            f"the type hint of {argument} of the tool {name}: {error}; use int, float, str, bool, Literal, Enum, and "
            "list, tuple, dict and unions of them, or give the tool as a JSON object"
        ) from error


def return_schema(function: Callable[..., Any]) -> Schema | None:
    """The schema of what the function returns, which most templates ignore; None where there is none."""
    hint = get_type_hints(function).get("return", inspect.Parameter.empty)
    if hint is inspect.Parameter.empty:
        return None
    try:
        return schema_of(hint)
    except NoSchema:
        return None


def describe(name: str, argument: str, schema: Schema, text: str) -> None:
    """Add the description, and the choices at its end."""
    if found := CHOICES.search(text):
        try:
            choices = json.loads(found[1])
        except ValueError as error:
            raise BadInput(
                f"the choices of {argument} of the tool {name} are no JSON list: {shown(found[1])}"
            ) from error
        if not isinstance(choices, list):
            raise BadInput(f"the choices of {argument} of the tool {name} are no JSON list: {shown(found[1])}")
        schema["enum"] = [choice.strip() if isinstance(choice, str) else choice for choice in choices]
        text = text[: found.start()].strip()
    schema["description"] = text


def read_docstring(doc: str) -> tuple[str, dict[str, str], str | None]:
    """What a docstring in Google's style says of the function, of each argument, and of what is returned."""
    about = DESCRIPTION.search(doc)
    arguments = ARGUMENTS.search(doc)
    returned = RETURNED.search(doc)
    described = split_arguments(arguments[1]) if arguments else {}
    return about[1].strip() if about else "", described, returned[1] if returned else None


def split_arguments(text: str) -> dict[str, str]:
    """The descriptions in an Args: block by name. A line that is indented deeper goes on with the one before."""
    entries: list[tuple[str, str, list[str]]] = []  # indentation, name, lines
    for line in (line for line in text.split("\n") if line.strip()):
        found = ARGUMENT.fullmatch(line)
        deeper = bool(entries) and re.match(re.escape(entries[-1][0]) + r"[ \t]", line)
        if found and not deeper:
            entries.append((found[1], found[2], [found[3].strip()]))
        elif entries:
            entries[-1][2].append(line.strip())
    return {name: " ".join(line for line in lines if line) for _, name, lines in entries}


def schema_of(hint: Any) -> Schema:
    """The JSON schema of a type hint; NoSchema for a type that JSON does not have."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is None:
        if isinstance(hint, type) and issubclass(hint, Enum):
            return enum_schema([member.value for member in hint], hint.__name__)
        if (isinstance(hint, type) or hint is Any) and (known := TYPES.get(hint)) is not None:
            return dict(known)
        raise NoSchema(f"{shown(hint)} has no JSON form")
    if origin is Union or origin is UnionType:
        return union_schema(arguments)
    if origin is Literal:
        return enum_schema(list(arguments), "Literal")
    if origin is list:
        return {"type": "array", "items": schema_of(arguments[0])}
    if origin is tuple:
        return tuple_schema(arguments)
    if origin is dict:
        return {"type": "object", "additionalProperties": schema_of(arguments[1])}
    raise NoSchema(f"{shown(hint)} has no JSON form")


def enum_schema(values: list[Any], name: str) -> Schema:
    if not values or any(type(value) not in SCALARS for value in values):
        raise NoSchema(f"the values of {name} must be int, float, str, bool or None")
    types = list(dict.fromkeys(TYPES[type(value)]["type"] for value in values))
    return {"type": types[0] if len(types) == 1 else types, "enum": values}


def union_schema(members: tuple[Any, ...]) -> Schema:
    schemas = [schema_of(member) for member in members if member is not NoneType]
    if len(schemas) == 1:
        out = schemas[0]
    elif all(schema.keys() == {"type"} and isinstance(schema["type"], str) for schema in schemas):
        types = sorted({schema["type"] for schema in schemas})
        out = {"type": types[0] if len(types) == 1 else types}
    else:
        out = {"anyOf": schemas}
    if NoneType in members:
        out["nullable"] = True
    return out


def tuple_schema(members: tuple[Any, ...]) -> Schema:
    if len(members) == 1 or Ellipsis in members:
        raise NoSchema("a tuple has a type for each of at least two items; use list for any number")
    return {"type": "array", "prefixItems": [schema_of(member) for member in members]}
