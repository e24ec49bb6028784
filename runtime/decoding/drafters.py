"""Who proposes in a generation, and what a pair's generations learn from one another."""

from __future__ import annotations

from pard_onnx.runtime.options import AUTO, Options
from pard_onnx.runtime.tuning.costs import RoundCosts, StepCosts
from pard_onnx.runtime.tuning.widths import Widths

from .ahead import AheadDrafter
from .auto import AutoDrafter
from .drafter import Drafter, NoDraft, PardDrafter
from .lookup import Lookup
from .policy import Policy, Prospect

OVERHEAD = 1e-4  # seconds of a round outside of both models' steps
NO_COSTS = StepCosts(((1, 0.0),))


class Drafters:
    """Makes the drafter of each generation, and keeps what the generations of one pair learn."""

    def __init__(
        self, verify: StepCosts, draft: StepCosts | None, separate_devices: bool, eos_ids: frozenset[int]
    ) -> None:
        """verify, draft: costs of the target's and the draft's steps, None without a draft model.

        separate_devices: whether the draft has a device of its own, so that it works while the target does.
        """
        self._verify, self._draft = verify, draft
        self._separate_devices = separate_devices
        self._eos_ids = eos_ids
        self._policies: dict[Widths, Policy] = {}
        self._prospects: dict[Widths, Prospect] = {}

    def drafter(self, options: Options, widths: Widths, pard: PardDrafter | None) -> Drafter:
        """The drafter of one generation.

        widths: of the target's steps. pard: runs the draft model; None without one.
        """
        draft = AheadDrafter(pard, self._prospect(widths), self._eos_ids) if pard and self._separate_devices else pard
        if options.draft_length == AUTO:
            return AutoDrafter(self._policy(widths), draft, Lookup() if options.lookup else None)
        return draft or NoDraft()

    def _costs(self, widths: Widths) -> RoundCosts:
        return RoundCosts(self._draft or NO_COSTS, self._verify, OVERHEAD, widths)

    def _policy(self, widths: Widths) -> Policy:
        if widths not in self._policies:
            self._policies[widths] = Policy(self._costs(widths), has_draft=self._draft is not None)
        return self._policies[widths]

    def _prospect(self, widths: Widths) -> Prospect:
        return self._prospects.setdefault(widths, Prospect(self._costs(widths)))
