"""Penalties and bias: what is counted, when, and what it does to logits."""

from math import inf
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pard_onnx.runtime.sampling.penalties import FIRST_SLOTS, Penalties
from pard_onnx.runtime.sampling.settings import Sampling

LOGITS = np.array([2.0, -2.0, 0.0, 3.0, -inf, 1.0], np.float32)


def penalized(committed: list[int], prompt: int = 0, led: tuple[int, ...] = (), **settings: Any) -> list[float]:
    penalties = Penalties(Sampling(**settings), len(LOGITS), prompt)
    penalties.count_committed(committed)
    for token in led:
        penalties.count_draft(token)
    out: list[float] = penalties.apply(LOGITS, np.empty_like(LOGITS)).tolist()
    return out


def test_repetition_divides_positive_logits_and_multiplies_negative_ones() -> None:
    found = penalized([0, 1, 2, 4, 1], prompt=2, repetition_penalty=2.0)
    assert found == [1.0, -4.0, 0.0, 3.0, -inf, 1.0]


def test_presence_and_frequency_count_the_output_only() -> None:
    found = penalized([0, 0, 3, 5, 3, 4], prompt=2, presence_penalty=0.5, frequency_penalty=0.25)
    assert found == [2.0, -2.0, 0.0, 2.0, -inf, 0.25]


def test_bias_comes_last() -> None:
    found = penalized([0, 1], repetition_penalty=2.0, logit_bias={1: 3.0, 0: -inf, 4: 8.0})
    assert found == [-inf, -1.0, 0.0, 3.0, -inf, 1.0]


def test_drafts_are_seen_as_output() -> None:
    found = penalized([0], prompt=1, led=(3, 3), repetition_penalty=2.0, frequency_penalty=0.5)
    assert found == [1.0, -2.0, 0.0, 0.5, -inf, 1.0]


def test_without_penalties_the_row_itself_comes_back() -> None:
    penalties = Penalties(Sampling(temperature=1.0), len(LOGITS), 0)
    penalties.count_committed([0, 1, 2])
    penalties.count_draft(3)
    assert penalties.apply(LOGITS, np.empty_like(LOGITS)) is LOGITS
    penalties.uncount_drafts([3])


def test_the_row_is_left_as_it_is() -> None:
    before = LOGITS.copy()
    penalized([0, 1, 2, 3], repetition_penalty=3.0, logit_bias={5: 1.0})
    np.testing.assert_array_equal(LOGITS, before)


@given(st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=6), st.data())
def test_rounds_with_forgotten_drafts_are_one_reading(rounds: list[list[int]], data: st.DataObject) -> None:
    """Round by round, each leading drafts and taking them back, against a fresh count of all tokens."""
    prompt = data.draw(st.integers(0, len(rounds[0])))
    settings = {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    penalties, committed = Penalties(Sampling(**settings), len(LOGITS), prompt), []
    for tokens in rounds:
        committed += tokens
        penalties.count_committed(committed)
        led = data.draw(st.lists(st.integers(0, 5), max_size=4))
        for token in led:
            penalties.count_draft(token)
        drafted = penalties.apply(LOGITS, np.empty_like(LOGITS)).tolist()
        assert drafted == penalized([*committed, *led], prompt, **settings)
        penalties.uncount_drafts(led)
        found = penalties.apply(LOGITS, np.empty_like(LOGITS)).tolist()
        assert found == penalized(committed, prompt, **settings)


def test_many_ids() -> None:
    size = 5 * FIRST_SLOTS
    logits = np.ones(size, np.float32)
    penalties = Penalties(Sampling(frequency_penalty=1.0), size, 0)
    penalties.count_committed([*range(size), *range(0, size, 2)])
    assert penalties.apply(logits, np.empty_like(logits)).tolist() == [-1.0, 0.0] * (size // 2)


def test_ids_without_a_logit_are_passed_over() -> None:
    assert penalized([6, 99, -1, 0], repetition_penalty=2.0) == [1.0, *LOGITS.tolist()[1:]]


def test_extreme_settings_give_no_nan_and_no_infinity() -> None:
    most = 1e30
    for factor in (1e-300, most):
        found = penalized([0, 1, 2, 3, 4, 5], repetition_penalty=factor, presence_penalty=-most, frequency_penalty=most)
        assert not any(value != value or value == inf for value in found), found
    for sign in (1, -1):
        for factor in (1e-300, 1e-3, most):
            logits = np.full(6, sign * 3e38, np.float32)
            penalties = Penalties(Sampling(repetition_penalty=factor, logit_bias={5: sign * most}), 6, 0)
            penalties.count_committed([0])
            found = penalties.apply(logits, np.empty_like(logits)).tolist()
            assert all(value < inf for value in found), found


def test_tokens_only_grow() -> None:
    penalties = Penalties(Sampling(repetition_penalty=1.1), 6, 0)
    penalties.count_committed([1, 2, 3])
    with pytest.raises(ValueError, match="2 tokens, but 3 were counted; they may only grow"):
        penalties.count_committed([1, 2])
