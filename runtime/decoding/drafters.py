"""Who proposes in a generation, and what a pair's generations learn from one another."""

from __future__ import annotations

from pard_onnx.runtime.options import AUTO, Options
from pard_onnx.runtime.tuning.costs import RoundCosts, StepCosts
from pard_onnx.runtime.tuning.widths import Widths

from .ahead import AheadDrafter
from .auto import AutoDrafter
from .drafter import Drafter, NoDraft, PardDrafter
from .lookup import Lookup
from .policy import Policy
from .prospect import Prospect

OVERHEAD = 1e-4  # seconds of a round outside of both models' steps
FREE = StepCosts(((1, 0.0),))


class Drafters:
    """Of one pair. draft: None for a target alone; apart: whether the draft has a device of its own."""

    def __init__(self, verify: StepCosts, draft: StepCosts | None, apart: bool, eos_ids: frozenset[int]) -> None:
        self._verify, self._draft = verify, draft
        self._apart = apart
        self._eos_ids = eos_ids
        self._policies: dict[Widths, Policy] = {}
        self._prospects: dict[Widths, Prospect] = {}

    def choose(self, options: Options, widths: Widths, pard: PardDrafter | None) -> Drafter:
        """The drafter of one generation; pard: the draft model's part of it. widths: of the target's steps."""
        draft = AheadDrafter(pard, self._prospect(widths), self._eos_ids) if pard and self._apart else pard
        if options.draft_length == AUTO:
            return AutoDrafter(self._policy(widths), draft, Lookup() if options.lookup else None)
        return draft or NoDraft()

    def _costs(self, widths: Widths) -> RoundCosts:
        return RoundCosts(self._draft or FREE, self._verify, OVERHEAD, widths)

    def _policy(self, widths: Widths) -> Policy:
        if widths not in self._policies:
            self._policies[widths] = Policy(self._costs(widths), has_draft=self._draft is not None)
        return self._policies[widths]

    def _prospect(self, widths: Widths) -> Prospect:
        return self._prospects.setdefault(widths, Prospect(self._costs(widths)))
