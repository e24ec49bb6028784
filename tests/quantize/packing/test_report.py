"""Weight errors against a direct computation."""

import numpy as np
import pytest

from pard_onnx.models.precision import DYNAMIC_INT8, FLOAT16, FLOAT32, INT4, INT8, Format
from pard_onnx.quantize.packing.pack import pack, unpack
from pard_onnx.quantize.packing.report import Error

FORMATS = [FLOAT16, INT8, INT4, DYNAMIC_INT8, Format("nbits", 4, 32, symmetric=False)]


@pytest.fixture
def weight():
    return np.random.default_rng(0).normal(0, 0.02, (40, 256)).astype(np.float32)


def direct(weight, fmt):
    difference = unpack(pack(weight, fmt), fmt).astype(np.float64) - weight
    return np.sqrt(np.mean(difference**2) / np.mean(weight.astype(np.float64) ** 2))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_the_relative_error_is_the_direct_one(weight, fmt):
    before = weight.copy()
    error = Error.of(weight, pack(weight, fmt), fmt)
    assert error.relative == pytest.approx(direct(weight, fmt), rel=1e-4)
    assert error.weight_squared == pytest.approx(np.sum(weight.astype(np.float64) ** 2), rel=1e-4)
    np.testing.assert_array_equal(before, weight)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_blocks_of_rows_add_up(weight, fmt):
    total = Error()
    for rows in (weight[:7], weight[7:30] * 5, weight[30:] * 0):
        total.add(Error.of(rows, pack(rows, fmt), fmt))
    scaled = np.concatenate([weight[:7], weight[7:30] * 5, weight[30:] * 0])
    assert total.relative == pytest.approx(direct(scaled, fmt), rel=1e-4)


def test_fewer_bits_err_more(weight):
    errors = [Error.of(weight, pack(weight, fmt), fmt).relative for fmt in (FLOAT16, INT8, INT4)]
    assert errors == sorted(errors)
    assert errors[2] > 10 * errors[1] > 100 * errors[0] / 10 > 0


def test_float32_has_no_error_and_dilutes_that_of_others(weight):
    total = Error.of(weight, pack(weight, FLOAT32), FLOAT32)
    assert total.relative == 0
    total.add(Error.of(weight, pack(weight, INT4), INT4))
    assert total.relative == pytest.approx(direct(weight, INT4) / np.sqrt(2), rel=1e-4)


def test_no_weights_have_no_error():
    assert Error().relative == 0
    zeros = np.zeros((2, 128), dtype=np.float32)
    assert Error.of(zeros, pack(zeros, INT4), INT4).relative == 0
