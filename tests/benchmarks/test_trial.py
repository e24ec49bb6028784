"""Trials: the order of turns, and the bootstrap of speed-ups."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pard_onnx.benchmarks.trial import Way, Work, interleaved, rate, speed_up

works = st.lists(
    st.tuples(st.integers(1, 500), st.floats(0.01, 100), st.integers(1, 500), st.floats(0.01, 100)),
    min_size=1,
    max_size=20,
)


@given(works)
def test_a_speed_up_is_the_ratio_of_rates_within_its_interval(rows: list[tuple[int, float, int, float]]) -> None:
    ours, base = [Work(a, b) for a, b, _, _ in rows], [Work(c, d) for _, _, c, d in rows]
    found = speed_up(ours, base)
    assert found.value == pytest.approx(rate(ours) / rate(base))
    assert found.low <= found.high
    each = [a.tokens / a.seconds / (b.tokens / b.seconds) for a, b in zip(ours, base, strict=True)]
    if len(rows) == 1:
        assert found.low == pytest.approx(found.high) == pytest.approx(each[0])


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        seconds = random.gamma(20, 0.1, size=(30, 2))
        found = speed_up([Work(20, 1 * s) for s in seconds[:, 0]], [Work(10, s) for s in seconds[:, 1]])
        covered += found.low <= 2 <= found.high
    assert 172 <= covered <= 199


def test_no_tokens_give_no_speed_up() -> None:
    assert speed_up([Work(0, 1.0)], [Work(3, 1.0)]).value == 0
    with pytest.raises(ValueError, match="cannot be paired"):
        speed_up([Work(1, 1.0)], [])


def test_every_way_takes_every_prompt_and_begins_in_turn() -> None:
    ways = [Way(name, 0, True) for name in "abc"]
    turns = [(prompt, way.name) for prompt, way in interleaved(["1", "2"], ways)]
    assert turns == [("1", "a"), ("1", "b"), ("1", "c"), ("2", "b"), ("2", "c"), ("2", "a")]
