"""Cost curves, and the rates that they predict."""

import pytest

from pard_onnx.runtime.tuning.steps import EVEN, RoundCosts, StepCosts, throughput, tokens_per_round


def test_costs_are_linear_between_and_beyond_the_points() -> None:
    costs = StepCosts(((1, 10.0), (2, 12.0), (8, 36.0)))
    assert [costs(width) for width in (0.5, 1, 1.5, 2, 5, 8, 12)] == [10, 10, 11, 12, 24, 36, 52]
    assert StepCosts(((4, 3.0),))(9) == 3
    for widths in ((), (2, 1), (1, 1), (0, 1)):
        with pytest.raises(ValueError, match="the widths of a cost curve rise"):
            StepCosts(tuple((width, 1.0) for width in widths))


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
