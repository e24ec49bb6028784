"""Drafting while the target verifies, where the draft has a device of its own.

A session runs in one thread at a time: while a run is under way the draft's belongs to the run's thread, and everybody
else waits for its end first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Event, Thread
from time import perf_counter

from pard_onnx.models.checks import common_prefix

from .drafter import NOTHING, Drafter, PardDrafter, Proposal
from .policy import Prospect

ORDINARY = 32  # tokens to read: catching up with more is no measure of a round's step


class Run:
    """A proposal made in a thread of its own, on the assumption that `tail` follows the first `base` tokens.

    The caller's side may be called any number of times: Ctrl-C may end it anywhere.
    """

    def __init__(self, base: int, tail: Sequence[int], propose: Callable[[], Proposal]) -> None:
        self.base, self.tail = base, list(tail)
        self.proposal = NOTHING
        self.error: BaseException | None = None
        self._propose = propose
        self._begun = self._unwanted = False
        self._done = Event()

    def start(self) -> None:
        Thread(target=self._work, name="pard-onnx draft").start()

    def _work(self) -> None:
        self._begun = True  # before the look at _unwanted, as `wait` has it the other way round
        try:
            if not self._unwanted:
                self.proposal = self._propose()
        except BaseException as error:  # for the caller, who decides whether it matters
            self.error = error
        finally:
            self._done.set()

    def wait(self) -> None:
        """Until the thread is through; one that has not begun does nothing any more. Ctrl-C is raised after that."""
        self._unwanted = True
        interrupt = None
        while self._begun and not self._done.is_set():
            try:
                self._done.wait()
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt:
            raise interrupt


class AheadDrafter(Drafter):
    """A `PardDrafter` that goes on with the next round while the target verifies, as long as that pays."""

    def __init__(self, pard: PardDrafter, prospect: Prospect, eos_ids: frozenset[int] = frozenset()) -> None:
        """eos_ids: after which nothing needs to be drafted."""
        self._pard = pard
        self._prospect = prospect
        self._eos_ids = eos_ids
        self._made, self._made_at = NOTHING, 0  # the last proposal, guess included, and the tokens before it
        self._run: Run | None = None
        self._verifying: float | None = None  # since when, if this drafter was told

    @property
    def length(self) -> int:
        """Rows that are certain: not those of a run that is under way."""
        return self._run.base if self._run else self._pard.length

    def rollback(self, length: int) -> None:
        if run := self._run:
            try:
                run.wait()
            finally:  # what it raised does not matter: nobody needs its proposal
                self._pard.rollback(min(self._pard.length, run.base))
                self._run = None
        self._made = NOTHING
        self._pard.rollback(length)

    def lag(self, committed: Sequence[int]) -> int:
        """See PardDrafter.lag; what was drafted ahead is there now."""
        self._settle(committed)
        return self._pard.lag(committed)

    def propose(self, committed: Sequence[int], k: int, window: int | None = None) -> Proposal:
        """See PardDrafter.propose. `Proposal.ahead`: it was there already."""
        self._settle(committed)
        if not (self._made.ahead and self._made_at == len(committed)):
            wanted = self._prospect.ask(min(self._pard.lag(committed), window or ORDINARY), k)
            self._made, self._made_at = self._draft(committed, wanted, window), len(committed)
        return self._made.first(k)

    def run_ahead(self, committed: Sequence[int], proposal: Proposal, k: int) -> bool:
        """See Drafter.run_ahead."""
        self._verifying = perf_counter()
        count, made = len(proposal.ids), self._made
        tail = made.ids[: count + 1]
        if k < 1 or self._made_at != len(committed) or len(tail) <= count or tail[:count] != proposal.ids:
            return False
        if self._eos_ids.intersection(tail) or not self._prospect.pays(made.probabilities, count, k):
            return False
        assumed, wanted = [*committed, *tail], self._prospect.ask(count + 1, k)
        self._run = Run(len(committed), tail, lambda: self._draft(assumed, wanted))
        self._run.start()
        return True

    def observe(self, drafted: int, matched: int) -> None:
        if self._verifying is not None:
            self._prospect.saw_step(drafted, perf_counter() - self._verifying)
        self._verifying = None

    def _draft(self, committed: Sequence[int], k: int, window: int | None = None) -> Proposal:
        """The model's own proposal, timed if the step was an ordinary one."""
        lag = max(1, self._pard.lag(committed))
        start = perf_counter()
        proposal = self._pard.propose(committed, k, window)
        if lag <= ORDINARY:
            self._prospect.saw_draft(lag + k - 1, perf_counter() - start)
        return proposal

    def _settle(self, committed: Sequence[int]) -> None:
        """End what is under way, now that its assumptions can be checked; learn from the last proposal."""
        after = list(committed[self._made_at :])
        if after and self._made.ids:
            made, self._made = self._made, NOTHING
            checked = min(len(made.ids), len(after))
            self._prospect.saw_text(made.probabilities, checked, common_prefix(made.ids, after))
        if (run := self._run) is None:
            return
        run.wait()
        after = list(committed[run.base :])
        self._pard.rollback(min(self._pard.length, run.base + common_prefix(run.tail, after)))
        right = run.tail == after
        if right:
            self._made, self._made_at = replace(run.proposal, ahead=bool(run.proposal.ids)), len(committed)
        self._run = None
        if right and run.error:  # as it would have come without a thread; otherwise nobody asked for it
            raise run.error
