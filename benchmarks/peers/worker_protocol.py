"""What the worker scripts share: a request from stdin, events to stdout, one JSON object a line.

A worker runs in whatever environment its framework is installed in, so this file and the workers import
only the standard library, numpy and that framework. Their folder is the first of sys.path: the other files
of it must not be named like a module that a framework imports.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import Any, TextIO

WARM_UP_TOKENS = 16  # enough for a few rounds of every kind
TUNING_TOKENS = 48
TUNING_PROMPTS = 2
Emit = Callable[[Iterable[int]], None]
Generate = Callable[[list[int], int, Emit, int], None]  # prompt, limit, emit, draft length
Send = Callable[..., None]  # an event's fields


@dataclass(frozen=True)
class Request:
    """models: paths by their part (target, draft); settings: the peer's own, by name.

    draft_lengths: those of which the fastest on the first prompts is taken; none in plain decoding.
    """

    mode: str
    models: dict[str, str]
    threads: int
    prompts: list[list[int]]
    max_new_tokens: int
    eos_ids: list[int]
    warm_up: int
    format: str = ""
    draft_lengths: list[int] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and all that may follow it."""
        return max(map(len, self.prompts)) + self.max_new_tokens

    @property
    def farthest(self) -> int:
        """The longest draft."""
        return max(self.draft_lengths, default=0)


class Recorder:
    """Tokens of one generation as they come, and when; `full` once no more are wanted."""

    def __init__(self, limit: int, eos_ids: Iterable[int]) -> None:
        self.tokens: list[int] = []
        self.full = False
        self._limit, self._eos = limit, frozenset(eos_ids)
        self._start = perf_counter()
        self.first = self.total = 0.0

    def __call__(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            if self.full:
                return
            self.total = perf_counter() - self._start
            self.first = self.first or self.total
            if int(token) in self._eos:
                self.full = True
            else:
                self.tokens.append(int(token))
                self.full = len(self.tokens) >= self._limit


def serve(packages: Iterable[str], load: Callable[[Request], Generate]) -> None:
    """Answer the request on stdin; packages: the distributions whose versions are told.

    load: makes `generate(prompt, limit, emit, draft_length)` ready, and imports the framework, so that a missing one
    is an event like others. Tokens given to `emit` are timed as they come; what follows an EOS or the limit is dropped.
    """
    script(lambda request, send: _answer(Request(**request), packages, load, send))


def script(work: Callable[[dict[str, Any], Send], None]) -> None:
    """Do `work` with the request on stdin; what goes wrong becomes the last event."""
    events = own_stdout()

    def send(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    try:
        request = json.loads(sys.stdin.readline())
        Thread(target=end_with_parent, daemon=True).start()
        work(request, send)
    except ImportError as error:
        name = (error.name or "").split(".")[0]
        send(event="skipped", reason=f"{name} is not installed" if name else one_line(error))
    except Exception as error:
        send(event="failed", reason=f"{type(error).__name__}: {one_line(error)}")


def end_with_parent() -> None:
    """stdin stays open as long as whoever asked is there, however it ends."""
    while os.read(0, 1024):  # not sys.stdin, whose lock a thread may not hold at exit
        pass
    os._exit(1)


def own_stdout() -> TextIO:
    """The real stdout, for events only: what frameworks print, in C too, goes to stderr from here on."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return events


def _answer(request: Request, packages: Iterable[str], load: Callable[[Request], Generate], send: Send) -> None:
    os.environ["OMP_NUM_THREADS"] = str(request.threads)  # before any framework reads it
    before = perf_counter()
    generate = load(request)
    send(event="ready", versions=versions(packages), load_seconds=perf_counter() - before)

    def record(prompt: list[int], most: int, length: int) -> Recorder:
        limit = min(most, request.max_new_tokens)
        seen = Recorder(limit, request.eos_ids)
        generate(prompt, limit, seen, length)
        return seen

    for i in range(request.warm_up):
        record(request.prompts[i % len(request.prompts)], WARM_UP_TOKENS, request.farthest)
    length = fastest(request, record)
    for i, prompt in enumerate(request.prompts):
        seen = record(prompt, request.max_new_tokens, length)
        send(event="sample", prompt=i, tokens=seen.tokens, first_seconds=seen.first, total_seconds=seen.total)
    send(event="end", peak_bytes=peak_bytes(), draft_length=length)


def fastest(request: Request, record: Callable[[list[int], int, int], Recorder]) -> int:
    """Of the draft lengths the one that gives the first prompts' tokens at the highest rate."""
    if len(request.draft_lengths) < 2:
        return request.farthest
    rates = {}
    for length in request.draft_lengths:
        seen = [record(prompt, TUNING_TOKENS, length) for prompt in request.prompts[:TUNING_PROMPTS]]
        seconds = sum(one.total - one.first for one in seen)
        rates[length] = sum(len(one.tokens) for one in seen) / seconds if seconds else 0.0
    return max(rates, key=rates.__getitem__)


def one_line(error: object) -> str:
    return " ".join(str(error).split())[:500]


def versions(packages: Iterable[str]) -> list[tuple[str, str]]:
    found = []
    for name in packages:
        with suppress(PackageNotFoundError):
            found.append((name, version(name)))
    return found


def peak_bytes() -> int | None:
    """Most resident memory of this process; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held before the start
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return 1024 * int(fields["VmHWM"].split()[0])
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
