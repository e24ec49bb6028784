"""Attention of every instruction set against numpy, and against one another bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import literal_attention as literal
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROUNDING = 1e-5  # of the weighted magnitudes
Results = tuple[literal.Floats, literal.Floats, literal.Floats]


def same(a: Results, b: Results) -> bool:
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def require_literal(step: literal.Step, results: Results) -> None:
    out, magnitude, keys, values = literal.attention(step)
    assert (np.abs(results[0] - out) <= ROUNDING * magnitude).all()
    np.testing.assert_allclose(results[1], keys, rtol=0, atol=1e-6)  # NaN where nothing was written
    np.testing.assert_array_equal(results[2], values.astype(np.float32))


def one_by_one(native: Any, isa: str, step: literal.Step) -> Results:
    """Every row in a step of its own."""
    outs, keys, values = [], step.key_cache, step.value_cache
    for row in range(step.rows):
        out, keys, values = native.attention(isa, step.part(row, row + 1, keys, values))
        outs.append(out)
    return np.concatenate(outs), keys, values


SHAPES = [
    (1, 0, 2, 1, 16),
    (1, 63, 6, 2, 32),
    (3, 64, 4, 4, 64),
    (9, 250, 14, 2, 64),
    (16, 300, 12, 2, 128),
    (70, 5, 8, 1, 96),
]


@pytest.mark.parametrize(("rows", "past", "heads", "kv_heads", "dim"), SHAPES)
def test_every_instruction_set_is_literal(
    native: Any, isas: list[str], rows: int, past: int, heads: int, kv_heads: int, dim: int
) -> None:
    step = literal.random_step(np.random.default_rng(rows), rows, past, heads, kv_heads, dim, spare=7)
    reference = native.attention("reference", step)
    require_literal(step, reference)
    for isa in isas:
        assert same(native.attention(isa, step), reference), isa


CASES = st.tuples(st.integers(1, 40), st.integers(0, 200), st.integers(1, 8), st.integers(1, 3), st.integers(1, 8))


@given(case=CASES, spare=st.integers(0, 70), seed=st.integers(0, 2**32 - 1), threads=st.integers(1, 8))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fuzz(
    native: Any, isas: list[str], case: tuple[int, int, int, int, int], spare: int, seed: int, threads: int
) -> None:
    rows, past, group, kv_heads, sixteens = case
    step = literal.random_step(
        np.random.default_rng(seed), rows, past, group * kv_heads, kv_heads, 16 * sixteens, spare
    )
    results = native.attention(isas[0], step, threads)
    require_literal(step, results)
    for isa in isas[1:]:
        assert same(native.attention(isa, step), results), isa


@pytest.mark.parametrize(("past", "heads", "kv_heads", "dim"), [(0, 12, 2, 32), (50, 7, 1, 64), (61, 4, 4, 16)])
def test_a_row_does_not_depend_on_its_neighbours_nor_on_threads(
    native: Any, isas: list[str], past: int, heads: int, kv_heads: int, dim: int
) -> None:
    """Nor on what lies behind it: rows that were rolled back hold other numbers, and NaN."""
    step = literal.random_step(np.random.default_rng(past), 150, past, heads, kv_heads, dim)
    for isa in isas:
        rows = 20 if isa == "reference" else step.rows
        whole = step.part(0, rows, step.key_cache, step.value_cache)
        alone = one_by_one(native, isa, whole)
        for threads in range(1, 9):
            assert same(native.attention(isa, whole, threads), alone), (isa, threads)
        for first in (1, 8, 13):
            for count in (2, 5, rows - first):
                keys, values = (cache.copy() for cache in alone[1:])
                part = step.part(first, first + count, keys, values)
                keys[:, part.past + count :] = np.nan
                out, *_ = native.attention(isa, part, 2)
                assert out.tobytes() == alone[0][first : first + count].tobytes(), (isa, first, count)


def test_long_contexts_stay_accurate(native: Any, isas: list[str]) -> None:
    step = literal.random_step(np.random.default_rng(1), 3, 4000, 4, 2, 64)
    require_literal(step, native.attention(isas[0], step, 2))


def test_extreme_scores(native: Any, isas: list[str]) -> None:
    """Weights that all but vanish, and one key that outweighs all others from its block on."""
    step = literal.random_step(np.random.default_rng(2), 4, 200, 2, 1, 32)
    for factor in (1e-30, 300, 1e15):
        steep = replace(step, queries=step.queries * np.float32(factor), scale=1.0)
        results = native.attention(isas[0], steep)
        require_literal(steep, results)
        for isa in isas:
            assert same(native.attention(isa, steep), results), isa


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_stays_in_the_rows_that_see_it(native: Any, isas: list[str], value: float) -> None:
    """There results are NaN where the literal ones are; rows that do not see it are as ever."""
    step = literal.random_step(np.random.default_rng(3), 9, 60, 4, 2, 32)
    clean, *_ = native.attention(isas[0], step)
    for name in ("keys", "values", "queries"):
        array = getattr(step, name).copy()
        array[5, 0, 3] = value
        damaged = replace(step, **{name: array})
        with np.errstate(invalid="ignore"):
            expected, *_ = literal.attention(damaged)
        for isa in isas:
            out, *_ = native.attention(isa, damaged, 2)
            np.testing.assert_array_equal(np.isfinite(out), np.isfinite(expected))
            assert (out[:5] == clean[:5]).all() and (out[:, 2:] == clean[:, 2:]).all(), (isa, name)
            assert not np.isfinite(out[5, 0]).all()


def test_partial_rotation(native: Any, isas: list[str]) -> None:
    """Rotary tables narrower than half a head leave the rest of it as it is."""
    step = literal.random_step(np.random.default_rng(4), 3, 20, 4, 2, 64)
    step = replace(step, cosines=step.cosines[:, :8].copy(), sines=step.sines[:, :8].copy())
    for isa in isas:
        require_literal(step, native.attention(isa, step))


def test_no_rows(native: Any, isas: list[str]) -> None:
    step = literal.random_step(np.random.default_rng(5), 1, 20, 4, 2, 64)
    assert native.attention(isas[0], step.part(0, 0, step.key_cache, step.value_cache))[0].shape == (0, 4, 64)
