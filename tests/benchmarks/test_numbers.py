"""The arithmetic behind the tables: bootstrap, cost curves, predictions, the order of turns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pard_onnx.benchmarks.statistics import Work, rate, speed_up
from pard_onnx.benchmarks.trial import Way, in_turn
from pard_onnx.runtime.tuning.steps import EVEN, RoundCosts, StepCosts, measure, throughput, tokens_per_round

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


def test_costs_are_linear_between_and_beyond_the_points() -> None:
    costs = StepCosts(((1, 10.0), (2, 12.0), (8, 36.0)))
    assert [costs(width) for width in (0.5, 1, 1.5, 2, 5, 8, 12)] == [10, 10, 11, 12, 24, 36, 52]
    assert StepCosts(((4, 3.0),))(9) == 3
    for widths in ((), (2, 1), (1, 1), (0, 1)):
        with pytest.raises(ValueError, match="the widths of a cost curve rise"):
            StepCosts(tuple((width, 1.0) for width in widths))


def test_measuring_takes_every_width_after_a_warm_up() -> None:
    seen: list[int] = []
    costs = measure(seen.append, (2, 1), repeats=3)
    assert seen == [2, 1] * 4
    assert [width for width, _ in costs.points] == [1, 2]


def test_throughput_is_tokens_over_seconds() -> None:
    flat, rising = StepCosts(((1, 2.0),)), StepCosts(((1, 10.0), (9, 18.0)))
    costs = RoundCosts(draft=flat, verify=rising, overhead=1.0)
    acceptance = (0.5, 0.25, 0.25)
    assert tokens_per_round(acceptance, 0) == 1 and tokens_per_round(acceptance, 3) == 2
    assert throughput(costs, acceptance, 0) == 1 / 11
    assert throughput(costs, acceptance, 3) == 2 / (2 + 13 + 1)
    even = RoundCosts(flat, rising, 1.0, EVEN)
    assert throughput(even, acceptance, 0) == 1 / 12  # plain decoding at width 2
    assert throughput(even, acceptance, 2) == 1.75 / (2 + 13 + 1)
    assert throughput(even, acceptance, 3) == throughput(costs, acceptance, 3)
    with pytest.raises(ValueError, match="says nothing of 4 drafts"):
        tokens_per_round(acceptance, 4)


def test_every_way_takes_every_prompt_and_begins_in_turn() -> None:
    ways = [Way(name, 0, True) for name in "abc"]
    turns = [(prompt, way.name) for prompt, way in in_turn(["1", "2"], ways)]
    assert turns == [("1", "a"), ("1", "b"), ("1", "c"), ("2", "b"), ("2", "c"), ("2", "a")]
