"""How many drafts a round: expected tokens against what they cost, decided anew each round. Pure.

With a rate of lambda tokens a second to be had anyway, a round of E expected tokens and t seconds is worth
E - lambda * t. The policy holds lambda as the rate that its recent rounds had, plain decoding's at least, and takes
the most valuable of three rounds: plain, a lookup proposal, or the draft model; of a proposal it verifies the prefix
of the highest value. (Renewal reward: lambda at its fixed point is the best rate that such choices can have.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .acceptance import DraftAcceptance, LookupAcceptance
from .throughput import RoundCosts

MOST = 16  # masks; a draft's far positions are rarely accepted, and lookup takes care of long repeats
FADE = 0.9  # of what recent rounds had, at each round: a window of about ten
PRIOR_ROUNDS = 2.0  # that the first guess of the draft's rate is worth
LOSS = 0.01  # of the time goes into trying the draft again where it did not pay
WINDOW = 32  # tokens of context for such a try, if the draft's cache has fallen behind by more


@dataclass(slots=True)
class Rate:
    """Faded sums of recent rounds."""

    tokens: float
    seconds: float
    rounds: float

    def add(self, tokens: float, seconds: float) -> None:
        self.tokens = FADE * self.tokens + tokens
        self.seconds = FADE * self.seconds + seconds
        self.rounds = FADE * self.rounds + 1

    @property
    def per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Draft:
    """Ask the draft model for so many tokens; window: after no more context than this, None for all of it."""

    length: int
    window: int | None = None


class Policy:
    """For one pair; what it has learned outlives a generation. `has_draft` False: lookup is all there is."""

    def __init__(self, costs: RoundCosts, has_draft: bool = True) -> None:
        self._costs = costs
        self._has_draft = has_draft
        self._plain = self._verify(0)
        self.drafts = DraftAcceptance(MOST)
        self.lookups = LookupAcceptance()
        self._recent = Rate(1.0, self._plain, 1.0)
        self._drafted = self._first_guess()
        self._spared = 0.0  # seconds since the draft was last used

    def _verify(self, drafts: int) -> float:
        """Seconds of a round that verifies so many, drafting apart."""
        return self._costs.verify(self._costs.widths.fit(drafts + 1)) + self._costs.overhead

    def _first_guess(self) -> Rate:
        """What a round with the draft is worth at the acceptance that one hopes for."""
        profile = self.drafts.profile()
        guesses = [(1 + sum(profile[:k]), self._costs.draft(k + 2) + self._verify(k)) for k in range(1, MOST + 1)]
        tokens, seconds = max(guesses, key=lambda guess: guess[0] / guess[1])
        return Rate(PRIOR_ROUNDS * tokens, PRIOR_ROUNDS * seconds, PRIOR_ROUNDS)

    @property
    def goal(self) -> float:
        """Tokens a second to be had anyway."""
        return max(1 / self._plain, self._recent.per_second)

    def value(self, chances: Sequence[float]) -> tuple[float, int]:
        """The best prefix of a proposal: its value above a plain round, and its length.

        chances: of each token and all before it.
        """
        best, length, gained = 0.0, 0, 0.0
        for count, chance in enumerate(chances, 1):
            gained += chance
            worth = gained - self.goal * (self._verify(count) - self._plain)
            if worth >= best:  # a width that is paid for anyway is filled
                best, length = worth, count
        return best, length

    def ask(self, lookup: Sequence[float], lag: int, limit: int) -> Draft | None:
        """Whether to run the draft model. lookup: the chances of what lookup proposes; lag: tokens that the
        draft's cache lacks; limit: the most tokens that are of use."""
        if not self._has_draft:
            return None
        pays = self._drafted.per_second * self._plain >= 1
        window = None if pays or lag <= WINDOW else WINDOW
        length = min(limit, self._masks())
        tokens, seconds = self._drafted.tokens / self._drafted.rounds, self._drafted.seconds / self._drafted.rounds
        if not self._started(lag):
            seconds += max(0.0, self._costs.draft((window or lag) + length) - self._costs.draft(length + 2))
        worth = tokens - 1 - self.goal * (seconds - self._plain)
        if worth >= self.value(lookup)[0]:
            return Draft(length, window)
        loss = self.goal * seconds - tokens  # in tokens, were it to go as it went
        return Draft(length, window) if self._spared * self.goal * LOSS >= loss else None

    def _started(self, lag: int) -> bool:
        """A prompt that the draft has not read is a debt of the whole generation, not of this round."""
        return lag > WINDOW and self._spared == 0

    def _masks(self) -> int:
        """Masks are added as long as their share of being accepted is worth their time in the draft."""
        for k, chance in enumerate(self.drafts.profile(), 1):
            if chance < self.goal * (self._costs.draft(k + 2) - self._costs.draft(k + 1)):
                return max(1, k - 1)
        return MOST

    def saw_plain(self) -> None:
        """A round that verified nothing."""
        self._saw(1.0, self._plain)

    def saw_lookup(self, match: int, verified: int, matched: int) -> None:
        """A round that verified so many tokens of a lookup proposal."""
        self.lookups.observe(match, verified, matched)
        self._saw(matched + 1.0, self._verify(verified))

    def saw_draft(self, asked: int, probabilities: Sequence[float], verified: int, matched: int) -> None:
        """A round in which the draft model was asked for tokens, and so many of its own were verified."""
        self.drafts.observe(probabilities, verified, matched)
        seconds = self._costs.draft(asked + 2) + self._verify(verified)
        self._drafted.add(matched + 1.0, seconds)
        self._saw(matched + 1.0, seconds)
        self._spared = 0.0

    def _saw(self, tokens: float, seconds: float) -> None:
        self._recent.add(tokens, seconds)
        self._spared += seconds
