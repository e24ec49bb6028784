"""Choosing tokens row by row: greedy and drawn."""

from math import inf, nan
from typing import Any

import literal_sampling as literal
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pard_onnx.models.errors import BadInput, Failure
from pard_onnx.runtime.sampling.sampler import Greedy, Sampler, chooser, uniform
from pard_onnx.runtime.sampling.settings import Sampling

VOCABULARY = 6
PADDING = 2  # rows are longer than the vocabulary
NEAR = 2e-6
Floats = NDArray[np.float32]


def table(rows: int, seed: int = 0, std: float = 1.5) -> Floats:
    logits = np.random.default_rng(seed).normal(size=(rows, VOCABULARY + PADDING)) * std
    logits[:, VOCABULARY:] = -np.inf
    return logits.astype(np.float32)


def sampler(seed: int = 0, prompt: int = 1, **settings: Any) -> Sampler:
    return Sampler(Sampling(**settings), VOCABULARY, prompt, seed)


token = st.integers(0, VOCABULARY - 1)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-6, 0.6, 1.0, 2.5]),
    top_k=st.integers(0, VOCABULARY + 2),
    top_p=st.sampled_from([1.0, 0.9, 0.5]),
    min_p=st.sampled_from([0.0, 0.05, 0.4]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.6, -0.4]),
    frequency_penalty=st.sampled_from([0.0, 0.3, -0.2]),
    logit_bias=st.dictionaries(token, st.floats(-5, 5), max_size=3)
    | st.just({0: -inf})
    | st.just(dict.fromkeys(range(VOCABULARY - 1), -inf)),
)


def literal_round(
    rows: Floats, sampling: Sampling, prompt: list[int], output: list[int], drafts: list[int], seed: int
) -> list[int] | None:
    """The round by the literal reading; None if rounding may decide a draw."""
    tokens: list[int] = []
    for row in rows:
        p = literal.probabilities(row[:VOCABULARY].tolist(), sampling, prompt, [*output, *tokens])
        u = uniform(seed, len(prompt) + len(output) + len(tokens))
        near = {literal.draw(p, min(max(u + shift, 0), 1)) for shift in (-NEAR, 0, NEAR)}
        if len(near) > 1:
            return None
        tokens += near
        if len(tokens) > len(drafts) or drafts[len(tokens) - 1] != tokens[-1]:
            break
    return tokens


@settings(max_examples=400)
@given(
    samplings,
    st.lists(token, max_size=6),
    st.lists(token, max_size=6),
    st.integers(0, 8),
    st.integers(0, 999),
    st.data(),
)
def test_a_round_is_the_literal_one(
    sampling: Sampling, prompt: list[int], output: list[int], k: int, seed: int, data: st.DataObject
) -> None:
    """Drafts that match up to a point of hypothesis' choice, with the penalties that follow from them."""
    rows = table(k + 1, seed)
    perfect: list[int] = []
    for _ in range(k):
        chosen = literal_round(rows[: len(perfect) + 1], sampling, prompt, output, perfect, seed)
        if chosen is None:
            return
        perfect.append(chosen[-1])
    agree = data.draw(st.integers(0, k))
    drafts = [*perfect[:agree], *data.draw(st.lists(token, min_size=k - agree, max_size=k - agree))]
    wanted = literal_round(rows, sampling, prompt, output, drafts, seed)
    found = Sampler(sampling, VOCABULARY, len(prompt), seed).choose(rows, [*prompt, *output], drafts)
    assert wanted is None or found == wanted


def test_tokens_are_the_matched_drafts_and_one_more() -> None:
    rows = table(4)
    all_of_them = sampler(temperature=1.0).choose(rows, [0], [9, 9, 9])
    assert len(all_of_them) == 1
    full: list[int] = []
    for _ in range(4):
        full = sampler(temperature=1.0).choose(rows[: len(full) + 1], [0], full)
    assert len(full) == 4
    for matched in range(4):
        drafts = full[:3]
        if matched < 3:
            drafts[matched] = (drafts[matched] + 1) % VOCABULARY
        assert sampler(temperature=1.0).choose(rows, [0], drafts) == full[: matched + 1]


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"repetition_penalty": 1.2}, {}], ids=str)
def test_rows_behind_a_mismatch_are_not_looked_at(settings: dict[str, Any]) -> None:
    rows = table(3)
    rows[1:] = nan
    assert len(chooser(Sampling(**settings), VOCABULARY, 1, 0).choose(rows, [0], [99, 0])) == 1


@pytest.mark.parametrize(
    "settings", [{"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.9}, {}], ids=str
)
def test_a_row_s_token_does_not_depend_on_the_array_around_it(settings: dict[str, Any]) -> None:
    """One row or nine, contiguous or every second of a larger array, Fortran order, at any address."""
    size = 5003
    logits = np.random.default_rng(0).normal(size=(9, size)).astype(np.float32) * 3
    for seed in range(20):
        chosen = chooser(Sampling(**settings), size, 1, seed).choose(logits[:1].copy(), [0], ())
        wider = np.repeat(logits, 2, axis=0)[::2]
        shifted = np.empty(size + 1, np.float32)[1:]
        shifted[:] = logits[0]
        for rows in (logits, wider, np.asfortranarray(logits), shifted[None]):
            drafts = [size] * (len(rows) - 1)
            assert chooser(Sampling(**settings), size, 1, seed).choose(rows, [0], drafts) == chosen


def test_penalties_see_the_drafted_prefix() -> None:
    """The row behind a draft is penalized for it, and for each occurrence, before anything is committed."""
    rows = np.tile(np.array([2.0, 1.5, 0.9, 0, 0, 0, -inf, -inf], np.float32), (4, 1))
    found = sampler(frequency_penalty=1.0).choose(rows, [5], [0, 1, 0])
    assert found == [0, 1, 0, 2]  # 2.0, then 1.0 < 1.5, then 1.0 > 0.5, 0.9 at last


def test_rejected_drafts_leave_no_trace() -> None:
    rows = np.tile(np.array([2.0, 1.9, 0, 0, 0, 0, -inf, -inf], np.float32), (3, 1))
    one = sampler(repetition_penalty=1.5)
    assert one.choose(rows, [5], [1, 0]) == [0]
    assert one.choose(rows, [5], [0, 3]) == [0, 1]
    assert one.choose(rows, [5], [0, 1]) == [0, 1, 0]
    assert one.choose(rows[:1], [5], []) == [0]


def test_a_row_that_fails_leaves_no_trace() -> None:
    rows = np.tile(np.array([2.0, 1.9, 0, 0, 0, 0, -inf, -inf], np.float32), (2, 1))
    broken = rows.copy()
    broken[1, 3] = nan
    one = sampler(repetition_penalty=1.5)
    with pytest.raises(Failure, match="the target's largest logit for position 2 is NaN"):
        one.choose(broken, [5], [0])
    assert one.choose(rows[:1], [5], []) == [0]


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"repetition_penalty": 1.2}, {}], ids=str)
@pytest.mark.parametrize(("value", "name"), [(nan, "NaN"), (inf, "inf")])
def test_a_needed_row_that_is_not_numbers_is_a_failure(settings: dict[str, Any], value: float, name: str) -> None:
    rows = table(2)
    rows[0, 2] = value
    with pytest.raises(Failure, match=f"the target's largest logit for position 3 is {name}; .* broken"):
        chooser(Sampling(**settings), VOCABULARY, 1, 0).choose(rows, [0, 1, 2], [0])


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"repetition_penalty": 1.2}, {}], ids=str)
def test_a_row_without_any_logit_is_a_failure(settings: dict[str, Any]) -> None:
    rows = np.full((1, VOCABULARY), -np.inf, np.float32)
    with pytest.raises(Failure, match="the target's largest logit for position 1 is -inf"):
        chooser(Sampling(**settings), VOCABULARY, 1, 0).choose(rows, [0], ())


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1.0, 1e30])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}], ids=str)
def test_the_only_id_that_is_left(temperature: float, filters: dict[str, Any]) -> None:
    rows = np.full((1, VOCABULARY), -np.inf, np.float32)
    rows[0, 4] = -7
    for seed in range(20):
        assert sampler(seed, temperature=temperature, **filters).choose(rows, [0], ()) == [4]


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-6])
def test_tiny_temperatures_are_greedy_and_overflow_nothing(temperature: float) -> None:
    rows = table(1)
    rows[0, 3] = -3e38
    for seed in range(20):
        assert sampler(seed, temperature=temperature).choose(rows, [0], ()) == [int(rows[0].argmax())]


@pytest.mark.parametrize("bias", [{}, {1: 0.0}], ids=str)
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_k": 1}], ids=str)
def test_greedy_takes_the_lowest_of_equal_ids(settings: dict[str, Any], bias: dict[int, float]) -> None:
    rows = np.array([[0, 3, 1, 3, 3, 0]], np.float32)
    for seed in range(5):
        assert chooser(Sampling(**settings, logit_bias=bias), VOCABULARY, 1, seed).choose(rows, [0], ()) == [1]


def test_greedy_with_penalties_is_the_largest_penalized_logit() -> None:
    rows = np.array([[4.0, 3.0, 2.0, 0, 0, 0]], np.float32)
    assert sampler(repetition_penalty=1.5).choose(rows, [0], ()) == [1]
    assert sampler(logit_bias={2: 2.5}).choose(rows, [1], ()) == [2]


@pytest.mark.parametrize(
    ("settings", "kind"), [({}, Greedy), ({"temperature": 1.0}, Sampler), ({"presence_penalty": 0.1}, Sampler)], ids=str
)
def test_plain_greedy_has_a_path_of_its_own(settings: dict[str, Any], kind: type) -> None:
    assert type(chooser(Sampling(**settings), VOCABULARY, 1, 0)) is kind


@given(st.lists(token, max_size=8), st.integers(0, 99))
def test_greedy_and_the_sampler_at_temperature_0_agree(drafts: list[int], seed: int) -> None:
    rows = table(len(drafts) + 1, seed)
    assert Greedy().choose(rows, [0], drafts) == sampler().choose(rows, [0], drafts)


def test_rows_and_drafts_must_correspond() -> None:
    with pytest.raises(ValueError, match="2 drafts need 3 rows, not 2"):
        sampler(temperature=1.0).choose(table(2), [0], [1, 2])


def test_ids_past_the_vocabulary_never_come_out() -> None:
    """Even if a graph forgot to mask them."""
    rows = table(1)
    rows[0, VOCABULARY:] = 50
    assert {sampler(seed, temperature=1e30).choose(rows, [0], ())[0] for seed in range(200)} == set(range(VOCABULARY))


def test_bias_on_an_id_that_does_not_exist_is_refused() -> None:
    with pytest.raises(BadInput, match="logit_bias: id 6 does not exist; the tokenizer's ids are 0 to 5"):
        sampler(logit_bias={6: 1.0})


def test_a_ban_of_all_ids_is_refused() -> None:
    with pytest.raises(BadInput, match="logit_bias bans all 6 ids; leave at least one"):
        sampler(logit_bias=dict.fromkeys(range(VOCABULARY), -inf))


def test_a_ban_of_all_that_the_target_allows_is_a_failure() -> None:
    rows = np.full((1, VOCABULARY), -np.inf, np.float32)
    rows[0, 4] = 0
    with pytest.raises(Failure, match="no id is left for position 3: logit_bias bans all that the target allows"):
        sampler(logit_bias={4: -inf}, temperature=1.0).choose(rows, [0, 0, 0], ())


def test_random_numbers_are_pinned() -> None:
    """A seed's text may not change with numpy, the platform or a refactoring."""
    assert [uniform(*at) for at in [(0, 0), (0, 1), (1, 0), (2**64 - 1, 2**40)]] == [
        0.12311943861730146, 0.5826717794384204, 0.5363207289114678, 0.8381317566808486
    ]  # fmt: skip


def test_random_numbers_are_uniform_along_seeds_and_positions() -> None:
    """Counts in 64 cells, and of pairs of neighbours in 8 x 8, for either order of counting."""
    for numbers in ([uniform(7, n) for n in range(20_000)], [uniform(n, 7) for n in range(20_000)]):
        values = np.array(numbers)
        pairs = (values[:-1] * 8).astype(int) * 8 + (values[1:] * 8).astype(int)
        for cells in ((values * 64).astype(int), pairs):
            counts = np.bincount(cells, minlength=64)
            mean = cells.size / 64
            assert ((counts - mean) ** 2 / mean).sum() < 63 + 4.5 * np.sqrt(2 * 63)
    assert all(0 <= uniform(seed, 0) < 1 for seed in range(1000))
