"""The memory of KV caches: that of the rows which were written, and none once a cache is gone."""

from __future__ import annotations

import gc
import mmap
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pard_onnx.runtime.sessions.kv_cache import lazy_zeros

psutil = pytest.importorskip("psutil")
only_posix = pytest.mark.skipif(not hasattr(mmap, "MAP_PRIVATE"), reason="the system assigns all memory at once")
MIB = 1 << 20
LAYERS = 24
# (1, heads, rows, head size): 512 KiB, which malloc takes from freed memory, and 4 MiB of huge pages
SHAPES = ((1, 2, 512, 128), (1, 2, 4096, 128))


def resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def with_one_row(shape: tuple[int, ...]) -> list[Any]:
    arrays = lazy_zeros(LAYERS, shape, np.dtype(np.float32))
    for array in arrays:
        array[:, :, 0] = 1
    return arrays


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5),
    st.tuples(st.just(1), st.integers(1, 3), st.integers(1, 3000), st.integers(1, 9)),
    st.sampled_from([np.float32, np.float16, np.int8]),
)
def test_the_arrays_are_zeros_of_their_own(count: int, shape: tuple[int, ...], type_: Any) -> None:
    arrays = lazy_zeros(count, shape, np.dtype(type_))
    assert [(array.shape, array.dtype) for array in arrays] == [(shape, type_)] * count
    assert not any(array.any() for array in arrays)
    for number, array in enumerate(arrays, 1):
        array[...] = number
    assert [(array.min(), array.max()) for array in arrays] == [(n, n) for n in range(1, count + 1)]


@only_posix
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_that_were_not_written_take_no_memory(shape: tuple[int, ...]) -> None:
    with_one_row(shape)
    before = resident()
    caches = [with_one_row(shape) for _ in range(10)]
    assert resident() - before < 10 * MIB  # 10 * 24 * 2 pages, where all rows are 120 or 960 MiB
    assert len(caches) == 10


@only_posix
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_goes_back_and_is_not_written_again(shape: tuple[int, ...]) -> None:
    with_one_row(shape)
    before = resident()
    for _ in range(3):
        caches = [lazy_zeros(LAYERS, shape, np.dtype(np.float32)) for _ in range(2)]
        for array in (one for cache in caches for one in cache):
            array[...] = 1
        del caches, array
        assert resident() - before < 8 * MIB
        short = [with_one_row(shape) for _ in range(2)]
        assert resident() - before < 8 * MIB
        del short
