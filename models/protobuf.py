"""The wire format of protocol buffers: messages as lists of fields, to edit a graph without the onnx package.

Fields that are not edited are written back byte for byte. Source: protobuf.dev, "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
WIDTHS = {FIXED64: 8, FIXED32: 4}
MASK = (1 << 64) - 1

Field = tuple[int, int, int | bytes]  # number, wire type, value


def fields(data: bytes) -> Iterator[Field]:
    """The fields of a message, in order; ValueError if the bytes are not a message."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if not 0 < key >> 3 < 1 << 29:  # readers in C++ keep 32 bits of a key, and would see another field
            raise ValueError(f"a field of the number {number} at byte {at}")
        if wire == VARINT:
            value, at = _varint(data, at)
            yield number, wire, value
            continue
        if wire == BYTES:
            size, at = _varint(data, at)
        elif wire in WIDTHS:
            size = WIDTHS[wire]
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > end:
            raise ValueError(f"a field of {size} bytes at byte {at} of {end}")
        yield number, wire, data[at : at + size]
        at += size


def message(parts: Iterable[Field]) -> bytes:
    """The message with these fields: the inverse of `fields`."""
    out = bytearray()
    for number, wire, value in parts:
        out += _encoded(number << 3 | wire)
        if isinstance(value, int):
            out += _encoded(value)
            continue
        if wire == BYTES:
            out += _encoded(len(value))
        out += value
    return bytes(out)


def text(number: int, value: str) -> Field:
    """A field with a text."""
    return number, BYTES, value.encode()


def signed(value: int) -> int:
    """The value of a varint in a field of type int64 or int32."""
    return value - (1 << 64) if value >> 63 else value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at this position, and the position after it."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError(f"a number that does not end at byte {at}")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value & MASK, at


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
