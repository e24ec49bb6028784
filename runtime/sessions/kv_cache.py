"""The KV cache of one conversation in one model: buffers of fixed size, rolled back by changing a number."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.errors import BadArtifact, Failure
from pard_onnx.models.manifest import Manifest
from pard_onnx.runtime.providers.table import onnxruntime

KvRows = NDArray[Any]


class KvCache:
    """A KV cache in the host's memory. The system assigns the memory when rows are written for the first time."""

    can_be_copied = True  # whether copying rows takes less time than computing them

    def __init__(self, manifest: Manifest) -> None:
        spec = manifest.spec
        self._shape = (1, spec.kv_heads, manifest.kv_rows, spec.head_dim)
        self._type = np.dtype(manifest.kv_dtype)
        self.rows = manifest.token_rows  # the most tokens that the cache holds
        self.length = 0  # the number of tokens that it holds
        self._longest = 0  # the most that it has held at a time that it was rolled back
        self._names = [f"{layer}.{part}" for layer in range(spec.layers) for part in ("key", "value")]
        self._allocate()

    def _allocate(self) -> None:
        try:
            self._arrays = lazy_zeros(len(self._names), self._shape, self._type)
        except (MemoryError, OSError) as error:
            size = len(self._names) * prod(self._shape) * self._type.itemsize
            raise Failure(
                f"no memory for the KV cache of {size >> 20} MiB ({self._shape[2]} rows); export the model "
                "with a smaller --context-length"
            ) from error
        wrap = onnxruntime().OrtValue.ortvalue_from_numpy
        self._values = [wrap(array) for array in self._arrays]

    def bind(self, binding: Any) -> None:
        """Bind the buffers to a graph: past and present of each layer are one buffer, which is updated in place."""
        for name, value in zip(self._names, self._values, strict=True):
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)

    def run(self, session: Any, binding: Any) -> None:
        """Run a graph once, to which the cache is bound."""
        session.run_with_iobinding(binding)

    def rollback(self, length: int) -> None:
        """Forget the rows from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"a cache of {self.length} tokens cannot be rolled back to {length}")
        if self.length > self._longest:
            self._longest = self.length
        self.length = length

    @property
    def bytes(self) -> int:
        """The memory that the cache takes: of the rows that were ever written. Windows takes the memory of all rows."""
        _, heads, rows, size = self._shape
        written = rows if sys.platform == "win32" else max(self._longest, self.length)
        return len(self._names) * heads * written * size * self._type.itemsize

    def set_length(self, length: int) -> None:
        """Set the number of tokens without writing their rows, to measure what steps cost."""
        if not 0 <= length <= self.rows:
            raise ValueError(f"a cache of {self.rows} rows cannot hold {length} tokens")
        self.length = length

    def read(self, first: int, last: int) -> KvRows:
        """A copy of rows first .. last - 1, [2 * layers, kv_heads, last - first, head_dim]."""
        return np.stack([array[0, :, first:last] for array in self._arrays])

    def copy_rows(self, other: KvCache, count: int) -> None:
        """Replace the content by the first `count` rows of another cache of the same model."""
        for array, part in zip(self._arrays, other._arrays, strict=True):
            array[0, :, :count] = part[0, :, :count]
        self.length = count

    def write(self, rows: Sequence[KvRows] | KvRows) -> None:
        """Replace the content by these rows, which `read(0, n)` returned; BadArtifact if they are another model's."""
        block = self._checked(rows)
        for array, part in zip(self._arrays, block, strict=True):
            array[0, :, : part.shape[1]] = part
        self.length = block.shape[2]

    def _checked(self, rows: Sequence[KvRows] | KvRows) -> KvRows:
        block = np.asarray(rows)
        wanted = (len(self._names), self._shape[1], block.shape[2] if block.ndim == 4 else 0, self._shape[3])
        if block.shape != wanted or block.dtype != self._type or block.shape[2] > self.rows:
            raise BadArtifact(f"KV rows of shape {block.shape} and type {block.dtype} do not fit this model's cache")
        return block


def lazy_zeros(count: int, shape: tuple[int, ...], type_: np.dtype[Any]) -> list[KvRows]:
    """So many arrays of zeros, whose memory the system assigns page by page as rows are written, and has back at once
    when the arrays are gone.

    np.zeros does neither: it asks for huge pages, so that one row takes the memory of thousands, and it gets memory of
    freed arrays, which malloc clears by writing to all of it. Windows, which assigns all memory at once, has no such
    mapping.
    """
    if sys.platform == "win32":
        return [np.zeros(shape, type_) for _ in range(count)]
    size = prod(shape)
    stride = -(-size * type_.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
    region = mmap.mmap(-1, max(1, stride * count), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return [np.frombuffer(region, type_, size, stride * i).reshape(shape) for i in range(count)]
