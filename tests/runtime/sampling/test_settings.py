"""Settings of sampling: what is refused, and what is kept."""

import pickle
from fractions import Fraction
from math import inf, nan
from typing import Any

import numpy as np
import pytest

from pard_onnx.models.errors import BadInput
from pard_onnx.runtime.sampling.settings import MOST_SEED, Sampling

BAD: list[tuple[str, Any, str]] = [
    ("temperature", -0.1, r"temperature must be at least 0 \(greedy\), not -0.1"),
    ("top_k", -1, "top_k must be at least 1, or 0 for all ids, not -1"),
    ("top_p", 0, r"top_p must be above 0 .* not 0.0; for the most probable id alone take temperature 0"),
    ("top_p", -0.5, r"top_p must be above 0 and at most 1 \(all ids\), not -0.5"),
    ("top_p", 1.01, r"top_p must be above 0 and at most 1 \(all ids\), not 1.01"),
    ("min_p", -0.01, r"min_p must be from 0 \(all ids\) to 1, not -0.01"),
    ("min_p", 1.5, r"min_p must be from 0 \(all ids\) to 1, not 1.5"),
    ("repetition_penalty", 0, "repetition_penalty must be above 0, where 1 is off, not 0"),
    ("repetition_penalty", -1.0, "repetition_penalty must be above 0, where 1 is off, not -1"),
    ("seed", -1, r"seed must be from 0 to 2\*\*64-1, or None for a fresh one, not -1"),
    ("seed", 2**64, "seed must be from 0"),
    ("logit_bias", {-1: 1.0}, "logit_bias: id -1 is negative"),
    ("logit_bias", ((1, 1.0), (1, 2.0)), "logit_bias: id 1 is given twice"),
    ("logit_bias", {"1": 1.0}, "an id of logit_bias must be a whole number, not '1'"),
    ("logit_bias", {True: 1.0}, "an id of logit_bias must be a whole number, not True"),
    ("logit_bias", {1.0: 1.0}, "an id of logit_bias must be a whole number, not 1.0"),
    ("logit_bias", {7: nan}, "logit_bias: the bias of id 7 must be a finite number of at most 1e[+]30, not nan"),
    ("logit_bias", {7: inf}, "logit_bias: the bias of id 7 must be a finite number of at most 1e[+]30, not inf"),
    ("logit_bias", {7: False}, "logit_bias: the bias of id 7 must be a number, not False"),
    ("logit_bias", {7: None}, "logit_bias: the bias of id 7 must be a number, not None"),
    ("logit_bias", [7], "logit_bias must map token ids to numbers, not 7"),
    ("logit_bias", [(7, 1, 1)], "logit_bias must map token ids to numbers"),
    ("logit_bias", "abc", "logit_bias must map token ids to numbers, not 'abc'"),
    ("logit_bias", None, "logit_bias must map token ids to numbers, not None"),
]
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_bad_values_are_named_with_the_fix(name: str, value: object, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Sampling(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [True, np.True_, "1", None, 1j, [1]])
def test_only_numbers_are_numbers(name: str, value: object) -> None:
    with pytest.raises(BadInput, match=f"{name} must be a number, not "):
        Sampling(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [nan, inf, -inf, 1e31, -1e31, 10**400, np.float32("nan")])
def test_numbers_are_finite(name: str, value: object) -> None:
    with pytest.raises(BadInput, match=rf"{name} must be a finite number of at most 1e\+30, not "):
        Sampling(**{name: value})


@pytest.mark.parametrize("name", ["top_k", "seed"])
@pytest.mark.parametrize("value", [True, np.False_, 1.0, "1", nan])
def test_only_whole_numbers_count(name: str, value: object) -> None:
    with pytest.raises(BadInput, match=f"{name} must be a whole number, not "):
        Sampling(**{name: value})


def test_top_k_is_not_none() -> None:
    with pytest.raises(BadInput, match="top_k must be a whole number, not None"):
        Sampling(top_k=None)  # type: ignore[arg-type]


def test_numbers_of_other_libraries_become_plain_ones() -> None:
    sampling = Sampling(
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_k=np.int64(3),  # type: ignore[arg-type]
        top_p=Fraction(1, 2),  # type: ignore[arg-type]
        logit_bias={np.int32(4): np.float16(2), 1: 3, 9: -inf},  # type: ignore[dict-item]
        seed=np.uint64(MOST_SEED),  # type: ignore[arg-type]
    )
    assert sampling == Sampling(0.5, 3, 0.5, logit_bias=((1, 3.0), (4, 2.0), (9, -inf)), seed=MOST_SEED)
    values = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed, *dict(sampling.logit_bias).items())
    assert [type(v) for v in values] == [float, int, float, int, tuple, tuple, tuple]
    assert {type(part) for pair in sampling.logit_bias for part in pair} == {int, float}  # type: ignore[union-attr]


def test_settings_are_values() -> None:
    """Equal however they were given, hashable, unchanged when the caller's mapping changes, and sent as they are."""
    given = {5: 1.0, 2: -1.0}
    sampling = Sampling(logit_bias=given)
    given[5] = 9.0
    assert sampling.logit_bias == ((2, -1.0), (5, 1.0))
    assert hash(sampling) == hash(Sampling(logit_bias={2: -1.0, 5: 1.0}))
    assert pickle.loads(pickle.dumps(sampling)) == sampling
    assert Sampling(logit_bias=sampling.logit_bias) == sampling


def test_the_defaults_are_greedy() -> None:
    assert Sampling().greedy
    assert not Sampling().penalizes


@pytest.mark.parametrize(
    ("settings", "certain", "greedy"),
    [
        ({"top_p": 0.5, "min_p": 0.1, "seed": 3}, True, True),
        ({"temperature": 1.0, "top_k": 1}, True, True),
        ({"temperature": 1.0, "top_k": 2}, False, False),
        ({"temperature": 1e-9}, False, False),
        ({"repetition_penalty": 1.1}, True, False),
        ({"repetition_penalty": 0.9}, True, False),
        ({"presence_penalty": -0.1}, True, False),
        ({"frequency_penalty": 0.1}, True, False),
        ({"logit_bias": {0: 1.0}}, True, False),
        ({"temperature": 1.0, "logit_bias": {0: 1.0}}, False, False),
    ],
)
def test_what_greedy_is(settings: dict[str, Any], certain: bool, greedy: bool) -> None:
    sampling = Sampling(**settings)
    assert (sampling.certain, sampling.greedy) == (certain, greedy)


def test_a_seed_that_was_not_given_is_chosen_afresh() -> None:
    assert Sampling(seed=0).chosen_seed() == 0
    assert Sampling(seed=7).chosen_seed() == 7
    fresh = {Sampling().chosen_seed() for _ in range(8)}
    assert len(fresh) > 1
    assert all(Sampling(seed=seed).chosen_seed() == seed for seed in fresh)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "greedy"),
        ({"top_k": 20, "seed": 3}, "greedy"),
        ({"repetition_penalty": 1.1, "top_p": 0.5}, "greedy, repetition_penalty 1.1"),
        ({"temperature": 0.7, "top_k": 20}, "temperature 0.7, top_k 20"),
        ({"temperature": 0.7, "top_k": 1}, "greedy"),
    ],
)
def test_settings_in_words(settings: dict[str, Any], text: str) -> None:
    assert str(Sampling(**settings)) == text
