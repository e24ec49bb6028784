"""Grids: what is packed is what they stand for, and the search finds what trying everything finds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pard_onnx.models.precision import Format
from pard_onnx.quantize.algorithms.grid import (
    SHRINKS,
    Grid,
    highest_level,
    in_blocks,
    round_by_importance,
    round_by_search,
    search_grid,
)
from pard_onnx.quantize.packing.pack import pack, unpack

FORMATS = [Format("nbits", bits, block, sym) for bits in (4, 8) for block in (16, 32) for sym in (True, False)]
by_name = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
WITH_ZERO = [fmt for fmt in FORMATS if not fmt.symmetric]


def random(rows: int = 7, width: int = 96, seed: int = 0) -> np.ndarray:
    """Blocks of ordinary, one-signed, constant, zero, tiny and lone values: what rows of true checkpoints hold."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(rows, width)) * rng.uniform(0.01, 3, (rows, 1))
    weight[1], weight[2], weight[3] = np.abs(weight[1]) + 0.5, 0, 0.25
    weight[4, :-1] = 0
    weight[5] *= 1e-30
    return weight.astype(np.float32)


def dequantized(grid: Grid, levels: np.ndarray) -> np.ndarray:
    """Literally: (level - zero) * scale, one weight after the other."""
    out = np.empty(levels.shape, np.float32)
    for (row, column), level in np.ndenumerate(levels):
        block = column // grid.format.block
        out[row, column] = (np.float32(level) - grid.zero[row, block]) * grid.scale[row, block]
    return out


@by_name
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000))
def test_packed_bytes_stand_for_the_levels(fmt: Format, seed: int) -> None:
    weight = random(seed=seed)
    grid = search_grid(weight, fmt)
    levels = grid.levels(weight)
    assert levels.max() <= highest_level(fmt)
    np.testing.assert_array_equal(unpack(grid.pack(levels), fmt), dequantized(grid, levels))


@by_name
def test_the_search_is_trying_everything(fmt: Format) -> None:
    """Per block no start that it tries is better, nor plain rounding; errors are counted as they are weighted."""
    weight = random()
    importance = np.random.default_rng(1).uniform(0.01, 10, weight.shape[1]).astype(np.float32)
    for counts in (None, importance):
        grid = search_grid(weight, fmt, counts)
        off = (dequantized(grid, grid.levels(weight)) - weight) ** 2 * (1 if counts is None else counts)
        found = in_blocks(off, fmt).sum(axis=-1)
        plain = (unpack(pack(weight, fmt), fmt) - weight) ** 2 * (1 if counts is None else counts)
        energy = in_blocks(weight**2 * (1 if counts is None else counts), fmt).sum(axis=-1)
        # Both scales are rounded to half precision afterwards, which has 11 bits
        assert (found <= in_blocks(plain, fmt).sum(axis=-1) * (1 + 1e-2) + energy * 2**-22).all()
    assert len(SHRINKS) > 10


@by_name
def test_searched_rounding_errs_less(fmt: Format) -> None:
    weight = np.random.default_rng(0).normal(size=(40, 256)).astype(np.float32)
    plain, found = (
        np.square(unpack(p, fmt) - weight).mean() for p in (pack(weight, fmt), round_by_search(weight, fmt))
    )
    assert found < plain * (0.98 if fmt.bits == 4 else 1)


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.bits == 4], ids=lambda fmt: fmt.name)
def test_importance_lowers_the_error_of_the_outputs(fmt: Format) -> None:
    """For inputs whose columns have these mean squares; a column that is never used keeps its weights roughly."""
    weight = np.random.default_rng(0).standard_t(5, size=(40, 256)).astype(np.float32)
    squares = np.exp(2 * np.random.default_rng(1).normal(size=256)).astype(np.float32)
    squares[7] = 0
    off = [
        (unpack(p, fmt) - weight) ** 2
        for p in (round_by_search(weight, fmt), round_by_importance(squares)(weight, fmt))
    ]
    plain, weighted = ((errors * squares).sum() for errors in off)
    assert weighted < plain
    assert np.sqrt(off[1][:, 7].mean()) < 0.3 * weight[:, 7].std()
    without = round_by_importance(np.zeros(256, np.float32))(weight, fmt)
    np.testing.assert_allclose(unpack(without, fmt), unpack(round_by_search(weight, fmt), fmt), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "algorithm", (round_by_search, round_by_importance(np.geomspace(0.1, 10, 96).astype(np.float32)))
)
def test_rows_are_rounded_on_their_own(algorithm) -> None:
    """So that blocks of rows may be packed one after the other."""
    fmt = WITH_ZERO[0]
    weight = random()
    whole, part = algorithm(weight, fmt), algorithm(weight[2:5].copy(), fmt)
    for name in ("weight", "scale", "zero_point"):
        np.testing.assert_array_equal(getattr(whole, name)[2:5], getattr(part, name))
