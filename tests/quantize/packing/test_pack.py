"""Packing one matrix: the values of its stored form, what ONNX Runtime's operators compute with it, and its error."""

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pard_onnx.models.errors import BadInput
from pard_onnx.models.precision import DYNAMIC_INT8, FLOAT16, FLOAT32, INT4, INT8, Format
from pard_onnx.quantize.packing.pack import PackedRows, RoundingError, format_for_width, pack, unpack

MICROSOFT = "com.microsoft"
NBITS = [
    Format("nbits", bits, block, symmetric) for bits in (4, 8) for block in (16, 32) for symmetric in (True, False)
]
by_name = pytest.mark.parametrize("fmt", NBITS, ids=lambda fmt: fmt.name)


@st.composite
def matrices(draw, most=1e30):
    """Rows [n, 32 or 96], each of its own kind and magnitude."""
    rows, width = draw(st.integers(1, 5)), draw(st.sampled_from([32, 96]))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    weight = np.empty((rows, width), dtype=np.float32)
    for row in weight:
        magnitude = draw(st.sampled_from([m for m in (1e-30, 1e-9, 0.02, 1.0, 300.0, 1e30) if m <= most]))
        kind = draw(st.sampled_from(["any", "zeros", "positive", "negative", "one", "outlier", "constant", "ends"]))
        values = rng.uniform(-1, 1, width)
        if kind == "zeros":
            values[:] = 0
        elif kind in ("positive", "negative"):
            values = np.abs(values) * (1 if kind == "positive" else -1)
        elif kind == "one":
            values[np.arange(width) != rng.integers(width)] = 0
        elif kind == "outlier":
            values[rng.integers(width)] *= 1000
        elif kind == "constant":
            values[:] = values[0]
        elif kind == "ends":  # as far up as down: the case that clips symmetric formats most
            values = np.sign(values)
        row[:] = values * magnitude
    return weight


def steps(packed: PackedRows, weight: np.ndarray) -> np.ndarray:
    """The distance of two levels at every weight, [n, in]."""
    scale = np.abs(packed.scale).reshape(len(weight), -1)
    return np.repeat(scale, weight.shape[1] // scale.shape[1], axis=1)


def off(weight: np.ndarray, packed: PackedRows, fmt: Format) -> np.ndarray:
    """Every weight's error in steps. Scales of 4 bits have half precision, worth 2^-12 of a level at most."""
    error, step = np.abs(unpack(packed, fmt) - weight), steps(packed, weight)
    return np.divide(error, step, out=np.where(error > 0, np.inf, 0.0), where=step > 0)


HALF = 0.5 + 15 * 2**-12 + 1e-4


@settings(deadline=None)
@given(matrices(), st.sampled_from([f for f in NBITS if not f.symmetric]))
def test_with_zero_points_every_weight_is_within_half_a_step(weight, fmt):
    packed = pack(weight, fmt)
    assert packed.zero_point is not None
    assert off(weight, packed, fmt).max() <= HALF


@settings(deadline=None)
@given(matrices(), st.sampled_from([f for f in NBITS if f.symmetric]))
@example(np.linspace(-1, 1, 32, dtype=np.float32)[None], NBITS[0])
def test_symmetric_weights_are_within_half_a_step_but_for_the_far_level(weight, fmt):
    """Levels -8..7 (-128..127) under a signed scale: the largest magnitude is -8, and there is no 8 to face it."""
    packed = pack(weight, fmt)
    assert packed.zero_point is None and packed.scale is not None
    half = 1 << (fmt.bits - 1)
    step = np.repeat(packed.scale, fmt.block, axis=1).astype(np.float64)
    wanted = np.divide(weight, step, out=np.zeros(weight.shape), where=step != 0)  # in levels
    clipped = wanted > half - 1 + 0.5
    error = off(weight, packed, fmt)
    assert error[~clipped].max() <= HALF
    assert error[clipped].max(initial=0) <= 1 + 15 * 2**-12 + 1e-4
    np.testing.assert_array_less(wanted[clipped], half + 5e-3)


def test_the_largest_magnitude_of_a_symmetric_block_is_kept():
    weight = np.random.default_rng(3).normal(size=(20, 64)).astype(np.float32)
    kept = unpack(pack(weight, NBITS[0]), NBITS[0]).reshape(-1, 16)
    blocks = weight.reshape(-1, 16)
    largest = np.arange(len(blocks)), np.abs(blocks).argmax(axis=1)
    np.testing.assert_allclose(kept[largest], blocks[largest], rtol=2**-11)  # the scale has half precision


@settings(deadline=None)
@given(matrices())
def test_dynamic_int8_is_within_half_a_step(weight):
    packed = pack(weight, DYNAMIC_INT8)
    assert packed.weight.dtype == np.int8 and packed.weight.min() >= -127
    assert off(weight, packed, DYNAMIC_INT8).max() <= HALF
    largest = np.abs(weight).max(axis=1)
    np.testing.assert_array_equal(np.abs(packed.weight).max(axis=1), np.where(largest > 0, 127, 0))
    assert np.all(packed.scale > 0)


@settings(deadline=None)
@given(matrices(most=1))
def test_float16_rounds_as_ieee_does(weight):
    packed = pack(weight, FLOAT16)
    assert packed.weight.dtype == np.float16 and packed.scale is None
    # 11 bits of significand; below 2**-14 a fixed step of 2**-24
    assert np.all(np.abs(unpack(packed, FLOAT16) - weight) <= np.maximum(np.abs(weight) * 2.0**-11, 2.0**-25))


@settings(deadline=None)
@given(matrices())
def test_float32_is_kept(weight):
    np.testing.assert_array_equal(unpack(pack(weight, FLOAT32), FLOAT32), weight)


@pytest.mark.parametrize("fmt", [*NBITS, DYNAMIC_INT8], ids=lambda fmt: fmt.name)
def test_magnitudes_below_what_a_scale_can_tell_stay_harmless(fmt):
    """Rows that training left at next to nothing, such as a vocabulary's padding: finite and tiny they stay."""
    largest = np.geomspace(1e-45, 1e-35, 300)[:, None]
    weight = (np.random.default_rng(0).uniform(-1, 1, (300, 32)) * largest).astype(np.float32)
    weight[:, 0] = largest[:, 0]
    error = np.abs(unpack(pack(weight, fmt), fmt) - weight)
    # ONNX Runtime's own packers are off by more than the weights where floats have a few bits left.
    allowed = 1.02 if fmt == DYNAMIC_INT8 else 3.0
    np.testing.assert_array_less(error.max(axis=1), allowed * weight[:, 0].astype(np.float64))


@settings(deadline=None)
@given(matrices(), st.sampled_from([*NBITS, DYNAMIC_INT8, FLOAT16, FLOAT32]), st.data())
def test_blocks_of_rows_pack_as_the_whole_does(weight, fmt, data):
    if fmt == FLOAT16:
        weight = np.clip(weight, -60000, 60000)
    cut = data.draw(st.integers(0, len(weight)))
    whole, parts = pack(weight, fmt), [pack(rows, fmt) for rows in (weight[:cut], weight[cut:]) if len(rows)]
    for name in ("weight", "scale", "zero_point"):
        expected = getattr(whole, name)
        if expected is None:
            assert all(getattr(part, name) is None for part in parts)
        else:
            actual = np.concatenate([getattr(part, name) for part in parts])
            assert expected.dtype == actual.dtype and expected.tobytes() == actual.tobytes()


@by_name
def test_shapes_are_the_documented_ones(fmt):
    packed = pack(np.ones((5, 96), dtype=np.float32), fmt)
    blocks = 96 // fmt.block
    assert packed.weight.shape == (5, blocks, fmt.block * fmt.bits // 8) and packed.weight.dtype == np.uint8
    assert packed.scale.shape == (5, blocks) and packed.scale.dtype == np.float32
    if not fmt.symmetric:
        assert packed.zero_point.shape == (5, -(-blocks * fmt.bits // 8)) and packed.zero_point.dtype == np.uint8


@settings(deadline=None)
@given(st.sampled_from([16, 32, 64, 128, 256]), st.integers(1, 20_000), st.sampled_from([4, 8]), st.booleans())
def test_the_block_is_the_largest_that_divides_the_width(block, width, bits, symmetric):
    fmt = Format("nbits", bits, block, symmetric)
    fitting = [size for size in (16, 32, 64, 128, 256) if size <= block and width % size == 0]
    if fitting:
        assert format_for_width(fmt, width, "w") == Format("nbits", bits, max(fitting), symmetric)
    else:
        with pytest.raises(BadInput, match=rf"a\.b: input width {width} .*fp32"):
            format_for_width(fmt, width, "a.b")


@pytest.mark.parametrize("fmt", [FLOAT32, FLOAT16, DYNAMIC_INT8], ids=lambda fmt: fmt.name)
def test_formats_without_blocks_take_any_width(fmt):
    assert format_for_width(fmt, 7, "w") == fmt


def test_qwens_widths_keep_the_default_block():
    assert {format_for_width(INT4, width, "w").block for width in (896, 1536, 3584, 4864, 8960, 18944)} == {128}


# What the operators compute


def run(
    op: str, weights: dict[str, np.ndarray | None], attributes: dict[str, int], x: np.ndarray, at: int
) -> np.ndarray:
    """One com.microsoft operator over constant inputs, with `x` as its input number `at`."""
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    inputs = [name if array is not None else "" for name, array in weights.items()]
    inputs.insert(at, "x")
    while not inputs[-1]:
        inputs.pop()
    graph = helper.make_graph(
        [helper.make_node(op, inputs, ["y"], domain=MICROSOFT, **attributes)],
        "one_operator",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items() if array is not None],
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return y


def random_weight(rows: int, width: int) -> np.ndarray:
    """Rows of several magnitudes, some of one sign, one of zeros."""
    rng = np.random.default_rng(rows * width)
    weight = rng.normal(size=(rows, width)) * rng.uniform(0.02, 2, (rows, 1))
    weight[1], weight[2] = np.abs(weight[1]), 0
    return weight.astype(np.float32)


@by_name
@pytest.mark.parametrize("width", [96, 128])  # at block 32: an odd number of blocks, and an even one
def test_matmulnbits_computes_with_what_unpack_says(fmt, width):
    weight = random_weight(24, width)
    packed = pack(weight, fmt)
    x = np.random.default_rng(1).normal(size=(5, width)).astype(np.float32)
    parts = {"weight": packed.weight, "scale": packed.scale.reshape(-1), "zero_point": packed.zero_point}
    if packed.zero_point is not None:
        parts["zero_point"] = packed.zero_point.reshape(-1)
    attributes = {"K": width, "N": 24, "bits": fmt.bits, "block_size": fmt.block, "accuracy_level": 0}
    y = run("MatMulNBits", parts, attributes, x, at=0)
    np.testing.assert_allclose(y, x @ unpack(packed, fmt).T, rtol=1e-4, atol=1e-4)


@by_name
@pytest.mark.parametrize("width", [96, 128])
def test_gatherblockquantized_reads_what_unpack_says(fmt, width):
    """The same bytes seen as [rows, in * bits / 8]: a tied embedding is stored once."""
    packed = pack(random_weight(24, width), fmt)
    ids = np.array([[0, 23, 2, 1, 0]], dtype=np.int64)
    rows = packed.weight.reshape(24, -1)
    attributes = {"bits": fmt.bits, "block_size": fmt.block, "gather_axis": 0, "quantize_axis": 1}
    parts = {"weight": rows, "scale": packed.scale, "zero_point": packed.zero_point}
    y = run("GatherBlockQuantized", parts, attributes, ids, at=1)
    np.testing.assert_array_equal(y, unpack(packed, fmt)[ids])


def test_dynamicquantizematmul_computes_with_what_unpack_says():
    """Activations of whole numbers from 0 to 255 are quantized without loss."""
    packed = pack(random_weight(24, 96), DYNAMIC_INT8)
    x = np.random.default_rng(2).integers(0, 256, (5, 96)).astype(np.float32)
    x[0, :2] = 0, 255
    weights = {"weight": np.ascontiguousarray(packed.weight.T), "scale": packed.scale}
    y = run("DynamicQuantizeMatMul", weights, {}, x, at=0)
    expected = x @ unpack(packed, DYNAMIC_INT8).T
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-3)


ERROR_FORMATS = [FLOAT16, INT8, INT4, DYNAMIC_INT8, Format("nbits", 4, 32, symmetric=False)]


@pytest.fixture
def weight():
    return np.random.default_rng(0).normal(0, 0.02, (40, 256)).astype(np.float32)


def direct(weight, fmt):
    difference = unpack(pack(weight, fmt), fmt).astype(np.float64) - weight
    return np.sqrt(np.mean(difference**2) / np.mean(weight.astype(np.float64) ** 2))


@pytest.mark.parametrize("fmt", ERROR_FORMATS, ids=lambda fmt: fmt.name)
def test_the_relative_error_is_the_direct_one(weight, fmt):
    before = weight.copy()
    error = RoundingError.of(weight, pack(weight, fmt), fmt)
    assert error.relative == pytest.approx(direct(weight, fmt), rel=1e-4)
    assert error.weight_squared == pytest.approx(np.sum(weight.astype(np.float64) ** 2), rel=1e-4)
    np.testing.assert_array_equal(before, weight)


@pytest.mark.parametrize("fmt", ERROR_FORMATS, ids=lambda fmt: fmt.name)
def test_blocks_of_rows_add_up(weight, fmt):
    total = RoundingError()
    for rows in (weight[:7], weight[7:30] * 5, weight[30:] * 0):
        total.add(RoundingError.of(rows, pack(rows, fmt), fmt))
    scaled = np.concatenate([weight[:7], weight[7:30] * 5, weight[30:] * 0])
    assert total.relative == pytest.approx(direct(scaled, fmt), rel=1e-4)


def test_fewer_bits_err_more(weight):
    errors = [RoundingError.of(weight, pack(weight, fmt), fmt).relative for fmt in (FLOAT16, INT8, INT4)]
    assert errors == sorted(errors)
    assert errors[2] > 10 * errors[1] > 100 * errors[0] / 10 > 0


def test_float32_has_no_error_and_dilutes_that_of_others(weight):
    total = RoundingError.of(weight, pack(weight, FLOAT32), FLOAT32)
    assert total.relative == 0
    total.add(RoundingError.of(weight, pack(weight, INT4), INT4))
    assert total.relative == pytest.approx(direct(weight, INT4) / np.sqrt(2), rel=1e-4)


def test_no_weights_have_no_error():
    assert RoundingError().relative == 0
    zeros = np.zeros((2, 128), dtype=np.float32)
    assert RoundingError.of(zeros, pack(zeros, INT4), INT4).relative == 0
