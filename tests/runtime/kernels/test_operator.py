"""pard_onnx::MatMulNBits in ONNX Runtime: equal to com.microsoft's, and refusing what it does not have."""

from __future__ import annotations

from typing import Any

import literal_matmul as literal
import numpy as np
import pytest
from one_node import matmul_model as model
from one_node import session

from pard_onnx.runtime import kernels

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="the kernels are not built")
ROUNDING = 1e-5  # of the sum of magnitudes


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_equals_onnxruntimes(bits: int, block: int, zeros: bool) -> None:
    rng = np.random.default_rng(bits * block)
    matrix = literal.random_matrix(rng, 70, 3 * block, bits, block, zeros, bias=True)
    ours, theirs = (session(model(matrix, domain)) for domain in ("pard_onnx", "com.microsoft"))
    for batch, rows in [(1, 1), (1, 2), (1, 9), (2, 3), (1, 70)]:
        x = rng.standard_normal((batch, rows, matrix.k)).astype(np.float32)
        (out,), (expected,) = ours.run(None, {"A": x}), theirs.run(None, {"A": x})
        assert out.shape == expected.shape
        magnitude = literal.magnitude(matrix, x.reshape(-1, matrix.k)).reshape(expected.shape)
        assert (np.abs(out - expected) <= ROUNDING * magnitude).all()


def test_extreme_activations_end_as_in_onnxruntime() -> None:
    """But for NaN, which ONNX Runtime loses: there a row with one is a row of ordinary numbers."""
    rng = np.random.default_rng(1)
    matrix = literal.random_matrix(rng, 32, 256, 4, 128)
    ours, theirs = (session(model(matrix, domain)) for domain in ("pard_onnx", "com.microsoft"))
    for value in (np.inf, -np.inf, 0, 1e-40, -1e-45, 1e30):
        x = rng.standard_normal((1, 2, 256)).astype(np.float32)
        x[0, 0] = x[0, 0] * 1e-42 if abs(value) < 1e-30 else x[0, 0]
        x[0, 0, 7] = value
        (out,), (expected,) = ours.run(None, {"A": x}), theirs.run(None, {"A": x})
        assert (np.isnan(out) == np.isnan(expected)).all()
        assert np.allclose(out, expected, rtol=1e-3, equal_nan=True)
    x[0, 0, 7] = np.nan
    (out,) = ours.run(None, {"A": x})
    assert np.isnan(out[0, 0]).all() and np.isfinite(out[0, 1]).all()


def test_rows_are_the_same_for_every_number_of_rows_and_threads() -> None:
    rng = np.random.default_rng(2)
    matrix = literal.random_matrix(rng, 500, 512, 4, 128)
    x = rng.standard_normal((1, 33, 512)).astype(np.float32)
    (expected,) = session(model(matrix, "pard_onnx"), 1).run(None, {"A": x})
    for threads in range(1, 9):
        opened = session(model(matrix, "pard_onnx"), threads)
        for rows in (1, 2, 5, 9, 16, 33):
            (out,) = opened.run(None, {"A": x[:, :rows]})
            assert (out == expected[:, :rows]).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_size": 48}, "block_size 48"),
        ({"bits": 2}, "bits 2"),
        ({"K": 200}, "K 200 is no multiple"),
        ({"K": -128}, "MatMulNBits: K -128"),
        ({"N": 0}, "N 0"),
        ({"N": 15}, "B is of another size"),
        ({"K": None}, "K"),
    ],
)
def test_refused(changes: dict[str, Any], words: str) -> None:
    matrix = literal.random_matrix(np.random.default_rng(0), 16, 256, 4, 128)
    with pytest.raises(Exception, match=words):
        session(model(matrix, "pard_onnx", **changes))


def test_refused_activations() -> None:
    matrix = literal.random_matrix(np.random.default_rng(0), 16, 256, 4, 128)
    with pytest.raises(Exception, match="last dimension is not K 256"):
        session(model(matrix, "pard_onnx")).run(None, {"A": np.zeros((1, 2, 128), np.float32)})


def test_an_empty_step() -> None:
    matrix = literal.random_matrix(np.random.default_rng(0), 16, 256, 4, 128)
    (out,) = session(model(matrix, "pard_onnx")).run(None, {"A": np.zeros((1, 0, 256), np.float32)})
    assert out.shape == (1, 0, 16)
