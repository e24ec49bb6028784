"""Lookup: the longest suffix that occurred before, whatever the conversation's history."""

from hypothesis import given
from hypothesis import strategies as st

from pard_onnx.runtime.decoding.lookup import LONGEST, NO_MATCH, OCCURRENCES, Lookup

tokens = st.lists(st.integers(0, 3), max_size=60)


def longest(committed: list[int]) -> int:
    """By definition: the most tokens at the end that are also found earlier."""
    size = len(committed)
    return max(
        (
            length
            for end in range(size)
            for length in range(min(end, LONGEST) + 1)
            if committed[end - length : end] == committed[size - length :]
        ),
        default=0,
    )


@given(tokens, st.integers(1, 8))
def test_the_longest_match_is_found_and_goes_on_as_it_did(committed: list[int], k: int) -> None:
    found = Lookup().find(committed, k)
    expected = longest(committed)
    if not expected:
        assert found == NO_MATCH
        return
    if len(committed) <= OCCURRENCES:  # otherwise an older occurrence may have been forgotten
        assert found.length == expected
    size = len(committed)
    places = [
        end
        for end in range(found.length, size)
        if committed[end - found.length : end] == committed[size - found.length :]
    ]
    assert len(found.ids) == k
    assert any(tuple((committed[end:] * k)[:k]) == found.ids for end in places)


@given(st.lists(tokens, min_size=1, max_size=4), st.integers(1, 5))
def test_an_index_that_grew_finds_what_a_new_one_does(parts: list[list[int]], k: int) -> None:
    """Also after another conversation: one that is no continuation begins a new index."""
    lookup, committed = Lookup(), []
    for part in parts:
        committed = [*committed, *part]
        assert lookup.find(committed, k) == Lookup().find(committed, k)
    for part in parts:
        assert lookup.find(part, k) == Lookup().find(part, k)


def test_a_repetition_goes_on_with_its_period() -> None:
    assert Lookup().find([9, 1, 2, 3, 1, 2, 3], 7).ids == (1, 2, 3, 1, 2, 3, 1)


def test_the_latest_of_equally_long_matches_wins() -> None:
    assert Lookup().find([5, 6, 1, 5, 6, 2, 5, 6], 1).ids == (2,)
