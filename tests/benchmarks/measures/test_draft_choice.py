"""The choice of a draft's format: pure, from step costs and acceptance."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pard_onnx.benchmarks.measures.draft_choice import CLOSE, at_best_length, best_draft
from pard_onnx.models.manifest import MeasuredFormat
from pard_onnx.runtime.tuning.steps import RoundCosts, StepCosts

FLAT = StepCosts(((1, 0.010), (32, 0.010)))  # verifying costs the same at any width
STEEP = StepCosts(((1, 0.010), (32, 0.320)))


def draft(milliseconds: float) -> StepCosts:
    return StepCosts(((1, milliseconds / 1000), (32, milliseconds / 1000)))


def test_a_format_is_weighed_at_its_best_length() -> None:
    """A round of 1 + .8 + .6 tokens; where verifying is free, all positions pay, where each costs as much as the
    first, none beyond it does."""
    free = at_best_length("a", 5, RoundCosts(draft(2), FLAT), (0.8, 0.6))
    assert (free.draft_length, free.accepted, free.step_seconds) == (2, pytest.approx(2.4), 0.002)
    assert free.tokens_per_second == pytest.approx(2.4 / 0.012)
    dear = at_best_length("b", 5, RoundCosts(draft(2), STEEP), (0.8, 0.1))
    assert dear.draft_length == 1 and dear.tokens_per_second == pytest.approx(1.8 / 0.022)


def test_speed_is_weighed_against_acceptance() -> None:
    """The faster draft wins beside a fast target, the better one beside a slow one."""
    profiles = {"fast": (0.5, 0.2), "good": (0.8, 0.6)}
    steps = {"fast": draft(1), "good": draft(8)}
    for verify, expected in ((0.002, "fast"), (0.1, "good")):
        target = StepCosts(((1, verify), (32, verify)))
        tried = [at_best_length(name, 1, RoundCosts(steps[name], target), profiles[name]) for name in profiles]
        assert best_draft(tried).recipe == expected


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(1, 100)), min_size=1, max_size=5))
def test_the_smallest_of_about_the_fastest(facts: list[tuple[int, float]]) -> None:
    tried = [MeasuredFormat(str(i), size, 1, 0.1, 2.0, rate) for i, (size, rate) in enumerate(facts)]
    chosen, most = best_draft(tried), max(rate for _, rate in facts)
    assert chosen.tokens_per_second >= CLOSE * most
    assert all(one.bytes >= chosen.bytes for one in tried if one.tokens_per_second >= CLOSE * most)
