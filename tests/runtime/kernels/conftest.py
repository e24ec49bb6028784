"""The native library, called without a session."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from literal_attention import Step
from literal_matmul import Floats, Matrix

from pard_onnx.runtime import kernels

Pointer = ctypes.c_void_p
Size = ctypes.c_size_t


class AttentionStep(ctypes.Structure):
    """Of attention.h."""

    _fields_ = [
        *((name, Size) for name in ("heads", "kv_heads", "dim", "rows", "past")),
        *((name, Pointer) for name in ("queries", "keys", "values")),
        *((name, Size) for name in ("query_stride", "kv_stride")),
        *((name, Pointer) for name in ("cosines", "sines")),
        ("half", Size),
        ("scale", ctypes.c_float),
        *((name, Pointer) for name in ("key_cache", "value_cache")),
        ("capacity", Size),
        ("out", Pointer),
        ("window", Size),
    ]


class Native:
    """pard_pack, pard_matmul and pard_attention of testing.cpp."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.pard_pack.argtypes = [ctypes.c_int, Size, Size, Size, *[Pointer] * 3, Size, ctypes.c_char_p, Size]
        library.pard_pack.restype = Pointer
        library.pard_matmul.argtypes = [ctypes.c_char_p, Pointer, Pointer, Size, Pointer, Size]
        library.pard_packed_bytes.argtypes, library.pard_packed_bytes.restype = [Pointer], Size
        library.pard_free.argtypes = [Pointer]
        library.pard_attention.argtypes = [ctypes.c_char_p, Pointer, Size]

    def pack(self, matrix: Matrix, threads: int = 1, k: int | None = None, up: Matrix | None = None) -> int:
        """A handle to free; ValueError with the library's words where it refuses. up: `matrix` is its gate."""
        error = ctypes.create_string_buffer(200)
        shape = (matrix.n, matrix.k if k is None else k)
        bias = None if matrix.bias is None else matrix.bias.ctypes.data
        tensors = (_tensors(matrix), None if up is None else _tensors(up), bias)
        handle: int | None = self.library.pard_pack(matrix.bits, matrix.block, *shape, *tensors, threads, error, 200)
        if handle is None:
            raise ValueError(error.value.decode())
        return handle

    @contextmanager
    def packed(self, matrix: Matrix, threads: int = 1, up: Matrix | None = None) -> Iterator[int]:
        handle = self.pack(matrix, threads, up=up)
        try:
            yield handle
        finally:
            self.library.pard_free(handle)

    def bytes(self, handle: int) -> int:
        size: int = self.library.pard_packed_bytes(handle)
        return size

    def run(self, isa: str, handle: int, n: int, x: Floats, threads: int = 1) -> Floats:
        out = np.full((len(x), n), np.nan, np.float32)
        assert self.library.pard_matmul(isa.encode(), handle, x.ctypes.data, len(x), out.ctypes.data, threads)
        return out

    def matmul(self, isa: str, matrix: Matrix, x: Floats, threads: int = 1) -> Floats:
        with self.packed(matrix) as handle:
            return self.run(isa, handle, matrix.n, x, threads)

    def attention(self, isa: str, step: Step, threads: int = 1) -> tuple[Floats, Floats, Floats]:
        """[rows, heads, dim], and the caches afterwards."""
        rows, heads, dim = step.queries.shape
        kv_heads, capacity, _ = step.key_cache.shape
        out = np.full((rows, heads, dim), np.nan, np.float32)
        caches = step.key_cache.copy(), step.value_cache.copy()
        arrays = (step.queries, step.keys, step.values, step.cosines, step.sines, *caches, out)
        assert all(array.flags.c_contiguous and array.dtype == np.float32 for array in arrays)
        at = [array.ctypes.data for array in arrays]
        strides = (heads * dim, kv_heads * dim)
        shape, half = (heads, kv_heads, dim, rows, step.past), step.cosines.shape[1]
        described = AttentionStep(
            *shape, *at[:3], *strides, *at[3:5], half, step.scale, *at[5:7], capacity, at[7], step.window
        )
        assert self.library.pard_attention(isa.encode(), ctypes.byref(described), threads)
        return out, *caches


def _tensors(matrix: Matrix) -> ctypes.Array[ctypes.c_void_p]:
    arrays = [matrix.levels, matrix.scales, matrix.zero_points, matrix.minimums]
    return (Pointer * 4)(*[None if array is None else array.ctypes.data for array in arrays])


@pytest.fixture(scope="session")
def native() -> Native:
    library = kernels.load()
    if library is None:
        pytest.skip("the kernels are not built")
    return Native(library)


@pytest.fixture(scope="session")
def isas(native: Native) -> list[str]:
    """Those of this processor."""
    found = [name for name in kernels.ISAS if native.library.pard_select_isa(name.encode())]
    native.library.pard_select_isa(None)
    return found


@pytest.fixture
def kernel_variable(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    def set_variable(value: str | None) -> None:
        if value is None:
            monkeypatch.delenv(kernels.VARIABLE, raising=False)
        else:
            monkeypatch.setenv(kernels.VARIABLE, value)

    return set_variable
