"""Who may run: a few generations are live and take turns round by round; the others wait in the order they came in.

A live generation has a place, and with it KV caches. It keeps the place until it ends. A place whose stream nobody
reads is taken over by a generation that waits: at once if it waits in the same thread or task, which cannot read on
before the wait ends, otherwise after `PATIENCE`. The stream that lost its place waits for another one when it is read
again.
"""

from __future__ import annotations

import atexit
import sys
from collections import deque
from collections.abc import Callable
from threading import TIMEOUT_MAX, Event, Lock, RLock, current_thread, get_ident, main_thread
from time import perf_counter, sleep
from weakref import WeakSet

from pard_onnx.models.errors import Busy, Failure

from .asynchronous import LAST_STEP

PATIENCE = 1.0  # seconds without a reader after which a stream's place may be taken over
SLICE = 0.1  # seconds that a wait in the main thread may last on Windows, where Ctrl-C does not end it


class Abandoned(Exception):
    """Raised between two steps of a generation that nobody reads any more: it ends without a result."""


def never() -> None:
    """The `check` and the `park` of a ticket for which there is nothing to do."""


class Ticket:
    """What a generation holds while it waits for a place, for its turn, or for its reader.

    Whatever may be called while another thread waits (`cancel`, `abandon`, `wake`) takes no lock, so that it can be
    called by signal handlers and by garbage collection.
    """

    __slots__ = (
        "_wake", "abandoned", "cancelled", "check", "deadline", "park", "parking", "paused_at", "reader", "reading",
    )  # fmt: skip

    def __init__(self, deadline: float | None = None) -> None:
        """deadline: of perf_counter(); a wait ends there, so that `check` can raise."""
        self._wake = Lock()
        self._wake.acquire()
        self.deadline = deadline
        self.cancelled = self.abandoned = False
        self.check: Callable[[], None] = never  # raises `Halted` or `Abandoned` if the generation must end
        self.park: Callable[[], None] = never  # ends the rounds and gives the KV caches away, until the next round
        # Where its reader is. Written under the lock of `Turns`, but for `paused_at`:
        self.reader: object = None  # the thread or the task that read last
        self.reading = False  # whether a round is asked for or runs
        self.parking = False  # whether `park` runs in another thread
        self.paused_at = 0.0  # perf_counter() at the end of the last round

    def cancel(self) -> None:
        """End the generation before its next step, with what it has."""
        self.cancelled = True
        self.wake()

    def abandon(self) -> None:
        """End the generation before its next step, without a result."""
        self.abandoned = True
        self.wake()

    def wake(self) -> None:
        """End a wait, or the next one if there is none."""
        try:
            self._wake.release()
        except RuntimeError:  # it was not waited since the last call
            return

    def wait(self, seconds: float | None = None) -> None:
        """Wait until `wake`, the deadline, or so many seconds. Whoever waits looks again at what it waits for."""
        limits = [TIMEOUT_MAX]
        if seconds is not None:
            limits.append(seconds)
        if self.deadline is not None:
            limits.append(self.deadline - perf_counter())
        if sys.platform == "win32" and current_thread() is main_thread():
            limits.append(SLICE)
        self._wake.acquire(timeout=max(0.0, min(limits)))


class Turns:
    """The places of live generations, those who wait for one, and whose turn the next round is."""

    def __init__(self, max_live: int, queue: int | None = None) -> None:
        """max_live: generations that have a place at the same time. queue: how many may wait; None for any number."""
        self.max_live, self.queue = max_live, queue
        # Reentrant: garbage collection may close a stream while its thread is in here. `leave` is all that it calls.
        self._mutex = RLock()
        self._open: set[Ticket] = set()  # all that have begun and not ended
        self._live: set[Ticket] = set()
        self._waiting: deque[Ticket] = deque()
        self._handing_on = False
        self._holder: Ticket | None = None  # whose round runs
        self._thread: int | None = None  # in which it runs
        self._next: deque[Ticket] = deque()  # those who wait for their turn
        ALL.add(self)

    @property
    def occupancy(self) -> tuple[int, int]:
        """How many generations have a place, and how many wait for one."""
        return len(self._live), len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether no generation has begun that has not ended."""
        return not self._open

    def wait_for_abandoned(self) -> None:
        """Wait for generations that nobody reads any more to end, which takes a step at most."""
        while any(ticket.abandoned for ticket in tuple(self._open)):
            sleep(0.001)

    def enter(self, ticket: Ticket) -> bool:
        """Begin to read: wait for a place unless the ticket has one; whether it had one.

        Raises Busy if too many wait, and what `ticket.check` raises.
        """
        with self._mutex:
            if ticket in self._live:
                ticket.reading = True
                return True
            if not self._waiting and len(self._live) < self.max_live and not ticket.parking:
                self._open.add(ticket)
                self._live.add(ticket)
                ticket.reading = True
                return False
            if ticket not in self._open and self.queue is not None and len(self._waiting) >= self.queue:
                raise self._busy()
            self._open.add(ticket)
            self._waiting.append(ticket)
        while ticket.parking or ticket not in self._live:
            ticket.check()
            ticket.wait(self._take_over(ticket))
        return False

    def pause(self, ticket: Ticket) -> None:
        """End to read: the ticket keeps its place, until another one takes it over."""
        ticket.paused_at = perf_counter()
        ticket.reading = False

    def leave(self, ticket: Ticket) -> None:
        """Give up the place, or the wait for one. May be called again, and by garbage collection."""
        with self._mutex:
            self._open.discard(ticket)
            self._live.discard(ticket)
            remove(self._waiting, ticket)
            self._hand_on()

    def _hand_on(self) -> None:
        """Give free places to those who wait. A call inside another one leaves the work to that one, which looks at
        the places again before each step."""
        if self._handing_on:
            return
        self._handing_on = True
        try:
            while self._waiting and len(self._live) < self.max_live:
                ticket = self._waiting.popleft()
                ticket.reading = True
                self._live.add(ticket)
                ticket.wake()
            if self._waiting:
                self._waiting[0].wake()  # who is first now watches for streams that nobody reads
        finally:
            self._handing_on = False

    def _take_over(self, ticket: Ticket) -> float | None:
        """Take over the place of a stream that nobody reads, if the ticket waits as the first; the seconds after which
        to look again."""
        with self._mutex:
            if not self._waiting or self._waiting[0] is not ticket:
                return None
            now = perf_counter()
            paused = sorted((one for one in self._live if not one.reading), key=lambda one: one.paused_at)
            own = [one for one in paused if one.reader is not None and one.reader == ticket.reader]
            late = [one for one in paused if now - one.paused_at >= PATIENCE]
            found = next(iter(own or late), None)
            if found is None:
                return PATIENCE - (now - paused[0].paused_at) if paused else PATIENCE
            found.parking = True
            self._live.discard(found)
            self._hand_on()
        try:
            found.park()
        finally:
            found.parking = False
            found.wake()
        return 0.0

    def _busy(self) -> Busy:
        waiting = f" and {self.queue} wait" if self.queue else ""
        return Busy(
            f"{len(self._live)} generations run{waiting}, the most that this pair allows; send the request again "
            "later, or load the pair with a larger max_live or queue"
        )

    def take_turn(self, ticket: Ticket) -> None:
        """Wait until the ticket's round may run: rounds run one at a time, in the order in which they were asked for.

        Raises what `ticket.check` raises; `end_turn` follows in any case.
        """
        self._wait_for_turn(ticket)
        if ENDING.is_set() and current_thread() is not main_thread():
            ticket.check()
            self.end_turn(ticket)
            stay()

    def _wait_for_turn(self, ticket: Ticket) -> None:
        with self._mutex:
            if self._holder is None:
                self._holder, self._thread = ticket, get_ident()
                return
            if self._thread == get_ident():
                raise Failure("a function that is called within a round of a generation cannot generate itself")
            self._next.append(ticket)
        while self._holder is not ticket:
            ticket.check()
            ticket.wait()
        self._thread = get_ident()

    def wait_for_round(self, end: float) -> None:
        """Wait for the round that runs in another thread, if there is one, until `end` of perf_counter() at most."""
        while self._holder is not None and self._thread != get_ident() and perf_counter() < end:
            sleep(0.002)

    def end_turn(self, ticket: Ticket) -> None:
        """The round has ended: the next one may run. May be called again, or without a turn."""
        with self._mutex:
            if self._holder is not ticket:
                remove(self._next, ticket)
                return
            self._thread = None
            self._holder = following = self._next.popleft() if self._next else None
            if following:
                following.wake()

    def pass_on(self, ticket: Ticket) -> None:
        """Let others go first, within a long round: between two chunks of a prompt. Other threads than the one of the
        round, such as that of a draft that runs ahead, have no turn to pass on."""
        if self._next and self._thread == get_ident():
            self.end_turn(ticket)
            self.take_turn(ticket)


def remove(line: deque[Ticket], ticket: Ticket) -> None:
    """Take the ticket out of the line, if it stands there."""
    try:
        line.remove(ticket)
    except ValueError:
        return


ENDING = Event()  # set when the program ends
ALL: WeakSet[Turns] = WeakSet()


def stay() -> None:
    """What a daemon thread does when the program ends: nothing, until the process has ended."""
    while True:
        sleep(60)


def finish() -> None:
    """No round begins any more, but in the main thread, and those that run are waited for: ONNX Runtime must not run
    while the interpreter ends. Threads that are no daemons have ended before."""
    ENDING.set()
    end = perf_counter() + LAST_STEP
    for turns in list(ALL):
        turns.wait_for_round(end)


atexit.register(finish)
