"""Tensors of a checkpoint as a LoRA adapter changes them, computed a block of rows at a time.

The arithmetic is peft's (`PeftModel.merge_and_unload`): products of adapter weights in float32, and a sum that is
rounded to the type in which the checkpoint stores the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .tensors import DTYPES, Tensor, encoded, read_tensor

Floats = NDArray[np.float32]


class Change(Protocol):
    """What an adapter does to a tensor."""

    def apply(self, block: Floats, first: int, dtype: str) -> Floats:
        """The changed rows. block: rows first, first + 1, ... before the change; dtype: in which they are stored."""
        ...


@dataclass(frozen=True, slots=True)
class Product:
    """Adds B A * scaling to a matrix [out, in]."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scaling: float

    def apply(self, block: Floats, first: int, dtype: str) -> Floats:
        b = read_tensor(self.b, slice(first, first + len(block)))
        found: Floats = block + b @ read_tensor(self.a) * np.float32(self.scaling)
        return found


@dataclass(frozen=True, slots=True)
class EmbeddingProduct:
    """Adds (B A)^T * scaling to an embedding [rows, hidden]; the product is rounded before it is added."""

    a: Tensor  # [r, rows]
    b: Tensor  # [hidden, r]
    scaling: float

    def apply(self, block: Floats, first: int, dtype: str) -> Floats:
        a = read_tensor(self.a)[:, first : first + len(block)]
        product = (read_tensor(self.b) @ a).T * np.float32(self.scaling)
        found: Floats = block + rounded_to(product, dtype)
        return found


@dataclass(frozen=True, slots=True)
class BiasSum:
    """Adds a vector * scaling to a bias."""

    bias: Tensor
    scaling: float

    def apply(self, block: Floats, first: int, dtype: str) -> Floats:
        found: Floats = block + read_tensor(self.bias, slice(first, first + len(block))) * np.float32(self.scaling)
        return found


@dataclass(frozen=True, slots=True)
class NewRows:
    """Replaces some rows of an embedding."""

    ids: tuple[int, ...]
    rows: Tensor  # [ids, hidden]

    def apply(self, block: Floats, first: int, dtype: str) -> Floats:
        found, new = block.copy(), read_tensor(self.rows)
        for place, row in enumerate(self.ids):
            if first <= row < first + len(block):
                found[row - first] = new[place]
        return found


@dataclass(frozen=True, slots=True)
class ChangedTensor:
    """A tensor of the checkpoint with a change. dtype: safetensors' name of the base's floats, which stay."""

    base: Tensor
    change: Change
    file: Path  # the adapter's, for errors

    @property
    def dtype(self) -> str:
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self, first: int, stop: int) -> NDArray[Any]:
        return encoded(self.change.apply(read_tensor(self.base, slice(first, stop)), first, self.dtype), self.dtype)

    def changed(self, block: Floats, first: int) -> Floats:
        """Rows first, first + 1, ... of the base, which the caller has read, with the change."""
        return rounded_to(self.change.apply(block, first, self.dtype), self.dtype)


@dataclass(frozen=True, slots=True)
class ReplacedTensor:
    """A tensor of the adapter in the place of one of the checkpoint, in the type in which that one is stored."""

    new: Tensor
    dtype: str
    file: Path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.new.shape

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self, first: int, stop: int) -> NDArray[Any]:
        return encoded(read_tensor(self.new, slice(first, stop)), self.dtype)


def rounded_to(values: Floats, dtype: str) -> Floats:
    """The nearest numbers of a type of floats, as float32."""
    stored = encoded(values, dtype)
    return (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else stored.astype(np.float32)
