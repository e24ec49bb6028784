"""How many tokens to draft and to verify in a round, decided anew before each round. Pure: no session is needed.

Let the reference rate be the tokens per second that decoding reaches in any case. A round that takes t seconds is then
expected to gain E - rate * t tokens, where E is the number of tokens that the round is expected to commit. The policy
compares three kinds of rounds, a plain one, one with a lookup proposal and one with the draft model's proposal, and
takes the one with the highest expected gain. Of a proposal, the prefix with the highest expected gain is verified.

The reference rate is the rate of recent rounds that used the draft model, and never less than the rate of plain
decoding. Rounds with lookup proposals do not count towards it: a lookup that succeeds is luck, and says nothing about
the rest of the text. (This is renewal-reward theory: where the reference rate equals the rate that the choices reach,
it is the best rate that such choices can reach.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from pard_onnx.runtime.tuning.steps import LiveCosts, RoundCosts

RATIO_DECAY = 0.97  # what is left of a ratio's sums at each new observation: a window of about 33 observations
PRIOR_WEIGHT = 2.0  # the number of observations that a prior ratio counts as
LOOKUP_PRIOR_WEIGHT = 8.0  # the same of lookup proposals: one long repetition says little about the next match
HIGHEST_PROBABILITY = 0.99  # the limit of every estimate: a long draft is never certain to be accepted

COST_TABLE_WIDTH = 40  # step costs are looked up in a table up to this width: DRAFT_LIMIT drafts and padding
MOST_DRAFTS = 16  # of the draft model: later positions are rarely accepted, and lookup covers long repetitions
ROUND_DECAY = 0.95  # what is left of the recent rounds' sums at each round: a few unlucky rounds change little
GAIN_DECAY = 0.9  # what is left of a position's mean gain at each round
PRIOR_ROUNDS = 2.0  # the number of rounds that the rate expected of an unused draft model counts as
# Where none of a text's first drafts is accepted, rounds with drafts count by what they brought, not by what was
# expected of them, as soon as they have lost the time of so many tokens: later where a round loses little.
REFUTING_LOSS = 3.0
UNTRIED_SHARE = 0.75  # the gain assumed of a position that no round has tried, as a share of the gain of the one before
TRIAL_SHARE = 0.01  # the share of the time that trials may lose; a trial uses the draft model though it did not pay
TRIAL_DRAFTS = 8  # the fewest drafts of a trial
TRIAL_WINDOW = 32  # the tokens of context that a trial reads if the draft's cache lacks more than these
PROVEN_ROUNDS = 4.0  # of a text, as they count in sums: once these reach plain decoding, the draft reads all of it


class DecayingRatio:
    """What was observed divided by what was expected, where older observations weigh less."""

    __slots__ = ("expected", "observed")

    def __init__(self, prior: float, weight: float = PRIOR_WEIGHT) -> None:
        self.observed, self.expected = weight * prior, weight

    def add(self, observed: float, expected: float = 1.0) -> None:
        self.observed = RATIO_DECAY * self.observed + observed
        self.expected = RATIO_DECAY * self.expected + expected

    @property
    def value(self) -> float:
        return self.observed / self.expected if self.expected else 0.0


class DraftAcceptance:
    """Acceptance of a draft model's tokens by position: how often a draft is accepted if all drafts before it were,
    and how that compares with the probability that the model gave it."""

    def __init__(self, positions: int, prior: float = 0.8) -> None:
        self._rates = [DecayingRatio(prior) for _ in range(positions)]
        self._corrections = [DecayingRatio(1.0) for _ in range(positions)]  # factors of the model's probabilities

    def profile(self) -> list[float]:
        """By position, the probability that a draft and all drafts before it are accepted."""
        return cumulative_products([rate.value for rate in self._rates])

    def estimate(self, probabilities: Sequence[float]) -> list[float]:
        """As `profile`, of the drafts of one round; probabilities: those that the model gave them."""
        corrected = [p * factor.value for p, factor in zip(probabilities, self._corrections, strict=False)]
        return cumulative_products(corrected)

    def observe(self, probabilities: Sequence[float], verified: int, matched: int) -> None:
        """Learn from a round: of its drafts, the first `verified` were verified and the first `matched` accepted."""
        for i in range(min(matched + 1, verified)):
            accepted = float(i < matched)
            self._rates[i].add(accepted)
            self._corrections[i].add(accepted, probabilities[i])
        if matched == verified:  # the later drafts were not verified: the model's probability is taken instead
            for i in range(verified, len(probabilities)):
                self._rates[i].add(min(HIGHEST_PROBABILITY, probabilities[i] * self._corrections[i].value))


class LookupAcceptance:
    """Acceptance of lookup proposals by the length of the match: each accepted token makes the match one longer."""

    BOUNDS = (2, 3, 4, 6, 10, 18)  # match lengths at which a new class of lengths begins
    PRIORS = (0.15, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95)  # the acceptance rate to begin with, by class

    def __init__(self) -> None:
        self._rates = [DecayingRatio(prior, LOOKUP_PRIOR_WEIGHT) for prior in self.PRIORS]

    def _rate(self, length: int) -> DecayingRatio:
        return self._rates[bisect_right(self.BOUNDS, length)]

    def estimate(self, length: int, count: int) -> list[float]:
        """For each of `count` tokens proposed after a match of `length` tokens, the probability that it and all before
        it are accepted."""
        return cumulative_products([self._rate(length + i).value for i in range(count)])

    def observe(self, length: int, verified: int, matched: int) -> None:
        """Learn from a round, as `DraftAcceptance.observe`; length: of the match."""
        for i in range(min(matched + 1, verified)):
            self._rate(length + i).add(float(i < matched))


def cumulative_products(probabilities: Sequence[float]) -> list[float]:
    """The products of the first 1, 2, .. probabilities, each of which counts as HIGHEST_PROBABILITY at most."""
    out, product = [], 1.0
    for probability in probabilities:
        product *= min(HIGHEST_PROBABILITY, probability)
        out.append(product)
    return out


@dataclass(slots=True)
class RecentRounds:
    """Sums over recent rounds, where older rounds weigh less."""

    tokens: float  # that they were expected to commit
    seconds: float
    rounds: float  # how many rounds they count as

    def add(self, tokens: float, seconds: float) -> None:
        """Count one more round."""
        self.tokens = ROUND_DECAY * self.tokens + tokens
        self.seconds = ROUND_DECAY * self.seconds + seconds
        self.rounds = ROUND_DECAY * self.rounds + 1

    def plus(self, other: RecentRounds) -> RecentRounds:
        """The sums of both."""
        return RecentRounds(self.tokens + other.tokens, self.seconds + other.seconds, self.rounds + other.rounds)

    def times(self, share: float) -> RecentRounds:
        return RecentRounds(share * self.tokens, share * self.seconds, share * self.rounds)

    def reduce_to(self, rounds: float) -> None:
        """Keep the rate, but let it count as this many rounds."""
        share = rounds / self.rounds
        self.tokens, self.seconds, self.rounds = share * self.tokens, share * self.seconds, rounds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """What the policy asks of the draft model in a round."""

    length: int  # the number of tokens to draft
    window: int | None = None  # the most tokens of context to read first; None for all that the draft's cache lacks
    whole: bool = False  # whether a cache that begins with a window shall be filled from the first token on


class Policy:
    """Decides for one pair what to draft and to verify; what it has learned outlives a generation."""

    def __init__(self, costs: RoundCosts, has_draft: bool = True) -> None:
        """has_draft: False for a target alone, whose only proposals are lookup's."""
        self._costs = costs
        self.draft_costs = LiveCosts(costs.draft, TRIAL_WINDOW + 2 * MOST_DRAFTS)
        self.verify_costs = LiveCosts(costs.verify, COST_TABLE_WIDTH)
        self._has_draft = has_draft
        self.drafts = DraftAcceptance(MOST_DRAFTS)
        self.lookups = LookupAcceptance()
        self._expected_rounds = self._expect_rounds()  # of a draft model that was not used yet
        self._draft_rounds = RecentRounds(0.0, 0.0, 0.0)  # the recent rounds that used the draft model
        self._hoped_rounds = self._expected_rounds  # what is left of `_expected_rounds`, which counts beside them
        self._unaccepted_loss: float | None = 0.0  # of this text's rounds, in tokens; None once a draft was accepted
        self._expected_share = 1.0  # of `_expected_rounds`: how much of them is added when a text begins
        self._gains = self.drafts.profile()  # by position: the mean gain of verifying this draft, in tokens per round
        self._text_rounds = RecentRounds(0.0, 0.0, 0.0)  # those of this text, by the tokens that they committed
        self._in_window = False  # whether the draft model has read a window of this text alone
        self._seconds_without_draft = 0.0  # since the draft model was last used
        self._in_trial = False
        self._last_trial_loss = 0.0  # tokens

    def _verify_seconds(self, drafts: int) -> float:
        """Seconds of a round that verifies so many drafts, without the seconds of drafting them."""
        return self.verify_costs(self._costs.widths.width_for(drafts + 1)) + self._costs.overhead

    @property
    def _plain_seconds(self) -> float:
        """Seconds of a round without drafts."""
        return self._verify_seconds(0)

    def new_text(self) -> None:
        """A generation begins: the rate of the last text counts for this one, and so does the rate that was expected
        of the draft model at first, but half as much after each text in a row that did not reach plain decoding."""
        old = self._rounds
        self._expected_share = 1.0 if old.tokens_per_second * self._plain_seconds >= 1 else self._expected_share / 2
        if old.rounds > PRIOR_ROUNDS:
            old.reduce_to(PRIOR_ROUNDS)
        self._draft_rounds, self._hoped_rounds = old, self._expected_rounds.times(self._expected_share)
        self._unaccepted_loss = 0.0
        self._text_rounds, self._in_window = RecentRounds(0.0, 0.0, 0.0), False

    def _expect_rounds(self) -> RecentRounds:
        """Rounds of the draft length with the highest rate, if drafts are accepted as often as `profile` says."""
        profile = self.drafts.profile()
        rounds = [
            (1 + sum(profile[:k]), self.draft_costs(k + 2) + self._verify_seconds(k)) for k in range(1, MOST_DRAFTS + 1)
        ]
        tokens, seconds = max(rounds, key=lambda expected: expected[0] / expected[1])
        return RecentRounds(PRIOR_ROUNDS * tokens, PRIOR_ROUNDS * seconds, PRIOR_ROUNDS)

    @property
    def _rounds(self) -> RecentRounds:
        """The recent rounds that used the draft model, and those that were expected of it."""
        return self._draft_rounds.plus(self._hoped_rounds)

    @property
    def reference_rate(self) -> float:
        """Tokens per second that decoding reaches in any case: see the module's docstring."""
        return max(1 / self._plain_seconds, self._rounds.tokens_per_second)

    def best_prefix(self, chances: Sequence[float]) -> tuple[float, int]:
        """The prefix of a proposal with the highest expected gain: that gain above a plain round's, in tokens, and
        the prefix's length.

        chances: for each token, the probability that it and all tokens before it are accepted.
        """
        best, length, expected = 0.0, 0, 0.0
        rate, plain = self.reference_rate, self._plain_seconds
        for count, chance in enumerate(chances, 1):
            expected += chance
            gain = expected - rate * (self._verify_seconds(count) - plain)
            if gain >= best:  # equal gains: drafts that fill up a padded step cost nothing
                best, length = gain, count
        return best, length

    def request(self, lookup_chances: Sequence[float], lag: int, limit: int) -> DraftRequest | None:
        """What to ask of the draft model in the next round; None for a round without it.

        lookup_chances: of lookup's proposal, as in `best_prefix`. lag: the tokens that the draft's cache lacks.
        limit: the most drafts that the round can use.
        """
        if not self._has_draft:
            return None
        length = min(limit, self._draft_length())
        recent = self._rounds
        tokens, seconds = recent.tokens / recent.rounds, recent.seconds / recent.rounds
        # Reading the tokens that the draft's cache lacks is not counted: it serves all later rounds, not only this one.
        gain = tokens - 1 - self.reference_rate * (seconds - self._plain_seconds)
        if gain >= self.best_prefix(lookup_chances)[0]:
            return self._usual_request(length, lag)
        window = TRIAL_WINDOW if lag > TRIAL_WINDOW else None
        seconds += self.draft_costs((window or lag) + length) - self.draft_costs(length)
        loss = self.reference_rate * seconds - tokens  # in tokens, if the trial goes as recent rounds went
        budget = self._seconds_without_draft * self.reference_rate * TRIAL_SHARE
        if budget < max(loss, self._last_trial_loss):
            return None
        self._begin_trial()
        self._in_window |= window is not None
        return DraftRequest(max(length, min(limit, TRIAL_DRAFTS)), window)

    def _usual_request(self, length: int, lag: int) -> DraftRequest:
        """So many drafts. After a text that did not reach plain decoding, the draft model reads a window of the next
        text first, and all of it once that has paid: reading a prompt may cost more than the drafts of a text gain."""
        if self._expected_share < 1 and lag > TRIAL_WINDOW:
            self._in_window = True
            return DraftRequest(length, TRIAL_WINDOW)
        text = self._text_rounds
        whole = self._in_window and text.rounds >= PROVEN_ROUNDS and text.tokens_per_second * self._plain_seconds >= 1
        self._in_window &= not whole
        return DraftRequest(length, whole=whole)

    def _begin_trial(self) -> None:
        """Forget most of what was learned about the draft model: it may no longer hold, and the trial shall decide."""
        self.drafts = DraftAcceptance(MOST_DRAFTS)
        self._draft_rounds = self._rounds
        self._draft_rounds.reduce_to(PRIOR_ROUNDS)
        self._hoped_rounds = RecentRounds(0.0, 0.0, 0.0)
        self._in_trial = True

    def _draft_length(self) -> int:
        """The number of drafts whose mean gains, less the draft model's time, have the highest sum."""
        rate, gains, best, length = self.reference_rate, 0.0, -inf, 1
        for k, gain in enumerate(self._gains, 1):
            gains += gain
            if gains - rate * self.draft_costs(k + 2) > best:
                best, length = gains - rate * self.draft_costs(k + 2), k
        return length

    def _learn_gains(self, chances: Sequence[float], verified: int) -> None:
        """Update the mean gain of each position by a round's: the draft's chance less the cost of verifying it, and 0
        for a draft that was not verified."""
        rate = self.reference_rate
        for i in range(MOST_DRAFTS):
            if i < verified:
                gain = chances[i] - rate * (self._verify_seconds(i + 1) - self._verify_seconds(i))
            elif i < len(chances):
                gain = 0.0
            else:  # this position was not drafted
                gain = UNTRIED_SHARE * self._gains[i - 1]
            self._gains[i] += (1 - GAIN_DECAY) * (gain - self._gains[i])

    def _add_round(self, tokens: float, seconds: float) -> None:
        self._draft_rounds.add(tokens, seconds)
        self._hoped_rounds = self._hoped_rounds.times(ROUND_DECAY)

    def _learn_whether_refuted(self, seconds: float, matched: int) -> None:
        """Add up what the text's first rounds lose while no draft is accepted; see REFUTING_LOSS."""
        if matched:
            self._unaccepted_loss = None
        elif self._unaccepted_loss is not None:
            self._unaccepted_loss += seconds / self._plain_seconds - 1
            if self._unaccepted_loss >= REFUTING_LOSS:
                self._hoped_rounds = RecentRounds(0.0, 0.0, 0.0)
                self._draft_rounds.tokens = self._draft_rounds.rounds
                self._unaccepted_loss = None

    def observe_step(self, drafts: int, seconds: float) -> None:
        """The target took so many seconds for a step that verified so many drafts."""
        self.verify_costs.observe(self._costs.widths.width_for(drafts + 1), seconds)

    def observe_plain_round(self) -> None:
        """A round verified no drafts, and did not use the draft model."""
        self._seconds_without_draft += self._plain_seconds

    def observe_lookup_round(self, match: int, verified: int, matched: int, refused: bool = False) -> None:
        """A round verified so many tokens of a lookup proposal.

        match: the length of its match. refused: the token after them was known to be wrong, so it was not verified.
        """
        self.lookups.observe(match, verified + refused, matched)
        self._seconds_without_draft += self._verify_seconds(verified)

    def observe_unused_draft(self, draft_seconds: float, chances: Sequence[float]) -> None:
        """A round drafted with the draft model, but verified a lookup proposal with a higher expected gain.

        draft_seconds: of the round; chances: of the drafts that would have been verified.
        """
        self._add_round(1.0 + sum(chances), draft_seconds + self._verify_seconds(len(chances)))
        self._seconds_without_draft, self._in_trial = 0.0, False

    def observe_draft_round(
        self, draft_seconds: float, probabilities: Sequence[float], verified: int, matched: int, refused: bool = False
    ) -> None:
        """A round verified drafts of the draft model.

        draft_seconds: of the round, almost 0 if the drafts were made ahead; probabilities: of all drafts, as the model
        gave them; verified, matched: how many drafts were verified and accepted. refused: the draft after the verified
        ones was known to be wrong.
        """
        self._learn_gains(self.drafts.estimate(probabilities), verified)
        self.drafts.observe(probabilities, verified + refused, matched)
        seconds = draft_seconds + self._verify_seconds(verified)
        # The expected number of tokens, estimated after the round, varies less than the number that was committed.
        expected = self.drafts.estimate(probabilities[:verified])
        self._add_round(1.0 + sum(expected), seconds)
        self._learn_whether_refuted(seconds, matched)
        self._text_rounds.add(1.0 + matched, seconds)
        if self._in_trial:
            self._last_trial_loss = self.reference_rate * (seconds + self.draft_costs(TRIAL_WINDOW)) - matched - 1
        self._seconds_without_draft, self._in_trial = 0.0, False
