"""How many drafts a round: expected tokens against what they cost, decided anew each round. Pure.

With a rate of lambda tokens a second to be had anyway, a round of E expected tokens and t seconds is worth
E - lambda * t. The policy takes the most valuable of three rounds: plain, a lookup proposal, or the draft model's; of a
proposal it verifies the prefix of the highest value. Lambda is the rate that drafted rounds have brought of late, plain
decoding's at least. (Renewal reward: at its fixed point lambda is the best rate that such choices can have. Lucky
lookups do not count: hard text has to be got through at the rates that it allows.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from pard_onnx.runtime.tuning.costs import LiveCosts, RoundCosts

KEEP = 0.97  # of a count, at each observation of its cell: a window of about 33
PRIOR = 2.0  # observations that a prior is worth
LOOKUP_PRIOR = 8.0  # of a lookup's: one long repetition says little about the next match
CERTAIN = 0.99  # no estimate is above: a long draft is never free of doubt


class Cell:
    """A faded ratio: what happened over what was expected to."""

    __slots__ = ("expected", "happened")

    def __init__(self, ratio: float, prior: float = PRIOR) -> None:
        self.happened, self.expected = prior * ratio, prior

    def add(self, happened: float, expected: float = 1.0) -> None:
        self.happened = KEEP * self.happened + happened
        self.expected = KEEP * self.expected + expected

    @property
    def ratio(self) -> float:
        return self.happened / self.expected if self.expected else 0.0


class DraftAcceptance:
    """Of a draft model, by position: how often a draft whose predecessors were accepted is accepted, and how
    that compares with the probabilities that the model gave."""

    def __init__(self, positions: int, prior: float = 0.8) -> None:
        self._rates = [Cell(prior) for _ in range(positions)]
        self._trust = [Cell(1.0) for _ in range(positions)]

    def profile(self) -> list[float]:
        """Of each position's draft, the chance that it and all before it are accepted."""
        return cumulated([cell.ratio for cell in self._rates])

    def estimate(self, probabilities: Sequence[float]) -> list[float]:
        """The chance of each draft of a round, and all before it, given the model's own probabilities."""
        return cumulated([p * cell.ratio for p, cell in zip(probabilities, self._trust, strict=False)])

    def observe(self, probabilities: Sequence[float], verified: int, matched: int) -> None:
        """A round: of the drafts, `verified` were checked and `matched` accepted."""
        for i in range(min(matched + 1, verified)):
            accepted = float(i < matched)
            self._rates[i].add(accepted)
            self._trust[i].add(accepted, probabilities[i])
        if matched == verified:  # nobody looked further; what the model says stands in
            for i in range(verified, len(probabilities)):
                self._rates[i].add(min(CERTAIN, probabilities[i] * self._trust[i].ratio))


class LookupAcceptance:
    """Of lookup proposals, by the length of the match: each token accepted makes the match one longer."""

    BOUNDS = (2, 3, 4, 6, 10, 18)
    PRIORS = (0.15, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95)

    def __init__(self) -> None:
        self._cells = [Cell(ratio, LOOKUP_PRIOR) for ratio in self.PRIORS]

    def _cell(self, length: int) -> Cell:
        return self._cells[bisect_right(self.BOUNDS, length)]

    def estimate(self, length: int, count: int) -> list[float]:
        """The chance of each of `count` tokens after a match of so many, and all before it."""
        return cumulated([self._cell(length + i).ratio for i in range(count)])

    def observe(self, length: int, verified: int, matched: int) -> None:
        for i in range(min(matched + 1, verified)):
            self._cell(length + i).add(float(i < matched))


def cumulated(conditional: Sequence[float]) -> list[float]:
    """Products of the first i, each factor at most CERTAIN."""
    out, product = [], 1.0
    for chance in conditional:
        product *= min(CERTAIN, chance)
        out.append(product)
    return out


WIDEST = 40  # steps that are looked up in a table: all drafts that may be, padded
MOST = 16  # masks; a draft's far positions are rarely accepted, and lookup takes care of long repeats
FADE = 0.95  # of what drafted rounds brought, at each one: giving up by bad luck costs more than a few rounds
WORTH_FADE = 0.9  # of what each mask brought
PRIOR_ROUNDS = 2.0  # that the first guess of the draft's rate is worth
REACH = 0.75  # of a mask's worth, for the next one that nobody has tried
LOSS = 0.01  # of the time goes into trying the draft again where it did not pay
TRIED = 8  # masks of such a try, at least
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

    def fade_to(self, rounds: float) -> None:
        """The same rate, as if fewer rounds had been seen."""
        share = rounds / self.rounds
        self.tokens, self.seconds, self.rounds = share * self.tokens, share * self.seconds, rounds

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
        self.draft_costs = LiveCosts(costs.draft, WINDOW + 2 * MOST)
        self.verify_costs = LiveCosts(costs.verify, WIDEST)
        self._has_draft = has_draft
        self.drafts = DraftAcceptance(MOST)
        self.lookups = LookupAcceptance()
        self._drafted = self._first_guess = self._guess()
        self._hope = 1.0  # share of the first guess that counts when a text begins
        self._worth = self.drafts.profile()  # by position: tokens a round that this mask brought
        self._spared = 0.0  # seconds since the draft was last used
        self._trying, self._last_loss = False, 0.0  # tokens that the last try cost

    def _verify(self, drafts: int) -> float:
        """Seconds of a round that verifies so many, drafting apart."""
        return self.verify_costs(self._costs.widths.width_for(drafts + 1)) + self._costs.overhead

    @property
    def _plain(self) -> float:
        return self._verify(0)

    def new_text(self) -> None:
        """A generation begins: what the last text was like speaks for this one, but hope has a say again, half of it
        after each text in a row that disappointed it."""
        old, hope = self._drafted, self._first_guess
        self._hope = 1.0 if old.per_second * self._plain >= 1 else self._hope / 2
        if old.rounds > PRIOR_ROUNDS:
            old.fade_to(PRIOR_ROUNDS)
        self._drafted = Rate(
            old.tokens + self._hope * hope.tokens,
            old.seconds + self._hope * hope.seconds,
            old.rounds + self._hope * hope.rounds,
        )

    def _guess(self) -> Rate:
        """What a round with the draft is worth at the acceptance that one hopes for."""
        profile = self.drafts.profile()
        guesses = [(1 + sum(profile[:k]), self.draft_costs(k + 2) + self._verify(k)) for k in range(1, MOST + 1)]
        tokens, seconds = max(guesses, key=lambda guess: guess[0] / guess[1])
        return Rate(PRIOR_ROUNDS * tokens, PRIOR_ROUNDS * seconds, PRIOR_ROUNDS)

    @property
    def goal(self) -> float:
        """Tokens a second to be had anyway, here: not by a lookup, which is a matter of luck."""
        return max(1 / self._plain, self._drafted.per_second)

    def value(self, chances: Sequence[float]) -> tuple[float, int]:
        """The best prefix of a proposal: its value above a plain round, and its length.

        chances: of each token and all before it.
        """
        best, length, gained = 0.0, 0, 0.0
        goal, plain = self.goal, self._plain
        for count, chance in enumerate(chances, 1):
            gained += chance
            worth = gained - goal * (self._verify(count) - plain)
            if worth >= best:  # a width that is paid for anyway is filled
                best, length = worth, count
        return best, length

    def ask(self, lookup: Sequence[float], lag: int, limit: int) -> Draft | None:
        """Whether to run the draft model. lookup: the chances of what lookup proposes; lag: tokens that the
        draft's cache lacks; limit: the most tokens that are of use."""
        if not self._has_draft:
            return None
        length = min(limit, self._masks())
        tokens, seconds = self._drafted.tokens / self._drafted.rounds, self._drafted.seconds / self._drafted.rounds
        # Tokens that the draft has yet to read are a debt of its whole use, not of this round.
        if tokens - 1 - self.goal * (seconds - self._plain) >= self.value(lookup)[0]:
            return Draft(length)
        window = WINDOW if lag > WINDOW else None
        seconds += self.draft_costs((window or lag) + length) - self.draft_costs(length)
        loss = self.goal * seconds - tokens  # in tokens, were it to go as it went
        if self._spared * self.goal * LOSS < max(loss, self._last_loss):
            return None
        self._begin_again()
        self._trying = True
        return Draft(max(length, min(limit, TRIED)), window)

    def _begin_again(self) -> None:
        """What was learned of the draft may no longer hold: this try shall count."""
        self.drafts = DraftAcceptance(MOST)
        self._drafted.fade_to(PRIOR_ROUNDS)

    def _masks(self) -> int:
        """So many that what the last of them brought of late pays for its time in the draft."""
        goal, gained, best, length = self.goal, 0.0, -inf, 1
        for k, worth in enumerate(self._worth, 1):
            gained += worth
            if gained - goal * self.draft_costs(k + 2) > best:
                best, length = gained - goal * self.draft_costs(k + 2), k
        return length

    def _learn_worth(self, chances: Sequence[float], verified: int) -> None:
        """What each mask of a round brought: its chance less the cost of verifying it, nothing if it was not."""
        goal = self.goal
        for i in range(MOST):
            if i < verified:
                brought = chances[i] - goal * (self._verify(i + 1) - self._verify(i))
            elif i < len(chances):
                brought = 0.0
            else:  # nobody asked: it may be worth somewhat less than the one before
                brought = REACH * self._worth[i - 1]
            self._worth[i] += (1 - WORTH_FADE) * (brought - self._worth[i])

    def saw_step(self, drafts: int, seconds: float) -> None:
        """How long a step that verified so many took."""
        self.verify_costs.observe(self._costs.widths.width_for(drafts + 1), seconds)

    def saw_plain(self) -> None:
        """A round that verified nothing."""
        self._spared += self._plain

    def saw_lookup(self, match: int, verified: int, matched: int) -> None:
        """A round that verified so many tokens of a lookup proposal."""
        self.lookups.observe(match, verified, matched)
        self._spared += self._verify(verified)

    def passed_over(self, drafting: float, chances: Sequence[float]) -> None:
        """A round in which the draft model was asked, but lookup was taken; drafting: the seconds that it took of the
        round; chances: of what was passed over."""
        self._drafted.add(1.0 + sum(chances), drafting + self._verify(len(chances)))
        self._spared, self._trying = 0.0, False

    def saw_draft(self, drafting: float, probabilities: Sequence[float], verified: int, matched: int) -> None:
        """A round with the draft model's proposal, of which so many tokens were verified; drafting: the seconds that it
        took of the round, little if it was drafted ahead."""
        self._learn_worth(self.drafts.estimate(probabilities), verified)
        self.drafts.observe(probabilities, verified, matched)
        seconds = drafting + self._verify(verified)
        # What was to be expected, now that the round is known, varies less than what came of it.
        expected = self.drafts.estimate(probabilities[:verified])
        self._drafted.add(1.0 + sum(expected), seconds)
        if self._trying:
            self._last_loss = self.goal * (seconds + self.draft_costs(WINDOW)) - matched - 1
        self._spared, self._trying = 0.0, False


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
        draft, verify = self._draft(drafts + k), self._verify(self._widths.width_for(drafts + 1))
        return gain(chance, draft, verify, guess) > LEAST * (draft + verify)

    def saw_draft(self, width: int, seconds: float) -> None:
        """How long a draft's step of so many tokens took."""
        self._draft.observe(width, seconds)

    def saw_step(self, drafts: int, seconds: float) -> None:
        """How long a step that verified so many took."""
        self._verify.observe(self._widths.width_for(drafts + 1), seconds)

    def saw_text(self, probabilities: Sequence[float], checked: int, matched: int) -> None:
        """What became of a proposal: so many of its tokens have had the text's beside them, and so many matched."""
        self._acceptance.observe(probabilities, checked, matched)
