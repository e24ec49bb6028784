"""Which token ids a target and a draft have in common, where one of them has more tokens than the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SharedIds:
    """What a draft must not read and must not propose. Which tokens are accepted depends on it, no text does.

    A token that only the target has is mostly a marker between parts of a conversation. The draft reads its own end of
    text in that place: of the tokens that it knows, the one that stands between parts.
    """

    target_only: frozenset[int]  # ids that the draft does not know
    draft_only: frozenset[int]  # ids that the target does not know
    stand_in: int  # what the draft reads for an id of `target_only`

    def for_draft(self, ids: Sequence[int]) -> Sequence[int]:
        """The tokens as the draft reads them."""
        if self.target_only.isdisjoint(ids):
            return ids
        return [self.stand_in if token in self.target_only else token for token in ids]

    def proposable(self, ids: Sequence[int]) -> int:
        """How many of the first tokens of a proposal the target knows."""
        return next((at for at, token in enumerate(ids) if token in self.draft_only), len(ids))
