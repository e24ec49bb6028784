"""Weights that are ready before the store asks, and the one place that says how each matrix is held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.precision import Format, Recipe

from .pack import Float, Packed
from .report import Error

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
Order = NDArray[np.int64]


class Prepared(Protocol):
    """Matrices packed by an algorithm that saw calibration text, or read packed from a quantized checkpoint.

    Names are the checkpoint's: of matrices without `.weight`, of vectors whole. A tied head is the embedding.
    """

    def format(self, name: str) -> Format | None:
        """How a matrix is held, with a block that divides its width; None: it is not, the store packs it itself."""

    def rows(self, name: str, rows: slice) -> Packed:
        """A block of rows of a matrix that is held. Called from several threads."""

    def error(self, name: str) -> Error:
        """The rounding error of a matrix that is held; Error() if nothing was rounded here."""

    def order(self, name: str) -> Order | None:
        """The input's columns in the order of a held matrix's own, [in], where that is not the checkpoint's."""

    def vector(self, name: str) -> Float | None:
        """What replaces the checkpoint's norm weight or bias; None: nothing."""


@dataclass(frozen=True, slots=True)
class Formats:
    """A recipe resolved: a prepared matrix has its own format, any other the recipe's.

    tied: lm_head reads the embedding's matrix, which is stored once, in the head's format; twice if its rows are wanted
    as floats, since the device cannot look them up in a packed matrix.
    """

    recipe: Recipe
    tied: bool
    prepared: Prepared | None = None

    def stored(self, name: str) -> str:
        """The name of the matrix that `name` reads."""
        return EMBEDDING if self.tied and name == HEAD else name

    def of(self, name: str) -> Format:
        if name == EMBEDDING and self.tied and self.twice:
            return self.recipe.of(EMBEDDING)
        stored = self.stored(name)
        held = self.prepared.format(stored) if self.prepared else None
        return held or self.recipe.of(HEAD if self.tied and stored == EMBEDDING else stored)

    @property
    def twice(self) -> bool:
        return self.recipe.of(EMBEDDING).plain and not self.recipe.of(HEAD).plain

    def order(self, name: str) -> Order | None:
        return self.prepared.order(self.stored(name)) if self.prepared else None

    def joinable(self, names: Sequence[str]) -> bool:
        """Whether the matrices, all of one input, can be one: one format, the columns in one order, and no scale of
        their product, which would be one for all of them."""
        orders = [self.order(name) for name in names]
        same = all(a is b if a is None or b is None else np.array_equal(a, b) for a, b in pairwise(orders))
        formats = {self.of(name) for name in names}
        return same and len(formats) == 1 and not any(fmt.activations for fmt in formats)

    @property
    def floats(self) -> np.dtype[np.generic]:
        """The type of activations, norms and biases."""
        return np.dtype(self.recipe.floats)
