"""Packed matrices in a file of their own until the exporter asks for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.precision import Format

from .pack import Float, Packed
from .prepared import Order
from .report import Error

PARTS = ("weight", "scale", "zero_point")


@dataclass(frozen=True, slots=True)
class Block:
    """Rows `start` to `stop` of a matrix: where its parts lie, with their types and shapes."""

    start: int
    stop: int
    parts: dict[str, tuple[int, np.dtype[np.generic], tuple[int, ...]]]


@dataclass(slots=True)
class Spool:
    """A `Prepared` that is filled one matrix after the other. `file` is open for reading and writing."""

    file: BinaryIO
    _formats: dict[str, Format] = field(default_factory=dict)
    _blocks: dict[str, list[Block]] = field(default_factory=dict)
    _errors: dict[str, Error] = field(default_factory=dict)
    _vectors: dict[str, Float] = field(default_factory=dict)

    def add(self, name: str, fmt: Format, blocks: Iterable[Packed], error: Error) -> None:
        """A matrix in blocks of rows, in order."""
        start, found = 0, []
        for packed in blocks:
            stop = start + len(packed.weight)
            found.append(Block(start, stop, {part: self._write(packed, part) for part in _there(packed)}))
            start = stop
        self.file.flush()
        self._formats[name], self._blocks[name], self._errors[name] = fmt, found, error

    def replace(self, name: str, vector: Float) -> None:
        """A vector instead of the checkpoint's."""
        self._vectors[name] = vector

    def format(self, name: str) -> Format | None:
        return self._formats.get(name)

    def rows(self, name: str, rows: slice) -> Packed:
        taken = [(b, slice(max(rows.start - b.start, 0), min(rows.stop, b.stop) - b.start)) for b in self._blocks[name]]
        pieces = [self._read(block, part) for block, part in taken if part.start < part.stop]
        found: dict[str, Any] = {part: _joined([getattr(piece, part) for piece in pieces]) for part in PARTS}
        return Packed(**found)

    def error(self, name: str) -> Error:
        return self._errors[name]

    def order(self, name: str) -> Order | None:
        return None

    def vector(self, name: str) -> Float | None:
        return self._vectors.get(name)

    def _write(self, packed: Packed, part: str) -> tuple[int, np.dtype[np.generic], tuple[int, ...]]:
        array = np.ascontiguousarray(getattr(packed, part))
        offset = self.file.tell()
        self.file.write(array.data)
        return offset, array.dtype, array.shape

    def _read(self, block: Block, rows: slice) -> Packed:
        """By memory map: several threads read at a time."""
        places = block.parts.items()
        found: dict[str, Any] = {part: np.memmap(self.file, t, "r", at, shape)[rows] for part, (at, t, shape) in places}
        return Packed(**found)


def _there(packed: Packed) -> list[str]:
    return [part for part in PARTS if getattr(packed, part) is not None]


def _joined(arrays: list[NDArray[np.generic] | None]) -> NDArray[np.generic] | None:
    there = [array for array in arrays if array is not None]
    return np.concatenate(there) if there else None
