"""The kernels of every instruction set against numpy, and against one another bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import literal_matmul as literal
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ZEROS: dict[str, dict[str, bool]] = {"middle": {}, "points": {"zero_points": True}, "minimums": {"minimums": True}}
FORMATS = [(bits, block, zeros) for bits in (4, 8) for block in (32, 64, 128) for zeros in ("middle", "points")]
FORMATS += [(4, block, "minimums") for block in (32, 64, 128)]
ROUNDING = 1e-5  # of the sum of magnitudes: float32, a few hundred additions


def activations(rng: np.random.Generator, rows: int, k: int) -> literal.Floats:
    return (rng.standard_normal((rows, k)) * rng.choice([1e-3, 1, 50], (rows, 1))).astype(np.float32)


@pytest.mark.parametrize(("bits", "block", "zeros"), FORMATS)
def test_every_instruction_set_is_literal(native: Any, isas: list[str], bits: int, block: int, zeros: str) -> None:
    rng = np.random.default_rng(block + bits)
    for rows, n, blocks in [(1, 16, 1), (1, 64, 2), (5, 37, 3), (9, 130, 2), (13, 5, 4), (30, 96, 2)]:
        matrix = literal.random_matrix(rng, n, blocks * block, bits, block, bias=n % 2 == 1, **ZEROS[zeros])
        x = activations(rng, rows, matrix.k)
        expected = literal.matmul(matrix, x)
        reference = native.matmul("reference", matrix, x)
        assert (np.abs(reference - expected) <= ROUNDING * literal.magnitude(matrix, x)).all()
        for isa in isas:
            assert (native.matmul(isa, matrix, x) == reference).all(), isa


SHAPES = st.tuples(st.sampled_from(FORMATS), st.integers(1, 40), st.integers(1, 100), st.integers(1, 5))


@given(shape=SHAPES, bias=st.booleans(), seed=st.integers(0, 2**32 - 1), threads=st.integers(1, 4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fuzz(
    native: Any, isas: list[str], shape: tuple[Any, int, int, int], bias: bool, seed: int, threads: int
) -> None:
    (bits, block, zeros), rows, n, blocks = shape
    rng = np.random.default_rng(seed)
    matrix = literal.random_matrix(rng, n, blocks * block, bits, block, bias=bias, **ZEROS[zeros])
    x = activations(rng, rows, matrix.k)
    reference = native.matmul("reference", matrix, x)
    for isa in isas:
        assert (native.matmul(isa, matrix, x, threads) == reference).all(), isa


@pytest.mark.parametrize(("bits", "zeros"), [(4, "middle"), (4, "points"), (4, "minimums"), (8, "middle")])
def test_a_row_does_not_depend_on_its_neighbours_nor_on_threads(
    native: Any, isas: list[str], bits: int, zeros: str
) -> None:
    rng = np.random.default_rng(3)
    matrix = literal.random_matrix(rng, 330, 256, bits, 128, **ZEROS[zeros])
    x = activations(rng, 300, matrix.k)
    with native.packed(matrix) as handle:
        for isa in isas:
            rows = 40 if isa == "reference" else len(x)
            alone = np.concatenate([native.run(isa, handle, matrix.n, x[i : i + 1]) for i in range(rows)])
            for count in [*range(2, 27), 40, rows]:
                assert (native.run(isa, handle, matrix.n, x[:count]) == alone[:count]).all(), (isa, count)
            for threads in range(2, 9):
                assert (native.run(isa, handle, matrix.n, x[:rows], threads) == alone).all(), (isa, threads)
            for first in (1, 5, 17):
                assert (native.run(isa, handle, matrix.n, x[first : first + 9]) == alone[first : first + 9]).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_levels_do_not_overflow(native: Any, isas: list[str], bits: int) -> None:
    for byte in (0x00, 0xFF):
        levels = np.full((16, 2, 128 * bits // 8), byte, np.uint8)
        matrix = literal.Matrix(bits, 128, levels, np.ones((16, 2), np.float32))
        for sign in (1, -1):
            x = np.full((3, 256), sign, np.float32)
            expected = literal.matmul(matrix, x)
            for isa in isas:
                assert np.allclose(native.matmul(isa, matrix, x), expected, rtol=1e-6), isa


def test_extreme_activations(native: Any, isas: list[str]) -> None:
    """Zeros and numbers too small for a scale count as zeros; a row with an infinity or NaN is NaN, and only it."""
    rng = np.random.default_rng(5)
    matrix = literal.random_matrix(rng, 20, 256, 4, 128)
    x = activations(rng, 7, 256)
    x[0], x[1], x[2] = 0, 1e-40, -1e-37
    x[3, 200], x[4, 3], x[5, 77] = np.inf, -np.inf, np.nan
    for isa in isas:
        out = native.matmul(isa, matrix, x)
        assert (out[:3] == 0).all()
        assert np.isnan(out[3:6]).all()
        assert (out[6] == native.matmul(isa, matrix, x[6:])).all()
        assert np.isfinite(native.matmul(isa, matrix, np.full((1, 256), 3e36, np.float32))).all()


def test_packing_is_the_same_on_every_number_of_threads_and_takes_no_more_than_the_weights(native: Any) -> None:
    rng = np.random.default_rng(6)
    for bits, block, zeros in FORMATS:
        matrix = literal.random_matrix(rng, 1600, 512, bits, block, bias=True, **ZEROS[zeros])
        x = activations(rng, 2, 512)
        expected = native.matmul("reference", matrix, x)
        tensors = (matrix.levels, matrix.scales, matrix.zero_points, matrix.bias, matrix.minimums)
        arrays = [a for a in tensors if a is not None]
        for threads in (1, 3, 8):
            with native.packed(matrix, threads) as handle:
                assert (native.run("reference", handle, matrix.n, x) == expected).all()
                assert native.bytes(handle) <= 1.1 * sum(a.nbytes for a in arrays)


@pytest.mark.parametrize(
    ("bits", "block", "zeros"), [(4, 128, "middle"), (4, 32, "points"), (4, 32, "minimums"), (8, 64, "middle")]
)
def test_gated(native: Any, isas: list[str], bits: int, block: int, zeros: str) -> None:
    """silu(x * gate) * (x * up), for any number of rows and threads."""
    rng = np.random.default_rng(7)
    first, second = (literal.random_matrix(rng, 112, 2 * block, bits, block, **ZEROS[zeros]) for _ in range(2))
    x = activations(rng, 30, first.k)
    gates, ups = native.matmul("reference", first, x).astype(np.float64), native.matmul("reference", second, x)
    with np.errstate(over="ignore"):
        expected = gates / (1 + np.exp(-gates)) * ups
    with native.packed(first, up=second) as handle:
        reference = native.run("reference", handle, 112, x)
        assert np.allclose(reference, expected, rtol=1e-6, atol=1e-30)
        for isa in isas:
            for rows in (1, 2, 9, 13, 30):
                for threads in (1, 4):
                    out = native.run(isa, handle, 112, x[:rows], threads)
                    assert (out == reference[:rows]).all(), (isa, rows)


def test_gated_extremes(native: Any, isas: list[str]) -> None:
    """Gates of -400 to 400 and of NaN: silu ends in 0 and in x itself, and loses no NaN."""
    one = np.full((16, 1, 64), 0x99, np.uint8)  # levels of 1 above the zero point
    gate = literal.Matrix(4, 128, one, np.full((16, 1), 1 / 128, np.float32))
    x = np.repeat(np.linspace(-400, 400, 41, dtype=np.float32)[:, None], 128, axis=1)
    x = np.concatenate([x, np.full((1, 128), np.nan, np.float32)])
    value = x[:, :1].astype(np.float64)
    with np.errstate(over="ignore"):
        expected = np.broadcast_to(value / (1 + np.exp(-value)) * value, (42, 16))
    with native.packed(gate, up=gate) as handle:
        for isa in isas:
            out = native.run(isa, handle, 16, x)
            assert np.allclose(out, expected, rtol=1e-5, atol=1e-30, equal_nan=True), isa


def test_gated_tails_are_refused(native: Any) -> None:
    matrix = literal.random_matrix(np.random.default_rng(0), 24, 128, 4, 128)
    with pytest.raises(ValueError, match="N 24 is no multiple of 16"):
        native.pack(matrix, up=matrix)


def test_minimums_with_zero_points_or_other_bits_are_refused(native: Any) -> None:
    rng = np.random.default_rng(0)
    zeros = literal.random_matrix(rng, 16, 128, 4, 32, zero_points=True).zero_points
    matrix = literal.random_matrix(rng, 16, 128, 4, 32, minimums=True)
    with pytest.raises(ValueError, match="minimums are for 4 bits without zero points"):
        native.pack(replace(matrix, zero_points=zeros))
    with pytest.raises(ValueError, match="minimums are for 4 bits"):
        native.pack(literal.random_matrix(rng, 16, 128, 8, 32, minimums=True))


def test_no_rows(native: Any, isas: list[str]) -> None:
    matrix = literal.random_matrix(np.random.default_rng(0), 16, 128, 4, 128)
    for isa in isas:
        assert native.matmul(isa, matrix, np.zeros((0, 128), np.float32)).shape == (0, 16)


@pytest.mark.parametrize(
    ("bits", "block", "n", "k", "words"),
    [
        (3, 32, 16, 64, "bits 3, not 4 or 8"),
        (4, 16, 16, 64, "block_size 16, not 32, 64 or 128"),
        (4, 128, 16, 192, "K 192 is no multiple of block_size 128"),
        (4, 32, 16, 0, "K 0 is no multiple"),
        (4, 32, 0, 64, "N is 0"),
    ],
)
def test_refused(native: Any, bits: int, block: int, n: int, k: int, words: str) -> None:
    matrix = literal.Matrix(bits, block, np.zeros((n, 1, 64), np.uint8), np.zeros((n, 1), np.float32))
    with pytest.raises(ValueError, match=words):
        native.pack(matrix, k=k)
