"""Drafting under a grammar: tokens that it forces are proposed for free, and none that it forbids is verified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pard_onnx.runtime.guided.matcher import Matcher

from .drafter import NOTHING, Drafter, Proposal


class GuidedDrafter(Drafter):
    """Any drafter under a grammar.

    Where the grammar leaves one way to go on, these tokens are the proposal, and the other drafter is not asked: such a
    round says nothing about it. Otherwise its proposal ends before the first token that the grammar forbids, and before
    one that ends the text, which the row before it chooses in any case.
    """

    def __init__(self, inner: Drafter, matcher: Matcher) -> None:
        self._inner, self._matcher = inner, matcher
        # Of the present round:
        self._forced = False  # whether the proposal is the grammar's
        self._refused = False  # whether the inner drafter's proposal was cut before a forbidden token

    @property
    def length(self) -> int:
        return self._inner.length

    @property
    def seen(self) -> int | None:
        return self._inner.seen

    def propose(self, committed: Sequence[int], k: int) -> Proposal:
        self._refused = False
        forced = self._matcher.forced(committed)[:k]
        self._forced = bool(forced)
        if forced:
            return Proposal(forced, (1.0,) * len(forced), "grammar")
        proposal = self._inner.propose(committed, k).first(k)
        count = self._matcher.allowed(committed, proposal.ids)
        if count < len(proposal.ids) and proposal.ids[count] not in self._matcher.end_ids:
            self._refused = True
            self._inner.refuse(count)
        return proposal.first(count) if count else NOTHING

    def run_ahead(self, committed: Sequence[int], proposal: Proposal, k: int) -> bool:
        if self._forced:
            return False
        # After a cut, what the inner drafter takes for the target's next token is known to be wrong
        return self._inner.run_ahead(committed, proposal, 0 if self._refused else k)

    def begin(self, computed: int) -> None:
        self._inner.begin(computed)

    def saw(self, ids: Sequence[int], features: Any) -> None:
        self._inner.saw(ids, features)

    def keep_up(self, committed: Sequence[int]) -> None:
        self._inner.keep_up(committed)

    def observe(self, drafted: int, matched: int) -> None:
        if not self._forced:
            self._inner.observe(drafted, matched)

    def rollback(self, length: int) -> None:
        self._inner.rollback(length)
