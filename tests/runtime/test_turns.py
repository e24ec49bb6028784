"""Places and turns: first come, first served; places that nobody uses are taken over; nothing stays behind."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pard_onnx import Busy, Failure
from pard_onnx.runtime import turns as module
from pard_onnx.runtime.decoding.loop import Halted
from pard_onnx.runtime.turns import Abandoned, Ticket, Turns

PATIENCE = 20.0


def ticket(reader: object = None) -> Ticket:
    out = Ticket()
    out.reader = reader if reader is not None else object()

    def check() -> None:
        if out.abandoned:
            raise Abandoned
        if out.cancelled:
            raise Halted("cancelled")

    out.check = check
    return out


def empty(turns: Turns) -> bool:
    return turns.idle and not (turns._live or turns._waiting or turns._next or turns._holder)


@contextmanager
def thread(work: object) -> Iterator[threading.Thread]:
    """A thread that must have ended at the end of the block, without an error."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)

    out = threading.Thread(target=run, daemon=True)
    out.start()
    yield out
    out.join(PATIENCE)
    assert not out.is_alive() and not errors, errors


def until(condition: object) -> None:
    end = time.perf_counter() + PATIENCE
    while not condition():  # type: ignore[operator]
        assert time.perf_counter() < end
        time.sleep(0.001)


def test_places_are_given_in_the_order_of_requests() -> None:
    turns, order = Turns(2), []
    first = [ticket(), ticket()]
    for one in first:
        assert turns.enter(one) is False and turns.enter(one) is True
    later = [ticket() for _ in range(6)]

    def wait(one: Ticket) -> None:
        turns.enter(one)
        order.append(one)
        turns.leave(one)

    threads = []
    for number, one in enumerate(later):
        threads.append(threading.Thread(target=wait, args=(one,), daemon=True))
        threads[-1].start()
        until(lambda n=number: len(turns._waiting) == n + 1)
    turns.leave(first[0])
    for one in threads:
        one.join(PATIENCE)
    assert order == later
    turns.leave(first[1])
    assert empty(turns)


@pytest.mark.parametrize("queue", [0, 1, 3])
def test_a_full_queue_refuses_at_once(queue: int) -> None:
    turns = Turns(1, queue)
    live = ticket()
    turns.enter(live)
    waiting = [ticket() for _ in range(queue)]

    def wait(one: Ticket) -> None:
        with pytest.raises(Halted):
            turns.enter(one)
        turns.leave(one)

    threads = [threading.Thread(target=wait, args=(one,), daemon=True) for one in waiting]
    for one in threads:
        one.start()
    until(lambda: len(turns._waiting) == queue)
    refused = ticket()
    with pytest.raises(Busy, match=r"^1 generations run( and \d wait)?, the most that this pair allows; .* max_live"):
        turns.enter(refused)
    for one in waiting:
        one.cancel()
    for one in threads:
        one.join(PATIENCE)
    turns.leave(live)
    turns.leave(refused)
    assert empty(turns)


def test_rounds_go_round() -> None:
    """While one waits for its turn, each of the others has one round at most."""
    turns, log, asked = Turns(5), [], {}

    class Line(deque[Ticket]):
        def append(self, one: Ticket) -> None:
            asked[one] = len(log)
            super().append(one)

    turns._next = Line()
    ready = threading.Barrier(5)

    def work(number: int) -> None:
        one = ticket()
        turns.enter(one)
        ready.wait(PATIENCE)
        for _ in range(40):
            turns.take_turn(one)
            others = log[asked.pop(one, len(log)) :]
            assert len(set(others)) == len(others) and number not in others
            log.append(number)
            time.sleep(0.0005)
            turns.end_turn(one)
        turns.leave(one)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(5)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(PATIENCE)
    assert Counter(log) == dict.fromkeys(range(5), 40)
    assert empty(turns)


def test_a_long_round_lets_others_go_first() -> None:
    turns, long, short = Turns(2), ticket(), ticket()
    log: list[str] = []
    turns.take_turn(long)
    turns.pass_on(long)  # nobody waits

    def other() -> None:
        turns.take_turn(short)
        log.append("short")
        turns.end_turn(short)

    with thread(other):
        until(lambda: turns._next)
        log.append("chunk")
        turns.pass_on(long)
        log.append("chunk")
        turns.end_turn(long)
    assert log == ["chunk", "short", "chunk"]
    assert empty(turns)


def test_a_generation_within_a_round_is_refused_instead_of_waiting_for_itself() -> None:
    turns, outer, inner = Turns(2), ticket(), ticket()
    turns.take_turn(outer)
    with pytest.raises(Failure, match="within a round of a generation cannot generate itself"):
        turns.take_turn(inner)
    turns.end_turn(inner)
    assert turns._holder is outer
    turns.end_turn(outer)
    assert empty(turns)


def test_a_stream_that_its_own_thread_left_loses_its_place_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 1000.0)
    turns, parked = Turns(2), []
    held = [ticket("me"), ticket("me")]
    for one in held:
        one.park = lambda one=one: parked.append(one)  # type: ignore[misc]
        turns.enter(one)
        turns.pause(one)
    mine = ticket("me")
    assert turns.enter(mine) is False
    assert parked == held[:1]  # the one that was read the longest ago
    assert turns.enter(held[0]) is False and parked == held[:1] + held[1:]
    for one in (*held, mine):
        turns.leave(one)
    assert empty(turns)


def test_a_stream_that_nobody_reads_loses_its_place_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    turns, parked = Turns(2), []
    idle, busy = ticket(), ticket()
    for one in (idle, busy):
        one.park = lambda one=one: parked.append(one)  # type: ignore[misc]
        turns.enter(one)
    turns.pause(idle)  # `busy` is within a long round
    start = time.perf_counter()
    late = ticket()
    turns.enter(late)
    assert parked == [idle] and 0.04 < time.perf_counter() - start < PATIENCE
    turns.leave(busy)
    assert turns.enter(idle) is False
    for one in (idle, late):
        turns.leave(one)
    assert empty(turns)


def test_a_wait_ends_with_its_deadline_and_leaves_the_queue() -> None:
    turns, live = Turns(1), ticket()
    turns.enter(live)
    late = Ticket(time.perf_counter() + 0.02)

    def check() -> None:
        if time.perf_counter() > (late.deadline or 0.0):
            raise Halted("timeout")

    late.check = check
    with pytest.raises(Halted):
        turns.enter(late)
    turns.leave(late)
    turns.leave(live)
    assert empty(turns)


def test_waking_and_waiting_in_any_order() -> None:
    one = ticket()
    one.wake()
    one.wake()
    start = time.perf_counter()
    one.wait(PATIENCE)
    assert time.perf_counter() - start < PATIENCE / 2
    one.wait(0.01)  # both calls of `wake` were one
    assert time.perf_counter() - start >= 0.01


def test_a_ticket_that_garbage_collection_leaves_with_frees_its_place_within_any_call() -> None:
    class Dropped:
        def __init__(self, turns: Turns) -> None:
            self.turns, self.ticket, self.me = turns, ticket(), self
            turns.enter(self.ticket)

        def __del__(self) -> None:
            self.turns.end_turn(self.ticket)
            self.turns.leave(self.ticket)

    threshold = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(1)  # at almost every allocation
    try:
        turns = Turns(3)
        for _ in range(20):
            Dropped(turns)
            one = ticket()
            turns.enter(one)
            turns.take_turn(one)
            turns.end_turn(one)
            turns.leave(one)
            gc.collect()
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()
    assert empty(turns)


@pytest.mark.parametrize("seed", range(3))
def test_ends_at_random_leave_nothing_behind(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many threads that wait, run, pause, are cancelled and abandoned; at no time are there more live than places."""
    monkeypatch.setattr(module, "PATIENCE", 0.002)
    turns, most = Turns(3), []
    tickets = [ticket(number % 7) for number in range(40)]

    def work(number: int) -> None:
        one, chance = tickets[number], random.Random(seed * 1000 + number)
        try:
            for _ in range(chance.randint(1, 12)):
                turns.enter(one)
                most.append(len(turns._live))
                turns.take_turn(one)
                assert turns._holder is one
                turns.pass_on(one)
                turns.end_turn(one)
                turns.pause(one)
                if chance.random() < 0.3:
                    time.sleep(0.004)
        except (Halted, Abandoned):
            pass
        finally:
            turns.end_turn(one)
            turns.leave(one)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(tickets))]
    chance = random.Random(seed)
    for one in threads:
        one.start()
    for one in chance.sample(tickets, 15):
        chance.choice([one.cancel, one.abandon])()
        time.sleep(0.001)
    for one in threads:
        one.join(PATIENCE)
        assert not one.is_alive()
    assert empty(turns) and max(most) <= 3
