"""Histograms of magnitudes against literal counting, and clips against literal rounding."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from pard_onnx.quantize.calibration.magnitudes import BINS, Magnitudes

Floats = NDArray[np.float32]
FINITE = st.floats(-1e6, 1e6, width=32)


def seen(*parts: Floats) -> Magnitudes:
    found = Magnitudes()
    for part in parts:
        found.add(part)
    return found


def loss(x: Floats, clip: float, bits: int) -> float:
    """The literal squared error of x in symmetric integers whose largest stands for `clip`."""
    most = 2 ** (bits - 1) - 1
    step = clip / most
    return float(np.square(np.clip(np.rint(x / step), -most, most) * step - x.astype(np.float64)).sum())


@given(st.lists(arrays(np.float32, 5, elements=FINITE), min_size=1, max_size=6))
@example([np.ones(5, np.float32), np.zeros(5, np.float32), np.zeros(5, np.float32)])  # zeros before the first number
@example([np.full(5, 1e-45, np.float32), np.ones(5, np.float32)])  # the smallest float32
def test_counts_do_not_depend_on_the_order(parts: list[Floats]) -> None:
    forth, back = seen(*parts), seen(*parts[::-1])
    assert forth.limit == back.limit and forth.largest == back.largest == np.abs(parts).max()
    if forth.limit:
        assert forth.largest < forth.limit <= 2 * forth.largest
    np.testing.assert_array_equal(forth.counts, back.counts)
    assert forth.counts.sum() == 5 * len(parts)


def test_growing_loses_nothing() -> None:
    random = np.random.default_rng(0)
    parts = [random.normal(size=400).astype(np.float32) * scale for scale in (1e-3, 1, 30, 0.1)]
    found = seen(*parts)
    whole, _ = np.histogram(np.abs(np.concatenate(parts)), BINS, range=(0, found.limit))
    assert found.counts.sum() == 1600
    np.testing.assert_array_equal(found.counts, whole)


@given(st.integers(0, 2**32 - 1), st.sampled_from((0.3, 1.0, 3.0)), st.sampled_from((8, 16)))
@example(2484, 3.0, 8)  # 1.12 times the best: few values are rounded to other levels than 0
def test_the_clip_errs_hardly_more_than_the_best(seed: int, tail: float, bits: int) -> None:
    """Among all clips at the edges of bins, tried one by one. tail: from even values to rare large ones.

    `clip` assumes uniform rounding errors within a step. Over n values the mean square of such errors has a relative
    standard deviation of sqrt(4 / 5 / n), and the best of all clips is the one with the luckiest errors.
    """
    random = np.random.default_rng(seed)
    x = (random.normal(size=3000) * np.exp(tail * random.normal(size=3000))).astype(np.float32)
    found = seen(x)
    clip = found.clip(bits)
    candidates = [*(np.arange(8, BINS + 1, 8) * found.limit / BINS), found.largest]
    best = min(loss(x, min(c, found.largest), bits) for c in candidates)
    assert 0 < clip <= found.largest
    rounded = int((np.abs(x) > clip / (2**bits - 2)).sum())  # to other levels than 0
    assert loss(x, clip, bits) <= (1 + max(0.1, 3 * np.sqrt(0.8 / rounded))) * best


def test_sixteen_bits_keep_everything() -> None:
    x = np.append(np.random.default_rng(0).normal(size=100_000), [40.0]).astype(np.float32)
    assert seen(x).clip(16) == 40
    assert seen(x).clip(8) < 40


def test_zeros_and_what_is_no_number() -> None:
    assert seen(np.zeros(3, np.float32)).clip(8) == 0
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="not finite"):
            seen(np.array([1, bad], np.float32))
