"""Blocking work for asyncio: in daemon threads of this package's own, which are used again and end when they are idle.

The executors of asyncio have few threads, which other work needs too; here as many threads run as calls wait. Daemon
threads do not keep the process alive. ONNX Runtime must not run while the interpreter ends, so at exit all work is told
to end, and its step is waited for.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from time import perf_counter, sleep
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from asyncio import Future

Found = TypeVar("Found")
IDLE = 2.0  # seconds without work after which a thread ends
LAST_STEP = 10.0  # seconds that the steps that run at exit are waited for


def do_nothing() -> None:
    """The `abandon` of work that ends soon by itself."""


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A call in a thread."""

    run: Callable[[], None]  # raises nothing
    abandon: Callable[[], None]  # makes `run` end soon


class Workers:
    """Threads that take work. All methods may be called by garbage collection: lists and queues are changed by single
    calls, which Python does not interrupt."""

    def __init__(self) -> None:
        self._idle: list[SimpleQueue[Work]] = []  # the inboxes of threads that wait
        self._running: set[Work] = set()

    def submit(self, run: Callable[[], None], abandon: Callable[[], None] = do_nothing) -> None:
        """Run it in a thread, at once."""
        work = Work(run, abandon)
        self._running.add(work)
        try:
            self._idle.pop().put(work)
        except IndexError:
            Thread(target=self._serve, args=([work],), name="pard-onnx worker", daemon=True).start()

    def _serve(self, first: list[Work]) -> None:
        inbox: SimpleQueue[Work] = SimpleQueue()
        work = first.pop()
        while True:
            work.run()
            self._running.discard(work)
            del work  # with all that it refers to
            self._idle.append(inbox)
            try:
                work = inbox.get(timeout=IDLE)
            except Empty:
                try:
                    self._idle.remove(inbox)
                except ValueError:  # work is on its way
                    work = inbox.get()
                else:
                    return

    def finish(self) -> None:
        """Tell all work to end, and wait for it."""
        end = perf_counter() + LAST_STEP
        for work in list(self._running):
            with suppress(RuntimeError):  # no thread can be started any more
                work.abandon()
        while self._running and perf_counter() < end:
            sleep(0.002)

    def forget(self) -> None:
        """In a forked child, which has none of the threads."""
        self._idle.clear()
        self._running.clear()


WORKERS = Workers()
atexit.register(WORKERS.finish)
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=WORKERS.forget)


async def in_worker(run: Callable[[], Found], abandon: Callable[[], None] = do_nothing) -> Found:
    """What `run` returns or raises (no StopIteration), from a thread.

    abandon: is called if the task is cancelled or collected meanwhile, which does not wait for the thread.
    """
    import asyncio  # imported late, as most programs do without it

    loop = asyncio.get_running_loop()
    future: Future[Found] = loop.create_future()
    context = copy_context()  # as asyncio.to_thread does

    def work() -> None:
        try:
            found = context.run(run)
        except BaseException as error:
            outcome: Callable[[], None] = _failed(future, error)
        else:
            outcome = _succeeded(future, found)
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(outcome)

    WORKERS.submit(work, abandon)
    try:
        return await future
    except BaseException:
        if future.cancelled() or not future.done():
            abandon()
        raise


def _succeeded(future: Future[Found], found: Found) -> Callable[[], None]:
    return lambda: None if future.done() else future.set_result(found)


def _failed(future: Future[Found], error: BaseException) -> Callable[[], None]:
    return lambda: None if future.done() else future.set_exception(error)
