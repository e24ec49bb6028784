"""GPTQ beside the same written out literally, and beside the original's inverse Hessian."""

import numpy as np
import torch

from pard_onnx.models.precision import Format
from pard_onnx.quantize.algorithms.gptq import DAMPING, GramFactor, gptq
from pard_onnx.quantize.algorithms.grid import Grid, search_grid
from pard_onnx.quantize.packing.pack import pack, unpack

SYMMETRIC, ZERO = Format("nbits", 4, 16), Format("nbits", 4, 32, symmetric=False)


def case(rows: int = 5, width: int = 288, tokens: int = 400, seed: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """Weights, and X X^T of correlated inputs of different sizes; one is never used. Wider than one part."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, width)) @ (np.eye(width) + 0.3 * rng.normal(size=(width, width)) / np.sqrt(width))
    x *= np.exp(rng.normal(size=width))
    x[:, 7] = 0
    weight = rng.normal(size=(rows, width)).astype(np.float32)
    return weight, torch.from_numpy((x.T @ x).astype(np.float32))


def nearest(grid: Grid, weight: float, row: int, block: int) -> float:
    scale, zero = float(grid.scale[row, block]), float(grid.zero[row, block])
    return (np.clip(np.rint(weight / scale + zero), 0, 15) - zero) * scale


def inverse_hessian(weight: np.ndarray, fmt: Format, gram: np.ndarray) -> np.ndarray:
    """As in the paper (algorithm 1, one column at a time): the inverse's Cholesky factor hands errors on."""
    squares = np.diag(gram).copy()
    grid = search_grid(weight, fmt, squares.astype(np.float32))
    order = np.argsort(squares, kind="stable")[::-1]
    damped = gram[np.ix_(order, order)].astype(np.float64) + DAMPING * squares.mean() * np.eye(len(gram))
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    rest, out = weight[:, order].astype(np.float64), np.empty(weight.shape)
    for k, column in enumerate(order):
        for row in range(len(weight)):
            out[row, column] = nearest(grid, rest[row, k], row, column // fmt.block)
        error = (rest[:, k] - out[:, column]) / upper[k, k]
        rest[:, k:] -= error[:, None] * upper[k, k:]
    return out


def output_error(weight: np.ndarray, rounded: np.ndarray, gram: torch.Tensor) -> float:
    off = (rounded - weight).astype(np.float64)
    return float(np.sum(off @ gram.numpy().astype(np.float64) * off))


def test_it_is_the_original_without_the_inverse() -> None:
    for fmt in (SYMMETRIC, ZERO):
        weight, gram = case()
        found = unpack(gptq(GramFactor.of(gram), weight, fmt), fmt)
        expected = inverse_hessian(weight, fmt, gram.numpy())
        agree = np.isclose(found, expected, atol=1e-5).mean()
        assert agree > 0.97  # float32 against float64: a tie that falls the other way changes what follows it
        assert output_error(weight, found, gram) < 1.02 * output_error(weight, expected, gram)


def test_outputs_err_far_less_than_by_rounding_to_nearest() -> None:
    weight, gram = case(rows=20)
    before = gram.clone()
    found = unpack(gptq(GramFactor.of(gram), weight, SYMMETRIC), SYMMETRIC)
    plain = unpack(pack(weight, SYMMETRIC), SYMMETRIC)
    assert output_error(weight, found, gram) < 0.6 * output_error(weight, plain, gram)
    torch.testing.assert_close(gram, before)  # it is read again for the report


def test_rows_are_rounded_on_their_own() -> None:
    weight, gram = case()
    factor = GramFactor.of(gram)
    whole, part = gptq(factor, weight, ZERO), gptq(factor, weight[1:3].copy(), ZERO)
    assert np.mean(whole.weight[1:3] == part.weight) > 0.99  # products of other shapes round a little differently
    np.testing.assert_array_equal(whole.scale[1:3], part.scale)


def test_inputs_that_the_text_never_used_are_rounded_to_nearest() -> None:
    weight, _ = case()
    found = unpack(gptq(GramFactor.of(torch.zeros(288, 288)), weight, ZERO), ZERO)
    grid = search_grid(weight, ZERO, np.zeros(288, np.float32))
    np.testing.assert_array_equal(found, unpack(grid.pack(grid.levels(weight)), ZERO))
