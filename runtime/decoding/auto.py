"""The drafter of a generation, and what all generations of a pair learn."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

from pard_onnx.models.checks import AUTO
from pard_onnx.runtime.options import Options
from pard_onnx.runtime.tuning.steps import RoundCosts, StepCosts, Widths

from .ahead import MEASURED_LAG, AheadDrafter, AheadPolicy
from .drafter import NOTHING, Drafter, NoDraft, PardDrafter, Proposal
from .lookup import NO_MATCH, Lookup, Match
from .policy import DraftRequest, Policy

OVERHEAD = 1e-4  # seconds of a round outside of both models' steps
NO_COSTS = StepCosts(((1, 0.0),))

ModelDrafter = PardDrafter | AheadDrafter


class AutoDrafter(Drafter):
    """The drafter of one generation with draft_length "auto": lookup and the draft model propose, a policy decides."""

    def __init__(self, policy: Policy, draft: ModelDrafter | None, lookup: Lookup | None) -> None:
        """draft: None for a target alone; lookup: None where only the draft model shall propose."""
        self._policy = policy
        policy.new_text()
        self._draft = draft
        self._lookup = lookup
        # Of the present round:
        self._request: DraftRequest | None = None  # None where the draft model is not used
        self._match = NO_MATCH  # the match whose proposal was taken; NO_MATCH if the draft model's was
        self._proposal = NOTHING  # the draft model's, in full length
        self._unused_chances: list[float] = []  # of the draft model's tokens, if the lookup proposal was taken
        self._refused = False  # whether the token after the verified ones is known to be wrong
        self._draft_seconds = 0.0
        self._verify_start = perf_counter()

    @property
    def length(self) -> int:
        return self._draft.length if self._draft else 0

    @property
    def seen(self) -> int | None:
        return self._draft.seen if self._draft else None

    def begin(self, computed: int) -> None:
        if self._draft:
            self._draft.begin(computed)

    def saw(self, ids: Sequence[int], features: Any) -> None:
        if self._draft:
            self._draft.saw(ids, features)

    def keep_up(self, committed: Sequence[int]) -> None:
        if self._draft:
            self._draft.keep_up(committed)

    def rollback(self, length: int) -> None:
        if self._draft:
            self._draft.rollback(length)

    def propose(self, committed: Sequence[int], k: int) -> Proposal:
        start = perf_counter()
        lag = self._draft.lag(committed) if self._draft else 0
        waited = perf_counter() - start  # for a proposal that is made ahead
        match = self._lookup.find(committed, k) if self._lookup else NO_MATCH
        chances = self._policy.lookups.estimate(match.length, len(match.ids))
        self._request = self._policy.request(chances, lag, k) if self._draft else None
        lookup_gain, length = self._policy.best_prefix(chances)
        if self._draft and self._request:
            self._proposal = self._propose_by_model(self._draft, committed, self._request, lag)
            ahead = self._proposal.ahead
            self._draft_seconds = waited + (0.0 if ahead else self._policy.draft_costs(self._request.length + 2))
            draft_chances = self._policy.drafts.estimate(self._proposal.probabilities)
            draft_gain, count = self._policy.best_prefix(draft_chances)
            if draft_gain >= lookup_gain:
                return self._take(NO_MATCH, self._proposal.first(count))
            self._unused_chances = draft_chances[:count]
        return self._take(match, Proposal(match.ids[:length], tuple(chances[:length]), "lookup"))

    def refuse(self, count: int) -> None:
        self._refused = True

    def run_ahead(self, committed: Sequence[int], proposal: Proposal, k: int) -> bool:
        ran = False
        if self._draft and self._request:
            ran = self._draft.run_ahead(committed, proposal, min(k, self._request.length))
        self._verify_start = perf_counter()
        return ran

    def _propose_by_model(
        self, draft: ModelDrafter, committed: Sequence[int], request: DraftRequest, lag: int
    ) -> Proposal:
        """The draft model's proposal. Its step is timed, unless it reads more tokens than a round's step does."""
        start = perf_counter()
        proposal = draft.propose(committed, request.length, request.window, request.whole)
        if lag <= MEASURED_LAG and not proposal.ahead and not request.whole:
            self._policy.draft_costs.observe(lag + request.length - 1, perf_counter() - start)
        return proposal

    def _take(self, match: Match, proposal: Proposal) -> Proposal:
        self._match = match
        return proposal if proposal.ids else NOTHING

    def observe(self, drafted: int, matched: int) -> None:
        self._policy.observe_step(drafted, perf_counter() - self._verify_start)
        if self._draft:
            self._draft.observe(drafted, matched)
        if self._request and self._match is NO_MATCH:
            probabilities = self._proposal.probabilities
            self._policy.observe_draft_round(self._draft_seconds, probabilities, drafted, matched, self._refused)
        elif self._request:
            self._policy.observe_unused_draft(self._draft_seconds, self._unused_chances)
            self._policy.observe_lookup_round(self._match.length, drafted, matched, self._refused)
        elif drafted or self._refused:
            self._policy.observe_lookup_round(self._match.length, drafted, matched, self._refused)
        else:
            self._policy.observe_plain_round()
        self._request, self._refused = None, False


class DrafterFactory:
    """Makes the drafter of each generation, and keeps what the generations of one pair learn."""

    def __init__(
        self, verify: StepCosts, draft: StepCosts | None, separate_devices: bool, eos_ids: frozenset[int]
    ) -> None:
        """verify, draft: costs of the target's and the draft's steps; draft: None for a target alone.

        separate_devices: whether the draft has a device of its own, so that it can work while the target works.
        """
        self._verify, self._draft = verify, draft
        self._separate_devices = separate_devices
        self._eos_ids = eos_ids
        self._policies: dict[Widths, Policy] = {}
        self._ahead_policies: dict[Widths, AheadPolicy] = {}

    def drafter(self, options: Options, widths: Widths, pard: PardDrafter | None) -> Drafter:
        """The drafter of one generation.

        widths: of the target's steps. pard: runs the draft model; None for a target alone.
        """
        reads_target = pard is not None and pard.seen is not None
        draft: ModelDrafter | None = pard
        if pard and self._separate_devices and not reads_target:  # features are known after the target's step only
            draft = AheadDrafter(pard, self._ahead_policy(widths), self._eos_ids)
        if options.draft_length == AUTO:
            return AutoDrafter(self._policy(widths), draft, Lookup() if options.lookup else None)
        if options.draft_length == 0 and reads_target:  # plain decoding reads no features
            return NoDraft()
        return draft or NoDraft()

    def _costs(self, widths: Widths) -> RoundCosts:
        return RoundCosts(self._draft or NO_COSTS, self._verify, OVERHEAD, widths)

    def _policy(self, widths: Widths) -> Policy:
        if widths not in self._policies:
            self._policies[widths] = Policy(self._costs(widths), has_draft=self._draft is not None)
        return self._policies[widths]

    def _ahead_policy(self, widths: Widths) -> AheadPolicy:
        return self._ahead_policies.setdefault(widths, AheadPolicy(self._costs(widths)))
