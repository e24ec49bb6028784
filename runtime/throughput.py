"""What a draft length is worth: tokens a round over seconds a round, from measured costs and acceptance.

With acceptance a_i of the i-th draft (the share of rounds that accept it, hence all before it), a round of K
drafts commits 1 + a_1 + ... + a_K tokens: the target's own and the accepted ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .costs import StepCosts
from .widths import ANY, Widths


@dataclass(frozen=True, slots=True)
class RoundCosts:
    """The steps of a round; overhead: seconds outside of both models' steps; widths: that the target's may have."""

    draft: StepCosts
    verify: StepCosts
    overhead: float = 0.0
    widths: Widths = ANY

    def seconds(self, k: int, accepted: float) -> float:
        """A round of k drafts after rounds of `accepted` tokens: the draft reads those and k - 1 masks."""
        draft = self.draft(accepted + k - 1) if k else 0.0
        return draft + self.verify(self.widths.fit(k + 1)) + self.overhead


def tokens_per_round(acceptance: Sequence[float], k: int) -> float:
    """Expected tokens that a round of k drafts commits; acceptance: [at least k], by position."""
    if len(acceptance) < k:
        raise ValueError(f"acceptance of {len(acceptance)} positions says nothing of {k} drafts")
    return 1.0 + sum(acceptance[:k])


def throughput(costs: RoundCosts, acceptance: Sequence[float], k: int) -> float:
    """Expected tokens a second with k drafts a round; k = 0 is plain decoding."""
    tokens = tokens_per_round(acceptance, k)
    return tokens / costs.seconds(k, tokens)
