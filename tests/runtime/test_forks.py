"""A pair in a forked child: every call is refused with one line, closing does nothing, and nothing waits."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pard_onnx import Chat, Failure, Pair, Stream, load

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
    # Python 3.12 warns of threads in the parent, which ONNX Runtime has
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
]
PATIENCE = 20.0

CALLS: dict[str, Callable[[Pair, Chat, Stream], Any]] = {
    "generate": lambda pair, chat, stream: pair.generate("fox"),
    "stream": lambda pair, chat, stream: pair.stream("fox"),
    "chat": lambda pair, chat, stream: pair.chat(),
    "restore": lambda pair, chat, stream: pair.restore("none"),
    "encode": lambda pair, chat, stream: pair.encode("fox"),
    "text": lambda pair, chat, stream: pair.text,
    "capacity": lambda pair, chat, stream: pair.capacity,
    "exact_widths": lambda pair, chat, stream: pair.exact_widths,
    "own_sampling": lambda pair, chat, stream: pair.own_sampling,
    "with pair": lambda pair, chat, stream: pair.__enter__(),
    "send": lambda pair, chat, stream: chat.send("fox"),
    "chat.stream": lambda pair, chat, stream: chat.stream("fox"),
    "save": lambda pair, chat, stream: chat.save("none"),
    "with chat": lambda pair, chat, stream: chat.__enter__(),
    "next": lambda pair, chat, stream: next(stream),
    "read": lambda pair, chat, stream: stream.read(),
    "cancel": lambda pair, chat, stream: stream.cancel(),
    "result": lambda pair, chat, stream: stream.result,
    "with stream": lambda pair, chat, stream: stream.__enter__(),
}


def in_child(work: Callable[[], None]) -> int | None:
    """The exit code of a forked child that does this work; None if it does not end."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(PATIENCE)
    code = child.exitcode
    child.kill()
    child.join()
    return code


def test_every_call_in_a_child_is_refused(pair_folders: tuple[Path, Path]) -> None:
    with load(*pair_folders, threads=2) as pair, pair.chat() as chat, pair.stream("fox", max_new_tokens=20) as stream:
        next(stream)

        def work() -> None:
            for name, call in CALLS.items():
                with pytest.raises(Failure, match=r"^this pair was loaded in process \d+, of which .* spawn$"):
                    call(pair, chat, stream)
                    print("not refused:", name)

        assert in_child(work) == 0
        assert len(list(stream)) > 0
        assert stream.result.stats.new_tokens == 20


@pytest.mark.parametrize("running", [False, True])
def test_a_child_closes_and_drops_a_pair_at_once(pair_folders: tuple[Path, Path], running: bool) -> None:
    """running: while a generation runs, whose locks the child has as they were."""
    held: dict[str, Any] = {"pair": load(*pair_folders, threads=2)}
    held["chat"] = held["pair"].chat()
    held["stream"] = held["pair"].stream("fox", max_new_tokens=20)
    next(held["stream"])

    def work() -> None:
        for name in ("stream", "chat", "pair"):
            held[name].close()
        held.clear()
        gc.collect()

    if running:
        with held["pair"].engine._turns._mutex:  # as if another thread were in the midst of handing a turn on
            assert in_child(work) == 0
    else:
        assert in_child(work) == 0
    assert len(list(held["stream"])) > 0
    for name in ("stream", "chat", "pair"):
        held[name].close()
