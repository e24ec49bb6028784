"""Drafting ahead: the draft model drafts the next round while the target verifies this one, on a device of its own.

The next round begins with the target's own token, which is not known yet. So the draft model is asked for one token
more than is verified, and that token is the guess of it. If all drafts are accepted and the guess is right, the next
round's drafts are there already.

A session runs in one thread at a time. While an `AheadTask` runs, the draft's session belongs to the task's thread, and
every other use of the session waits for the task's end first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Event, Thread
from time import perf_counter

from pard_onnx.models.checks import common_prefix
from pard_onnx.runtime.tuning.steps import LiveCosts, RoundCosts

from .drafter import NOTHING, Drafter, PardDrafter, Proposal
from .policy import DraftAcceptance

POSITIONS = 33  # DRAFT_LIMIT drafts and the guess
LEAST_SAVING = 0.01  # of a round's time; a smaller saving does not justify the work of a second device
MEASURED_LAG = 32  # tokens; a step that reads more of them first says nothing about the time of a round's step


def saved_seconds(chance: float, draft: float, verify: float, guess: float = 0.0) -> float:
    """The seconds that a round saves on average if the next round is drafted ahead.

    chance: the probability that the drafts and the guess are right, which saves the next round's draft step. draft,
    verify: seconds of the steps; guess: seconds that drafting the guess takes. A step cannot be stopped, so a draft
    step that takes longer than the verification is waited for even if its drafts are of no use.
    """
    return chance * draft - max(0.0, draft - verify) - guess


class AheadPolicy:
    """Decides for one pair whether to draft ahead; what it has learned outlives a generation. Pure."""

    def __init__(self, costs: RoundCosts) -> None:
        self._widths = costs.widths
        self._draft = LiveCosts(costs.draft, 3 * POSITIONS)
        self._verify = LiveCosts(costs.verify, POSITIONS)
        self._acceptance = DraftAcceptance(POSITIONS)

    def length_to_request(self, lag: int, k: int) -> int:
        """The number of tokens to draft if k are to be verified: k, or k + 1 where the guess pays.

        lag: the tokens that the draft's step reads first.
        """
        guess = self._draft(lag + k) - self._draft(lag + k - 1)
        return k + self._pays(self._acceptance.profile()[k], k, k, guess)

    def pays(self, probabilities: Sequence[float], drafts: int, k: int) -> bool:
        """Whether to draft k tokens ahead while `drafts` are verified; probabilities: of the drafts and the guess."""
        return self._pays(self._acceptance.estimate(probabilities)[drafts], drafts, k)

    def _pays(self, chance: float, drafts: int, k: int, guess: float = 0.0) -> bool:
        draft, verify = self._draft(drafts + k), self._verify(self._widths.width_for(drafts + 1))
        return saved_seconds(chance, draft, verify, guess) > LEAST_SAVING * (draft + verify)

    def observe_draft_step(self, width: int, seconds: float) -> None:
        """The draft model took so many seconds for a step of so many tokens."""
        self._draft.observe(width, seconds)

    def observe_verify_step(self, drafts: int, seconds: float) -> None:
        """The target took so many seconds for a step that verified so many drafts."""
        self._verify.observe(self._widths.width_for(drafts + 1), seconds)

    def observe_proposal(self, probabilities: Sequence[float], compared: int, matched: int) -> None:
        """The first `compared` tokens of a proposal were compared with the text; the first `matched` were the same."""
        self._acceptance.observe(probabilities, compared, matched)


class AheadTask:
    """A proposal that is made in a thread of its own, as if `assumed` followed the first `base` tokens.

    Ctrl-C may interrupt the caller's thread anywhere, so the caller may call `wait` again.
    """

    def __init__(self, base: int, assumed: Sequence[int], propose: Callable[[], Proposal]) -> None:
        self.base, self.assumed = base, list(assumed)
        self.proposal = NOTHING
        self.error: BaseException | None = None
        self._propose = propose
        self._begun = self._cancelled = False
        self._done = Event()

    def start(self) -> None:
        Thread(target=self._work, name="pard-onnx draft").start()

    def _work(self) -> None:
        self._begun = True  # before _cancelled is read: `wait` writes and reads the two in the opposite order
        try:
            if not self._cancelled:
                self.proposal = self._propose()
        except BaseException as error:  # for the caller, who decides whether it matters
            self.error = error
        finally:
            self._done.set()

    def wait(self) -> None:
        """Wait until the thread has ended. A thread that has not begun will do nothing. Ctrl-C is raised afterwards."""
        self._cancelled = True
        interrupt = None
        while self._begun and not self._done.is_set():
            try:
                self._done.wait()
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt:
            raise interrupt


class AheadDrafter(Drafter):
    """A `PardDrafter` that drafts the next round while the target verifies this one, where that pays."""

    def __init__(self, pard: PardDrafter, policy: AheadPolicy, eos_ids: frozenset[int] = frozenset()) -> None:
        """eos_ids: tokens after which nothing needs to be drafted."""
        self._pard = pard
        self._policy = policy
        self._eos_ids = eos_ids
        self._last, self._last_at = NOTHING, 0  # the last proposal with its guess, and the number of tokens before it
        self._task: AheadTask | None = None
        self._verify_start: float | None = None  # perf_counter() when the target began, if `run_ahead` was called

    @property
    def length(self) -> int:
        """The tokens in the draft's cache that are certain, without those of a task that is running."""
        return self._task.base if self._task else self._pard.length

    def rollback(self, length: int) -> None:
        if task := self._task:
            try:
                task.wait()
            finally:  # an error of the task does not matter: its proposal is not used
                self._pard.rollback(min(self._pard.length, task.base))
                self._task = None
        self._last = NOTHING
        self._pard.rollback(length)

    def lag(self, committed: Sequence[int]) -> int:
        """See PardDrafter.lag. A task that runs is ended first, so that its rows count."""
        self._end_task(committed)
        return self._pard.lag(committed)

    def propose(self, committed: Sequence[int], k: int, window: int | None = None, whole: bool = False) -> Proposal:
        """See PardDrafter.propose. `Proposal.ahead` says that the proposal was made ahead."""
        self._end_task(committed)
        if not (self._last.ahead and self._last_at == len(committed)):
            lag = min(self._pard.lag(committed), window or MEASURED_LAG)
            length = self._policy.length_to_request(lag, k)
            self._last, self._last_at = self._draft(committed, length, window, whole), len(committed)
        return self._last.first(k)

    def run_ahead(self, committed: Sequence[int], proposal: Proposal, k: int) -> bool:
        """See Drafter.run_ahead."""
        self._verify_start = perf_counter()
        count, last = len(proposal.ids), self._last
        assumed = last.ids[: count + 1]
        if k < 1 or self._last_at != len(committed) or len(assumed) <= count or assumed[:count] != proposal.ids:
            return False
        if self._eos_ids.intersection(assumed) or not self._policy.pays(last.probabilities, count, k):
            return False
        conversation, length = [*committed, *assumed], self._policy.length_to_request(count + 1, k)
        self._task = AheadTask(len(committed), assumed, lambda: self._draft(conversation, length))
        self._task.start()
        return True

    def observe(self, drafted: int, matched: int) -> None:
        if self._verify_start is not None:
            self._policy.observe_verify_step(drafted, perf_counter() - self._verify_start)
        self._verify_start = None

    def _draft(self, committed: Sequence[int], k: int, window: int | None = None, whole: bool = False) -> Proposal:
        """The draft model's proposal. Its step is timed, unless it reads more tokens than a round's step does."""
        lag = max(1, self._pard.lag(committed))
        start = perf_counter()
        proposal = self._pard.propose(committed, k, window, whole)
        if whole:
            return proposal
        if lag <= MEASURED_LAG:
            self._policy.observe_draft_step(lag + k - 1, perf_counter() - start)
        return proposal

    def _end_task(self, committed: Sequence[int]) -> None:
        """Learn from the last proposal, end the task that runs, and keep what it computed for tokens that are true."""
        after = list(committed[self._last_at :])
        if after and self._last.ids:
            last, self._last = self._last, NOTHING
            compared = min(len(last.ids), len(after))
            self._policy.observe_proposal(last.probabilities, compared, common_prefix(last.ids, after))
        if (task := self._task) is None:
            return
        task.wait()
        after = list(committed[task.base :])
        self._pard.rollback(min(self._pard.length, task.base + common_prefix(task.assumed, after)))
        right = task.assumed == after
        if right:
            self._last, self._last_at = replace(task.proposal, ahead=bool(task.proposal.ids)), len(committed)
        self._task = None
        if right and task.error:  # raised here as without a thread; if the assumption was wrong, it does not matter
            raise task.error
