"""JSON schemas as applications write them, for tests of structured output. Strings are short, so that texts end."""

from typing import Any

SHORT = {"type": "string", "maxLength": 8}
Schema = dict[str, Any]


def closed(**properties: Any) -> Schema:
    """An object with these properties, all of them required, and no other."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


SCHEMAS: dict[str, Schema] = {
    "nested objects": closed(
        name=SHORT, address=closed(street=SHORT, geo=closed(lat={"type": "integer", "maximum": 90, "minimum": -90}))
    ),
    "enums": closed(colour={"enum": ["red", "green", "blue"]}, level={"enum": [1, 2, "high", None, True]}),
    "arrays": closed(
        tags={"type": "array", "items": {"enum": ["a", "b", "\u00e9\u4e2d\U0001f600"]}, "minItems": 1, "maxItems": 4},
        pair={"type": "array", "prefixItems": [{"type": "boolean"}, SHORT], "items": False, "minItems": 2},
    ),
    "numbers with bounds": closed(
        age={"type": "integer", "minimum": 0, "maximum": 150},
        share={"type": "number", "exclusiveMinimum": 0, "maximum": 1, "multipleOf": 0.25},
        five={"type": "integer", "multipleOf": 5, "minimum": 5, "maximum": 500},
    ),
    "patterns and formats": closed(
        phone={"type": "string", "pattern": r"^\d{3}-[0-9]{4}$"},
        day={"type": "string", "format": "date"},
        id={"type": "string", "format": "uuid"},
        code={"type": "string", "pattern": "^[A-Z]{2,4}$"},
    ),
    "a recursive reference": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
                },
                "required": ["value", "children"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "alternatives": {
        "anyOf": [
            closed(kind={"const": "circle"}, radius={"type": "integer", "minimum": 1, "maximum": 99}),
            closed(kind={"const": "text"}, value=SHORT),
            {"type": "null"},
        ]
    },
    "one of, by a constant": {
        "oneOf": [closed(type={"const": "a"}, x={"type": "boolean"}), closed(type={"const": "b"}, y={"type": "null"})]
    },
    "other properties": {
        "type": "object",
        "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["id"],
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 2,
    },
    "optional properties and several types": {
        "type": "object",
        "properties": {
            "note": {"type": ["string", "null"], "maxLength": 4},
            "ok": {"type": "boolean"},
            "n": {"type": ["integer", "boolean"], "minimum": 0, "maximum": 9},
        },
        "required": ["ok"],
        "additionalProperties": False,
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
            {"properties": {"a": {"enum": [True, 1]}, "b": {"enum": [1, 2]}}, "required": ["b"], "maxProperties": 2},
        ]
    },
    "what pydantic writes": {
        "$defs": {
            "Size": {"enum": ["S", "M"], "title": "Size", "type": "string"},
            "Item": closed(name=SHORT, size={"$ref": "#/$defs/Size"}) | {"title": "Item"},
        },
        "title": "Order",
        **closed(
            items={"type": "array", "items": {"$ref": "#/$defs/Item"}, "title": "Items", "minItems": 1, "maxItems": 2},
            paid={"anyOf": [{"type": "boolean"}, {"type": "null"}], "default": None, "title": "Paid"},
        ),
    },
    "a bare integer": {"type": "integer", "minimum": 10, "maximum": 99999},
    "a bare list": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
}  # fmt: skip
