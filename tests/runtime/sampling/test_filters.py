"""Filters and draws on one row, against their literal reading."""

from dataclasses import replace
from math import inf, nextafter
from random import Random
from typing import Any

import literal_sampling as literal
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pard_onnx.runtime.sampling import filters as rows
from pard_onnx.runtime.sampling.filters import candidates, heaviest, largest, mass_cut, pick
from pard_onnx.runtime.sampling.settings import Sampling

Floats = NDArray[np.float32]
NEAR = 2e-6  # float32 weights against float64 ones


def distribution(logits: Floats, sampling: Sampling) -> list[float]:
    """What `candidates` says, as float64 probabilities of all ids."""
    found = candidates(logits, sampling, np.full(logits.size, np.nan, np.float32))
    out = np.zeros(logits.size)
    out[slice(None) if found.ids is None else found.ids] = found.weights
    return (out / out.sum()).tolist()


def readings(logits: Floats, sampling: Sampling) -> list[list[float]]:
    """The literal distribution, and those of filters a rounding error to either side."""
    factors = (1, 1 - NEAR, 1 + NEAR)
    shares = [min(sampling.top_p * factor, nextafter(1, 0)) for factor in factors] if sampling.top_p < 1 else [1]
    ratios = [min(sampling.min_p * factor, 1) for factor in factors] if sampling.min_p else [0]
    near = [replace(sampling, top_p=share, min_p=ratio) for share in shares for ratio in ratios]
    return [literal.probabilities(logits.tolist(), one, (), ()) for one in near]


def agrees(found: list[float], sampling: Sampling, logits: Floats) -> bool:
    return any(np.allclose(found, reading, rtol=1e-4, atol=NEAR) for reading in readings(logits, sampling))


grid = st.integers(-6, 6).map(lambda n: n / 2)  # has ties
logit = grid | st.floats(-30, 30, width=32) | st.just(-inf)
some_logits = st.lists(logit, min_size=1, max_size=24).filter(lambda z: max(z) > -inf)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([1e-30, 1e-6, 0.1, 0.7, 1.0, 1.7, 100.0, 1e30]) | st.floats(0.05, 5),
    top_k=st.integers(0, 30),
    top_p=st.sampled_from([1.0, 1e-9, 0.5, nextafter(1, 0)]) | st.floats(0.01, 0.99),
    min_p=st.sampled_from([0.0, 1.0]) | st.floats(0, 1),
)


@settings(max_examples=500)
@given(some_logits, samplings)
@example([0.0] * 10, Sampling(1.0, top_p=0.7))
@example([-inf, 0.0, 0.5], Sampling(0.1, top_p=nextafter(1, 0)))
@example([0.5, -inf, -inf, -inf], Sampling(1e30, 3, 0.99))
def test_candidates_are_what_the_filters_say(logits: list[float], sampling: Sampling) -> None:
    row = np.array(logits, np.float32)
    found = distribution(row, sampling)
    assert agrees(found, sampling, row), (found, readings(row, sampling)[0])


def spread(seed: int, size: int, std: float, step: float = 0) -> Floats:
    """A long row; with a step, logits are its multiples and so have many ties."""
    values = np.random.default_rng(seed).normal(size=size) * std
    return (np.round(values / step) * step if step else values).astype(np.float32)


LONG: dict[str, Floats] = {
    "flat": spread(0, 20_000, 0.1),
    "gaussian": spread(1, 20_000, 1),
    "peaked": spread(2, 20_000, 6),
    "stairs": spread(3, 20_000, 1, 0.5),
    "two values": spread(4, 20_000, 0.1, 0.25),
    "equal": np.zeros(20_000, np.float32),
    "sorted": np.sort(spread(5, 20_000, 1)),
    "a sample misleads": np.where(np.arange(20_000) % 19 == 0, 8, spread(6, 20_000, 1)).astype(np.float32),
    "banned": np.where(np.arange(20_000) < 19_000, -np.inf, spread(7, 20_000, 1)).astype(np.float32),
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize(
    "filters",
    [{}, {"top_p": 0.1}, {"top_p": 0.5}, {"top_p": 0.95}, {"top_p": 0.999}, {"top_p": 0.99999},
     {"top_k": 50}, {"top_k": 9000}, {"min_p": 0.2}, {"top_k": 8000, "top_p": 0.9, "min_p": 0.01}],
    ids=str,
)  # fmt: skip
def test_long_rows(name: str, filters: dict[str, Any]) -> None:
    """The paths that short rows do not take: partition, narrowing, blocks."""
    sampling = Sampling(temperature=0.9, **filters)
    found = np.array(distribution(LONG[name], sampling))
    wanted = [np.array(reading) for reading in readings(LONG[name], sampling)]
    assert min(np.abs(found - reading).sum() for reading in wanted) < 2e-4
    sizes = [np.count_nonzero(reading) for reading in wanted]
    assert min(sizes) <= np.count_nonzero(found) <= max(sizes)


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("share", [1e-6, 0.3, 0.9, 0.9999])
def test_narrowing_finds_what_sorting_finds(name: str, share: float) -> None:
    weights = np.exp(LONG[name] - LONG[name].max())
    total = float(weights.sum(dtype=np.float64))
    cut, above = mass_cut(weights, total, share)
    ordered = np.sort(weights)[::-1].astype(np.float64)
    assert cut == ordered[np.searchsorted(np.cumsum(ordered), share * total)]
    assert above == pytest.approx(ordered[ordered > cut].sum(), rel=1e-9)


@settings(max_examples=400)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=99), st.sampled_from([4, 8, 32]), st.randoms(), st.data())
def test_narrowing_is_exact_where_sums_are(levels: list[int], few: int, random: Random, data: st.DataObject) -> None:
    """Whole numbers that sum to a power of two: just enough, a little less or more; samples mislead to either side."""
    total = 1 << sum(levels).bit_length()
    levels += [1] * (total - sum(levels))
    random.shuffle(levels)
    ordered = sorted(filter(None, levels), reverse=True)
    count = data.draw(st.integers(1, len(ordered)))
    need = sum(ordered[:count]) + data.draw(st.sampled_from([-0.5, 0, 0 if count == len(ordered) else 0.5]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "FEW", few)
        patch.setattr(rows, "SAMPLE", few)
        cut, above = mass_cut(np.array(levels, np.float32), float(total), need / total)
    first = next(i for i in range(len(ordered)) if sum(ordered[: i + 1]) >= need)
    assert (cut, above) == (ordered[first], sum(level for level in levels if level > ordered[first]))


def test_narrowing_ends_where_rounding_leaves_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """More is asked for than there is, as when sums in two orders differ by their last bit."""
    monkeypatch.setattr(rows, "FEW", 4)
    monkeypatch.setattr(rows, "SAMPLE", 4)
    for size in (1, 2, 5, 50):
        for weights in (np.ones(size, np.float32), np.geomspace(1, 1e-3, size).astype(np.float32)):
            total = float(weights.sum(dtype=np.float64)) * (1 + 1e-12)
            assert mass_cut(weights, total, nextafter(1, 0))[0] == weights.min()
            some = np.concatenate([np.zeros(40, np.float32), weights, np.zeros(9, np.float32)])
            kept = heaviest(some, np.log(some + 1e-9), nextafter(1, 0))
            assert np.flatnonzero(kept).tolist() == list(range(40, 40 + size))


@given(st.lists(st.integers(0, 5), min_size=2, max_size=40), st.data())
def test_largest_keeps_exactly_k_and_of_equal_ones_the_first(values: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values) - 1))
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert largest(np.array(values, np.float32), k).tolist() == sorted(order[:k])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.floats(0.01, 0.99))
def test_heaviest_takes_larger_logits_among_equal_weights(levels: list[int], share: float) -> None:
    """Logits that differ by less than float32 weights can say: the order is still theirs."""
    logits = np.array(levels, np.float32)
    kept = np.flatnonzero(heaviest(np.ones(len(levels), np.float32), logits, share)).tolist()
    order = sorted(range(len(levels)), key=lambda i: (-levels[i], i))
    assert kept == sorted(order[: len(kept)])
    assert len(kept) >= share * len(levels) > len(kept) - 1


@given(
    st.lists(st.sampled_from([0.0, 0.0, 0.25, 0.5, 1.0]), max_size=40),
    st.integers(0, 40),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([1, 3, 8, 1024]),
)
def test_a_draw_is_the_inverse_of_the_cumulative_sum(weights: list[float], at: int, u: float, block: int) -> None:
    """Exact binary fractions: no rounding excuses a neighbour."""
    weights.insert(at, 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BLOCK", block)
        picked = pick(np.array(weights, np.float32), u)
    assert weights[picked] > 0
    assert sum(weights[:picked]) <= u * sum(weights) or u * sum(weights) == sum(weights)
    assert u * sum(weights) < sum(weights[: picked + 1]) or not any(weights[picked + 1 :])


@pytest.mark.parametrize("size", [1, 7, 1024, 1025, 5000])
def test_the_ends_of_a_draw(size: int) -> None:
    """u as close to 1 as it gets means the last id that can come out, not one of weight 0 behind it."""
    weights = np.random.default_rng(size).random(size, np.float32) + np.float32(1e-3)
    padded = np.concatenate([np.zeros(1500, np.float32), weights, np.zeros(1500, np.float32)])
    assert pick(padded, 0.0) == 1500
    assert pick(padded, nextafter(1, 0)) == 1500 + size - 1


def test_draws_of_a_long_row_have_its_distribution() -> None:
    """Evenly spaced u over blocks: each id comes out as often as its weight says, to one."""
    weights = np.random.default_rng(0).random(3000, np.float32)
    draws = 30_000
    counts = np.bincount([pick(weights, (i + 0.5) / draws) for i in range(draws)], minlength=weights.size)
    wanted = weights.astype(np.float64) / weights.sum(dtype=np.float64) * draws
    assert np.abs(counts - wanted).max() < 1.01


def test_the_row_is_not_written_to() -> None:
    row = spread(0, 100, 1)
    row.setflags(write=False)
    found = candidates(row, Sampling(0.5, 20, 0.9, 0.01), np.empty(100, np.float32))
    assert found.ids is not None
    assert 0 < found.ids.size <= 20
