"""Weights that are packed before they are exported, and the storage format of every matrix of a model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.families import shapes
from pard_onnx.models.precision import FLOAT16, FLOAT32, Format, Recipe
from pard_onnx.models.spec import PROJECTION, ModelSpec

from .pack import Float, PackedRows, RoundingError, format_for_width

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
PARTS = ("weight", "scale", "zero_point", "minimum")  # of PackedRows
ColumnOrder = NDArray[np.int64]


class Prepared(Protocol):
    """Matrices packed by an algorithm with calibration text, or read from a quantized checkpoint.

    Names are the checkpoint's: of a matrix without `.weight`, of a vector with its ending. A tied head has the
    embedding's name.
    """

    def format(self, name: str) -> Format | None:
        """The format of a prepared matrix, with a block that divides its width; None: the matrix is not prepared."""

    def rows(self, name: str, rows: slice) -> PackedRows:
        """Rows of a prepared matrix. Called from several threads."""

    def error(self, name: str) -> RoundingError:
        """The rounding error of a prepared matrix; RoundingError() if this program rounded nothing."""

    def order(self, name: str) -> ColumnOrder | None:
        """The checkpoint's column at each column of a prepared matrix, [in]; None: they are in the same order."""

    def vector(self, name: str) -> Float | None:
        """The norm weight or bias that replaces the checkpoint's; None: the checkpoint's is kept."""


@dataclass(frozen=True, slots=True)
class Formats:
    """The storage format of every matrix: a prepared matrix has its own, any other the recipe's."""

    recipe: Recipe
    # lm_head reads the embedding's matrix. The matrix is stored once, in the head's format; twice if the recipe wants
    # the embedding's rows in floats, because the device cannot look them up in a packed matrix.
    tied: bool
    prepared: Prepared | None = None

    def stored(self, name: str) -> str:
        """The name under which the matrix `name` is stored."""
        return EMBEDDING if self.tied and name == HEAD else name

    def of(self, name: str) -> Format:
        """The format of a matrix."""
        if name == EMBEDDING and (self.twice if self.tied else self.recipe.of(EMBEDDING).plain):
            return self.recipe.of(EMBEDDING)  # also where a quantized checkpoint has it in integers
        stored = self.stored(name)
        held = self.prepared.format(stored) if self.prepared else None
        found = held or self.recipe.of(HEAD if self.tied and stored == EMBEDDING else stored)
        # The scales of its activations would come from a target, which no recipe reads
        plain = FLOAT16 if self.recipe.floats == "float16" else FLOAT32
        return plain if name == PROJECTION and found.activations else found

    @property
    def twice(self) -> bool:
        """Whether a tied matrix is stored twice: in floats for the embedding, packed for the head."""
        return self.recipe.of(EMBEDDING).plain and not self.recipe.of(HEAD).plain

    def stored_recipe(self, spec: ModelSpec) -> Recipe:
        """The recipe as it is carried out on a model: blocks as matrices' widths allow, and prepared formats.

        Overrides name a matrix in all layers where these have one format, and single matrices elsewhere.
        """
        extents = {name.removesuffix(".weight"): shape for name, shape in shapes(spec) if len(shape) == 2}
        found = {name: format_for_width(self.of(name), shape[1], name) for name, shape in extents.items()}
        weights: Counter[Format] = Counter()
        by_suffix: dict[str, set[Format]] = defaultdict(set)
        inner = [name for name in found if name not in (HEAD, EMBEDDING)]
        for name in inner:
            weights[found[name]] += prod(extents[name])
            by_suffix[name.rsplit(".", 1)[-1]].add(found[name])
        most = weights.most_common(1)[0][0]
        by_suffix.pop(PROJECTION, None)  # in no layer
        uniform = {suffix: next(iter(formats)) for suffix, formats in by_suffix.items() if len(formats) == 1}
        everywhere = tuple((f"*.{suffix}", fmt) for suffix, fmt in uniform.items() if fmt != most)
        single = ((name, found[name]) for name in inner if name.rsplit(".", 1)[-1] not in uniform)
        overrides = (*((name, fmt) for name, fmt in single if fmt != most), *everywhere)
        embedding = found[EMBEDDING]
        head = found.get(HEAD) or format_for_width(self.of(HEAD), extents[EMBEDDING][1], HEAD)
        return Recipe(most, head, embedding, overrides, self.recipe.activations)

    def order(self, name: str) -> ColumnOrder | None:
        """`Prepared.order` of a matrix; None for a matrix that is not prepared."""
        return self.prepared.order(self.stored(name)) if self.prepared else None

    def joinable(self, names: Sequence[str]) -> bool:
        """Whether matrices with the same input can be stored as one: their formats and column orders are equal, and
        their products have no activation scales, of which one matrix has a single one."""
        orders = [self.order(name) for name in names]
        same = all(a is b if a is None or b is None else np.array_equal(a, b) for a, b in pairwise(orders))
        formats = {self.of(name) for name in names}
        return same and len(formats) == 1 and not any(fmt.activations for fmt in formats)

    @property
    def floats(self) -> np.dtype[np.generic]:
        """The type of activations, norms and biases."""
        return np.dtype(self.recipe.floats)


@dataclass(frozen=True, slots=True)
class SpooledRows:
    """Where rows `start` to `stop` of a matrix are in the file."""

    start: int
    stop: int
    parts: dict[str, tuple[int, np.dtype[np.generic], tuple[int, ...]]]  # offset, type and shape of each part


@dataclass(slots=True)
class Spool:
    """A `Prepared` that is filled matrix by matrix and keeps packed matrices in a file until they are exported."""

    file: IO[bytes]  # open for reading and writing
    _formats: dict[str, Format] = field(default_factory=dict)
    _rows: dict[str, list[SpooledRows]] = field(default_factory=dict)
    _errors: dict[str, RoundingError] = field(default_factory=dict)
    _vectors: dict[str, Float] = field(default_factory=dict)

    def add(self, name: str, fmt: Format, blocks: Iterable[PackedRows], error: RoundingError) -> None:
        """Add a matrix, given as blocks of rows in order."""
        start, spooled = 0, []
        for packed in blocks:
            stop = start + len(packed.weight)
            present = [part for part in PARTS if getattr(packed, part) is not None]
            spooled.append(SpooledRows(start, stop, {part: self._write(packed, part) for part in present}))
            start = stop
        self.file.flush()
        self._formats[name], self._rows[name], self._errors[name] = fmt, spooled, error

    def replace(self, name: str, vector: Float) -> None:
        """Replace a vector of the checkpoint."""
        self._vectors[name] = vector

    def format(self, name: str) -> Format | None:
        return self._formats.get(name)

    def rows(self, name: str, rows: slice) -> PackedRows:
        spans = [(s, slice(max(rows.start - s.start, 0), min(rows.stop, s.stop) - s.start)) for s in self._rows[name]]
        pieces = [self._read(spooled, span) for spooled, span in spans if span.start < span.stop]
        parts: dict[str, Any] = {part: _concatenated([getattr(piece, part) for piece in pieces]) for part in PARTS}
        return PackedRows(**parts)

    def error(self, name: str) -> RoundingError:
        return self._errors[name]

    def order(self, name: str) -> ColumnOrder | None:
        return None

    def vector(self, name: str) -> Float | None:
        return self._vectors.get(name)

    def _write(self, packed: PackedRows, part: str) -> tuple[int, np.dtype[np.generic], tuple[int, ...]]:
        array = np.ascontiguousarray(getattr(packed, part))
        offset = self.file.tell()
        self.file.write(array.data)
        return offset, array.dtype, array.shape

    def _read(self, spooled: SpooledRows, rows: slice) -> PackedRows:
        """Rows by memory map, because several threads read at a time."""
        places = spooled.parts.items()
        parts: dict[str, Any] = {
            part: np.memmap(self.file, dtype, "r", offset, shape)[rows] for part, (offset, dtype, shape) in places
        }
        return PackedRows(**parts)


def _concatenated(arrays: list[NDArray[np.generic] | None]) -> NDArray[np.generic] | None:
    present = [array for array in arrays if array is not None]
    return np.concatenate(present) if present else None
