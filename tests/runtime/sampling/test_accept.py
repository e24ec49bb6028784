"""Greedy acceptance against a slow literal reading of the contract."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pard_onnx.runtime.sampling.sampler import Accepted, accept

ids = st.integers(0, 2)


def literal(drafts: list[int], target_ids: list[int]) -> Accepted:
    """The largest m whose first m drafts all match, tried from the largest down; then one more target token."""
    for m in range(len(drafts), -1, -1):
        if all(drafts[i] == target_ids[i] for i in range(m)):
            return Accepted(tuple(target_ids[: m + 1]), m)
    raise AssertionError


@given(st.lists(st.tuples(ids, ids), max_size=12), ids)
def test_accept_is_the_longest_matching_prefix_and_one_more(pairs: list[tuple[int, int]], last: int) -> None:
    drafts, chosen = [draft for draft, _ in pairs], [token for _, token in pairs] + [last]
    assert accept(drafts, chosen) == literal(drafts, chosen)


def test_all_drafts_match_and_the_bonus_follows() -> None:
    assert accept([4, 5], [4, 5, 6]) == Accepted((4, 5, 6), 2)


def test_a_match_behind_a_mismatch_does_not_count() -> None:
    assert accept([4, 9, 6], [4, 5, 6, 7]) == Accepted((4, 5), 1)


def test_no_drafts_is_plain_decoding() -> None:
    assert accept([], [3]) == Accepted((3,), 0)


def test_rows_and_drafts_must_correspond() -> None:
    with pytest.raises(ValueError, match="2 drafts need 3 target ids, not 2"):
        accept([1, 2], [1, 2])
