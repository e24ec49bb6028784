"""JSON schemas that only endless values satisfy, such as a list node whose `next` is required to be another node.

llguidance follows them for ever, so they are found here. Keywords that only refuse values are not looked at: a schema
that is found endless is so whatever they say.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from pard_onnx.models.errors import BadInput

MOST_WORK = 20_000_000  # characters that may be looked at; a schema that needs more is let pass


def refuse_endless(text: str, argument: str) -> None:
    """Raise BadInput, which names a reference, if no value of the JSON schema in `text` ends."""
    if '"$ref"' not in text:
        return
    schema = json.loads(text)
    names = references(schema)
    if len(text) * len(names) ** 2 > MOST_WORK:
        return
    with suppress(RecursionError):  # nested deeper than this Python's stack
        refuse_without_end(schema, names, argument)


def refuse_without_end(schema: dict[str, Any], names: set[str], argument: str) -> None:
    """See `refuse_endless`; names: of all references."""
    ends: set[str] = set()  # references to schemas with values that end; grows until nothing is added
    while added := [name for name in names - ends if has_end(target_of(schema, name), ends)]:
        ends.update(added)
    if not has_end(schema, ends):
        which = ", ".join(f'"{name}"' for name in sorted(names - ends)[:3])
        raise BadInput(
            f'{argument} cannot be followed: no text satisfies it: by "required" or "minItems" a value of "$ref" '
            f"{which} contains another one without end; make that part optional, or allow null"
        )


def references(value: Any) -> set[str]:
    """The names of all references in a schema."""
    found, left = set(), [value]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            if isinstance(name := part.get("$ref"), str):
                found.add(name)
            left.extend(part.values())
        elif isinstance(part, list):
            left.extend(part)
    return found


def target_of(schema: Any, name: str) -> Any:
    """The part of the schema that a reference names; True, which any value satisfies, where it is not found here."""
    if name != "#" and not name.startswith("#/"):
        return True
    part = schema
    for key in name.split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if isinstance(part, list) and key.isdigit() and int(key) < len(part):
            part = part[int(key)]
        elif isinstance(part, dict) and key in part:
            part = part[key]
        else:
            return True
    return part


def has_end(schema: Any, ends: set[str]) -> bool:
    """Whether some value of the schema ends; ends: the references for which that is known."""
    if not isinstance(schema, dict):
        return schema is not False
    if isinstance(name := schema.get("$ref"), str) and name not in ends:
        return False
    for keyword in ("anyOf", "oneOf"):
        if isinstance(parts := schema.get(keyword), list) and not any(has_end(part, ends) for part in parts):
            return False
    if isinstance(parts := schema.get("allOf"), list) and not all(has_end(part, ends) for part in parts):
        return False
    if "const" in schema or "enum" in schema:
        return True
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    looked_at = {"object": object_has_end, "array": array_has_end}
    return any(looked_at[kind](schema, ends) if kind in ("object", "array") else True for kind in kinds)


def object_has_end(schema: dict[str, Any], ends: set[str]) -> bool:
    known, required = schema.get("properties"), schema.get("required")
    if not isinstance(known, dict) or not isinstance(required, list):
        return True
    return all(has_end(known[name], ends) for name in required if isinstance(name, str) and name in known)


def array_has_end(schema: dict[str, Any], ends: set[str]) -> bool:
    least, first = schema.get("minItems", 0), schema.get("prefixItems", [])
    if not isinstance(least, int) or not isinstance(first, list):
        return True
    rest_ends = least <= len(first) or has_end(schema.get("items", True), ends)
    return rest_ends and all(has_end(part, ends) for part in first[:least])
