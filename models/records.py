"""JSON to frozen dataclasses and back. Errors name a wrong value by its path (`spec.rope.theta`)."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from math import isfinite
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from .checks import nearest_name
from .errors import BadInput, shown

Record = TypeVar("Record")
LARGEST = 1 << 63  # of whole numbers: those of files and graphs have 64 bits


def to_json(value: object) -> Any:
    """The value as `json.dumps` takes it: a dataclass of dataclasses, tuples, strings, numbers, booleans and None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{type(value).__name__} has no JSON form")


def from_json(kind: type[Record], value: object, *, error: type[BadInput] = BadInput, context: str = "") -> Record:
    """The dataclass `kind` with the fields of `value`, an object from `json.loads`.

    Raises `error`, its text beginning with `context`, for unknown keys (with the nearest known one),
    missing keys, wrong types, numbers that are not finite or have more than 64 bits, and halves of surrogate pairs.
    """
    try:
        return cast(Record, _read(kind, value, ""))
    except _WrongValue as wrong:
        raise error(f"{context}{wrong}") from None


class _WrongValue(Exception):
    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}" if path else problem)


def _read(kind: Any, value: object, path: str) -> Any:
    origin = get_origin(kind) or kind
    if is_dataclass(kind):
        return _read_record(cast(type, kind), value, path)
    reader = _READERS.get(origin)
    if reader:
        return reader(kind, value, path)
    raise TypeError(f"{path}: records cannot hold {kind}")


def _read_record(kind: type, value: object, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise _WrongValue(path, f"must be an object, not {_show(value)}")
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}
    for key in value:
        if key not in known:
            nearest = nearest_name(key, known, least_similarity=0)
            hint = f"; the nearest known one is {shown(nearest)}" if nearest else ""
            raise _WrongValue(path, f"unknown key {shown(key)}{hint}")
    found = {}
    for name, field in known.items():
        inner = f"{path}.{name}" if path else name
        if name in value:
            found[name] = _read(hints[name], value[name], inner)
        elif _required(field):
            raise _WrongValue(inner, "is missing")
    return kind(**found)


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _read_plain(kind: Any, value: object, path: str) -> Any:
    # bool is an int to Python, not to JSON; a whole number is a fine float
    accepted: tuple[type, ...] = (float, int) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise _WrongValue(path, f"must be {_NAMES[kind]}, not {_show(value)}")
    if isinstance(value, str):
        _require_unicode(value, path)
        return value
    if not -LARGEST <= cast(float, value) < LARGEST if isinstance(value, int) else not isfinite(cast(float, value)):
        raise _WrongValue(path, f"must be a finite number of at most 64 bits, not {_show(value)}")
    return float(value) if isinstance(value, int) and kind is float else value


def _require_unicode(text: str, path: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _WrongValue(path, f"must be Unicode, not half of a surrogate pair: {_show(text)}") from None


def _read_tuple(kind: Any, value: object, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _WrongValue(path, f"must be a list, not {_show(value)}")
    kinds = get_args(kind)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise _WrongValue(path, f"must have {len(kinds)} items, not {len(value)}")
    return tuple(_read(inner, item, f"{path}[{i}]") for i, (inner, item) in enumerate(zip(kinds, value, strict=True)))


def _read_optional(kind: Any, value: object, path: str) -> Any:
    if value is None and type(None) in get_args(kind):
        return None
    kinds = [inner for inner in get_args(kind) if inner is not type(None)]
    if len(kinds) != 1:
        raise TypeError(f"{path}: of unions, records can hold only X | None")
    return _read(kinds[0], value, path)


def _read_literal(kind: Any, value: object, path: str) -> Any:
    for choice in get_args(kind):
        if value == choice and type(value) is type(choice):
            return choice
    raise _WrongValue(path, f"must be one of {', '.join(map(repr, get_args(kind)))}, not {_show(value)}")


def _show(value: object) -> str:
    names = {dict: "an object", list: "a list", type(None): "null"}
    return names.get(type(value)) or shown(value)


_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_READERS: dict[Any, Callable[[Any, object, str], Any]] = {
    **dict.fromkeys(_NAMES, _read_plain),
    tuple: _read_tuple,
    Union: _read_optional,
    types.UnionType: _read_optional,
    Literal: _read_literal,
}
