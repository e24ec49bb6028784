"""Grids: what is packed is what they stand for, and the search finds what trying everything finds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pard_onnx.models.precision import Format
from pard_onnx.quantize.algorithms.grid import (
    HQQ_NORM,
    SHRINKS,
    Grid,
    best_grid,
    highest_level,
    hqq,
    in_blocks,
    kquant,
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
        assert (found <= in_blocks(plain, fmt).sum(axis=-1) * (1 + 1e-4) + 1e-12).all()
    assert len(SHRINKS) > 10


@by_name
def test_searched_rounding_errs_less(fmt: Format) -> None:
    weight = np.random.default_rng(0).normal(size=(40, 256)).astype(np.float32)
    plain, found = (
        np.square(unpack(p, fmt) - weight).mean() for p in (pack(weight, fmt), round_by_search(weight, fmt))
    )
    assert found < plain * (0.98 if fmt.bits == 4 else 1)


def test_the_best_of_equals_is_the_first() -> None:
    fmt = FORMATS[0]
    blocks = np.zeros((1, 1, 16), np.float32)
    first, second = (Grid(fmt, np.full((1, 1), scale, np.float32), np.full((1, 1), 8.0)) for scale in (1, 2))
    assert best_grid(blocks, [first, second]).scale == 1


@pytest.mark.parametrize("fmt", WITH_ZERO, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("algorithm", (kquant, hqq))
def test_zero_point_algorithms_pack_what_they_mean(fmt: Format, algorithm) -> None:
    """Zero points, finite scales, and the weights up to rounding; constant blocks too."""
    weight = random()
    packed = algorithm(weight, fmt)
    assert packed.zero_point is not None and np.isfinite(packed.scale).all()
    error = np.linalg.norm(unpack(packed, fmt) - weight, axis=1)
    assert (error <= 0.12 * np.linalg.norm(weight, axis=1)).all()
    np.testing.assert_allclose(unpack(packed, fmt)[3], 0.25, rtol=0.1)


def test_each_algorithm_is_best_at_what_it_minimizes() -> None:
    fmt = Format("nbits", 4, 32, symmetric=False)
    weight = (np.random.default_rng(0).standard_t(3, size=(60, 256)) * 0.02).astype(np.float32)  # heavy tails
    off = {f.__name__: np.abs(unpack(f(weight, fmt), fmt) - weight) for f in (pack, kquant, hqq, round_by_search)}
    squares, norms = ({name: np.power(o, p).sum() for name, o in off.items()} for p in (2, HQQ_NORM))
    assert squares["round_by_search"] < squares["kquant"] < squares["pack"]
    assert norms["hqq"] <= norms["pack"]


@pytest.mark.parametrize("algorithm", (round_by_search, kquant, hqq))
def test_rows_are_rounded_on_their_own(algorithm) -> None:
    """So that blocks of rows may be packed one after the other."""
    fmt = WITH_ZERO[0]
    weight = random()
    whole, part = algorithm(weight, fmt), algorithm(weight[2:5].copy(), fmt)
    for name in ("weight", "scale", "zero_point"):
        np.testing.assert_array_equal(getattr(whole, name)[2:5], getattr(part, name))
