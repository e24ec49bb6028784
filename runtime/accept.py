"""Greedy acceptance: how much of a draft the target would have written itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Accepted:
    """tokens: the matching drafts and the target's own next token (correction or bonus); matched: of the drafts."""

    tokens: tuple[int, ...]
    matched: int


def accept(drafts: Sequence[int], target_ids: Sequence[int]) -> Accepted:
    """The longest matching prefix and one more.

    target_ids: the target's choice after the last committed token and after each draft, [len(drafts) + 1].
    """
    if len(target_ids) != len(drafts) + 1:
        raise ValueError(f"{len(drafts)} drafts need {len(drafts) + 1} target ids, not {len(target_ids)}")
    matched = 0
    while matched < len(drafts) and drafts[matched] == target_ids[matched]:
        matched += 1
    return Accepted(tuple(target_ids[: matched + 1]), matched)
