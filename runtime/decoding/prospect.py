"""Whether a draft on a device of its own should go on while the target verifies. Pure.

It then asks for one token more than is verified, a guess of the target's own next token, and drafts the next round as
if drafts and guess were right. Text never depends on it: what is drafted on a wrong guess is thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence

from pard_onnx.runtime.tuning.costs import LiveCosts, RoundCosts

from .acceptance import DraftAcceptance

POSITIONS = 33  # the most drafts of a round, and the guess
LEAST = 0.01  # of a round's time: a smaller gain is not worth a device's work


def gain(chance: float, draft: float, verify: float, guess: float = 0.0) -> float:
    """Seconds that a round saves on average. chance: that drafts and guess are right, which saves the draft's step;
    draft, verify: seconds of the steps; guess: of asking for it. A step cannot be stopped, so what it takes longer
    than the verification is waited for, right or wrong."""
    return chance * draft - max(0.0, draft - verify) - guess


class Prospect:
    """For one pair; what it has learned outlives a generation."""

    def __init__(self, costs: RoundCosts) -> None:
        self._widths = costs.widths
        self._draft = LiveCosts(costs.draft, 3 * POSITIONS)
        self._verify = LiveCosts(costs.verify, POSITIONS)
        self._acceptance = DraftAcceptance(POSITIONS)

    def ask(self, lag: int, k: int) -> int:
        """How many tokens to ask for if k are to be verified: k, or the guess too. lag: tokens that are read first."""
        guess = self._draft(lag + k) - self._draft(lag + k - 1)
        return k + self._pays(self._acceptance.profile()[k], k, k, guess)

    def pays(self, probabilities: Sequence[float], drafts: int, k: int) -> bool:
        """Whether to draft k tokens more while so many are verified; probabilities: of the drafts and the guess."""
        return self._pays(self._acceptance.estimate(probabilities)[drafts], drafts, k)

    def _pays(self, chance: float, drafts: int, k: int, guess: float = 0.0) -> bool:
        draft, verify = self._draft(drafts + k), self._verify(self._widths.fit(drafts + 1))
        return gain(chance, draft, verify, guess) > LEAST * (draft + verify)

    def saw_draft(self, width: int, seconds: float) -> None:
        """How long a draft's step of so many tokens took."""
        self._draft.observe(width, seconds)

    def saw_step(self, drafts: int, seconds: float) -> None:
        """How long a step that verified so many took."""
        self._verify.observe(self._widths.fit(drafts + 1), seconds)

    def saw_text(self, probabilities: Sequence[float], checked: int, matched: int) -> None:
        """What became of a proposal: so many of its tokens have had the text's beside them, and so many matched."""
        self._acceptance.observe(probabilities, checked, matched)
