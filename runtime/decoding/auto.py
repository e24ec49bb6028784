"""The drafter that tunes itself: lookup and the draft model propose, the policy decides."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

from .ahead import ORDINARY, AheadDrafter
from .drafter import NOTHING, Drafter, PardDrafter, Proposal
from .lookup import NO_MATCH, Lookup, Match
from .policy import Draft, Policy

ModelDrafter = PardDrafter | AheadDrafter


class AutoDrafter(Drafter):
    """A `Drafter` for one generation; draft None: lookup alone; lookup None: the draft alone."""

    def __init__(self, policy: Policy, draft: ModelDrafter | None, lookup: Lookup | None) -> None:
        self._policy = policy
        policy.new_text()
        self._draft = draft
        self._lookup = lookup
        self._asked: Draft | None = None
        self._match = NO_MATCH
        self._proposal = NOTHING  # the draft model's, all of it
        self._passed: list[float] = []  # the chances of its tokens, where lookup's were taken
        self._drafting = 0.0  # seconds that drafting takes of this round
        self._verifying = perf_counter()

    @property
    def length(self) -> int:
        return self._draft.length if self._draft else 0

    @property
    def seen(self) -> int | None:
        return self._draft.seen if self._draft else None

    def saw(self, ids: Sequence[int], features: Any) -> None:
        if self._draft:
            self._draft.saw(ids, features)

    def rollback(self, length: int) -> None:
        if self._draft:
            self._draft.rollback(length)

    def propose(self, committed: Sequence[int], k: int) -> Proposal:
        start = perf_counter()
        lag = self._draft.lag(committed) if self._draft else 0
        waited = perf_counter() - start  # for what was drafted ahead
        found = self._lookup.find(committed, k) if self._lookup else NO_MATCH
        chances = self._policy.lookups.estimate(found.length, len(found.ids))
        self._asked = self._policy.ask(chances, lag, k) if self._draft else None
        worth, length = self._policy.value(chances)
        if self._draft and self._asked:
            self._proposal = self._drafted(self._draft, committed, self._asked, lag)
            ahead = self._proposal.ahead
            self._drafting = waited + (0.0 if ahead else self._policy.draft_costs(self._asked.length + 2))
            own = self._policy.drafts.estimate(self._proposal.probabilities)
            drafted, count = self._policy.value(own)
            if drafted >= worth:
                return self._take(NO_MATCH, self._proposal.first(count))
            self._passed = own[:count]
        return self._take(found, Proposal(found.ids[:length], tuple(chances[:length]), "lookup"))

    def run_ahead(self, committed: Sequence[int], proposal: Proposal, k: int) -> bool:
        ran = False
        if self._draft and self._asked:
            ran = self._draft.run_ahead(committed, proposal, min(k, self._asked.length))
        self._verifying = perf_counter()
        return ran

    def _drafted(self, draft: ModelDrafter, committed: Sequence[int], asked: Draft, lag: int) -> Proposal:
        """The draft model's proposal, timed if the step was an ordinary one."""
        start = perf_counter()
        proposal = draft.propose(committed, asked.length, asked.window)
        if lag <= ORDINARY and not proposal.ahead:
            self._policy.draft_costs.observe(lag + asked.length - 1, perf_counter() - start)
        return proposal

    def _take(self, match: Match, proposal: Proposal) -> Proposal:
        self._match = match
        return proposal if proposal.ids else NOTHING

    def observe(self, drafted: int, matched: int) -> None:
        self._policy.saw_step(drafted, perf_counter() - self._verifying)
        if self._draft:
            self._draft.observe(drafted, matched)
        if self._asked and self._match is NO_MATCH:
            self._policy.saw_draft(self._drafting, self._proposal.probabilities, drafted, matched)
        elif self._asked:
            self._policy.passed_over(self._drafting, self._passed)
            self._policy.saw_lookup(self._match.length, drafted, matched)
        elif drafted:
            self._policy.saw_lookup(self._match.length, drafted, matched)
        else:
            self._policy.saw_plain()
        self._asked = None
