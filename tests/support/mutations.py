"""Mutations of files that stay near to good ones: of JSON values and texts, of protocol buffers, and of plain bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from copy import deepcopy as copied
from math import inf, nan
from random import Random
from typing import Any

from pard_onnx.models.protobuf import BYTES, VARINT, fields, message

NUMBERS = [0, 1, -1, 2, 7, 8, 64, 255, 4096, 65536, *(sign * (1 << bits) + more for bits in (31, 32, 53, 62, 63, 64)
           for sign in (1, -1) for more in (-1, 0, 1)), 10**30, 10**400]  # fmt: skip
TEXTS = [
    "",
    "a",
    "0",
    "-1",
    "../outside",
    "/dev/zero",
    "\ud800",
    "é" * 200,
    "x" * 10_000,
    "model.onnx",
    "true",
    "NUL",
    "\0",
    "\n",
]
VALUES: list[Any] = [
    None,
    True,
    False,
    0.5,
    -0.0,
    1e308,
    nan,
    inf,
    *NUMBERS,
    *TEXTS,
    [],
    {},
    [[]],
    [0] * 1000,
    {"a": {}},
]
CONTAINERS = (dict, list)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All containers and keys within a JSON value."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    for key, inner in items:
        yield value, key
        if isinstance(inner, CONTAINERS):
            yield from places(inner)


def mutated_json(value: Any, rng: Random) -> Any:
    """A copy of a JSON value with one to three changes."""
    value = copied(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = list(places(value))
        if not found:
            return value
        holder, key = rng.choice(found)
        other_holder, other = rng.choice(found)
        kind = rng.randrange(8)
        if kind < 4:
            holder[key] = copied(rng.choice(VALUES))
        elif kind == 4:
            del holder[key]
        elif kind == 5:
            holder[key] = copied(other_holder[other])
        elif kind == 6 and isinstance(holder, list):
            holder.extend(copied(holder[key]) for _ in range(rng.choice((1, 100))))
        elif isinstance(holder, dict):
            holder[rng.choice(["", "unknown", "\ud800", "layers"])] = copied(holder[key])
    return value


def mutated_bytes(data: bytes, rng: Random, end: int | None = None) -> bytes:
    """A copy of a file with some bytes changed, removed, repeated or added before `end`."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(max(1, min(len(out), end or len(out))))
        kind = rng.randrange(6)
        length = rng.choice((1, 2, 4, 8, 100))
        if kind < 2:
            out[place : place + 1] = bytes([rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))])
        elif kind == 2:
            del out[place : place + length]
        elif kind == 3:
            out[place:place] = out[place : place + length]
        elif kind == 4:
            number = rng.choice(NUMBERS) & ((1 << 64) - 1)
            out[place : place + 8] = struct.pack("<Q", number)
        elif rng.random() < 0.2:
            del out[place:]
    return bytes(out)


def mutated_message(data: bytes, rng: Random, depth: int = 0) -> bytes:
    """A copy of a protocol buffer in which one field of some depth is another one."""
    try:
        parts = list(fields(data))
    except ValueError:
        return mutated_bytes(data, rng)
    if not parts:
        return data + rng.choice((b"", b"\x08\x01", b"\x3a\x00"))
    index = rng.randrange(len(parts))
    number, wire, value = parts[index]
    if isinstance(value, bytes) and wire == BYTES and value and depth < 6 and rng.random() < 0.85:
        parts[index] = number, wire, mutated_message(value, rng, depth + 1)
        return message(parts)
    kind = rng.randrange(7)
    if kind == 0:
        del parts[index]
    elif kind == 1:
        parts.insert(rng.randrange(len(parts) + 1), parts[index])
    elif kind == 2:
        other = rng.randrange(len(parts))
        parts[index], parts[other] = parts[other], parts[index]
    elif kind == 3:
        parts[index] = rng.choice((1, 2, 3, 5, 6, 7, 8, 11, 13, 14, 15, 20, 25, 1 << 28)), wire, value
    elif isinstance(value, int):
        parts[index] = number, VARINT, rng.choice(NUMBERS) & ((1 << 64) - 1)
    else:
        text = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
        parts[index] = number, wire, text if wire == BYTES else value
    return message(parts)
