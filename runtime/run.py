"""`Run`: one generation of a sequence, a round at a time, whose place another generation may take over in between."""

from __future__ import annotations

from collections.abc import Callable, Generator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Generic, Protocol

from .decoding.loop import FinishReason, Halted, Step
from .model import SessionLock
from .sequence import Sequence
from .sessions.kv_cache import KvCache
from .sessions.session import AnySession, BeforeStep, DraftSession, Features, Floats, Ids, Rows, TargetSession
from .turns import Abandoned, Ticket, Turns, never

if TYPE_CHECKING:
    from .decoding.draft_mode import Columns


class Source(Protocol):
    """Where a run has its sequence from while it has a place."""

    def take(self, ids: Tokens[int]) -> Sequence:
        """A sequence of these tokens, with the KV rows of as many of the first ones as there are."""
        ...

    def keep(self, sequence: Sequence, *, failed: bool = False) -> None:
        """The run has ended, or has lost its place. failed: nobody knows what its last step has written."""
        ...


@dataclass(frozen=True, slots=True)
class OwnSequence:
    """The `Source` of a run whose sequence belongs to a caller, who keeps it."""

    sequence: Sequence

    def take(self, ids: Tokens[int]) -> Sequence:
        self.sequence.continue_with(ids)
        return self.sequence

    def keep(self, sequence: Sequence, *, failed: bool = False) -> None:
        """It stays where it is."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A sequence that rounds are run on."""

    sequence: Sequence
    rounds: Generator[Step, None, None]
    seats: tuple[Seat[Any], ...]

    def close(self) -> None:
        """Each cache then holds a prefix of the sequence's tokens, and no session has one of them."""
        self.rounds.close()
        for seat in self.seats:
            seat.leave()


Open = Callable[[Sequence, int], Opened]  # (sequence, the most tokens that may follow)


class Run:
    """One generation. It has a sequence while it has a place; without `places`, from its first round to its end."""

    def __init__(
        self,
        turns: Turns,
        ticket: Ticket,
        source: Source,
        ids: Tokens[int],
        most: int,
        open_rounds: Open,
        *,
        places: bool = True,
    ) -> None:
        """ids: the prompt. most: new tokens. open_rounds: begins to decode a sequence. places: wait for a place."""
        self._turns, self._ticket, self._source, self._open_rounds = turns, ticket, source, open_rounds
        self._tokens, self._end = list(ids), len(ids) + most
        self._places = places
        # At most one. Whoever pops it closes it: the reader's thread, or the one that takes over the place.
        self._opened: list[Opened] = []
        self._failed = False
        self._halt: FinishReason | None = None  # why the run ended while it waited
        ticket.park = self._leave_sequence

    def begin(self) -> tuple[int, float]:
        """Wait for a place; the tokens of the prompt whose KV rows are there already, and the seconds of the wait."""
        start = perf_counter()
        try:
            if self._places:
                self._turns.enter(self._ticket)
            waited = perf_counter() - start
            sequence = self._source.take(self._tokens)
            # One row is computed even if all are there: the first token is chosen from it.
            cached = min(sequence.target.length, len(self._tokens) - 1)
            self._opened.append(self._open_rounds(sequence, self._end - len(self._tokens)))
        except Halted as halt:
            self._halt = halt.reason
            return 0, perf_counter() - start
        finally:
            self._turns.pause(self._ticket)
        return cached, waited

    def rounds(self) -> Generator[Step, None, None]:
        """The rounds, after `begin`. A run that is halted while it waits ends with an empty one."""
        try:
            while (step := self._step()) is not None:
                yield step
            if self._halt:
                yield Step((), 0, 0, 0, self._halt)
        finally:
            self.close()

    def _step(self) -> Step | None:
        """The next round; None after the last one."""
        turns, ticket = self._turns, self._ticket
        if self._halt:
            return None
        try:
            if self._places and not turns.enter(ticket):
                self._opened.append(self._reopened())
            turns.take_turn(ticket)
            return next(self._opened[0].rounds, None)
        except Halted as halt:
            self._halt = halt.reason
            return None
        except Exception as error:
            self._failed = not isinstance(error, Abandoned)
            raise
        finally:
            turns.end_turn(ticket)
            turns.pause(ticket)

    def _reopened(self) -> Opened:
        """Go on in another place: what the KV caches lack by now is computed again."""
        return self._open_rounds(self._source.take(self._tokens), self._end - len(self._tokens))

    def _leave_sequence(self) -> None:
        """End the rounds and give the sequence back. The next round begins to decode anew."""
        try:
            opened = self._opened.pop()
        except IndexError:
            return
        self._tokens = list(opened.sequence.tokens)
        opened.close()
        self._source.keep(opened.sequence, failed=self._failed)

    def close(self) -> None:
        """End the run, free its place and give its sequence back. May be called again."""
        try:
            self._leave_sequence()
        finally:
            self._turns.end_turn(self._ticket)
            self._turns.leave(self._ticket)
            self._ticket.park = self._ticket.check = never  # no cycle of references keeps KV caches alive


class Seat(Generic[AnySession]):
    """One sequence's place in a session: before each step the session is given this sequence's cache."""

    def __init__(self, session: AnySession, cache: KvCache, before_step: BeforeStep, lock: SessionLock) -> None:
        self._session, self._cache = session, cache
        self._before_step, self._lock = before_step, lock

    @property
    def length(self) -> int:
        return self._cache.length

    def rollback(self, length: int) -> None:
        self._cache.rollback(length)

    def leave(self) -> None:
        """Take the cache out of the session, so that it is freed with its sequence."""
        with self._lock:
            if self._session.cache is self._cache:
                self._session.detach()


class TargetSeat(Seat[TargetSession]):
    """A `TargetModel` of the decoding loop."""

    def __init__(
        self,
        session: TargetSession,
        cache: KvCache,
        before_step: BeforeStep,
        lock: SessionLock,
        *,
        features: bool = False,
        columns: Columns | None = None,
    ) -> None:
        """features: whether the drafter reads the target's hidden states; otherwise no step gives them. columns: those
        of them that it reads, see `columns_to_read`."""
        super().__init__(session, cache, before_step, lock)
        self._features, self._columns = features, columns

    def step(self, ids: Tokens[int], keep: int) -> Rows:
        with self._lock:
            self._session.attach(self._cache, self._before_step)
            rows = self._session.step(ids, keep, True) if self._features else self._session.step(ids, keep)
            if self._columns is not None and rows.features is not None:
                rows = Rows(rows.logits, rows.features[:, self._columns])
            return rows.copy() if self._lock.lent else rows  # another engine's step may follow at once


class DraftSeat(Seat[DraftSession]):
    """A `DraftModel` of a `PardDrafter`."""

    def step(self, ids: Tokens[int], draft_length: int, features: Features | None = None) -> tuple[Ids, Floats]:
        with self._lock:
            self._session.attach(self._cache, self._before_step)
            step = self._session.step
            drafts, probabilities = step(ids, draft_length) if features is None else step(ids, draft_length, features)
            return drafts.copy(), probabilities.copy()  # another sequence's step may follow at once
