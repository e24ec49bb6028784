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
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

WARM_UP_TOKENS = 16  # as many as a draft's rounds need to be seen once
Emit = Callable[[Iterable[int]], None]
Generate = Callable[[list[int], int, Emit], None]


@dataclass(frozen=True)
class Request:
    """models: paths by their part (target, draft); settings: the peer's own, by name."""

    mode: str
    models: dict[str, str]
    threads: int
    prompts: list[list[int]]
    max_new_tokens: int
    eos_ids: list[int]
    warm_up: int
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and all that may follow it."""
        return max(map(len, self.prompts)) + self.max_new_tokens


class Skipped(Exception):
    """The peer cannot run here; the text says why, and what would help."""


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

    load: makes `generate(prompt, limit, emit)` ready, and imports the framework, so that a missing one is an
    event like others. Tokens given to `emit` are timed as they come; what follows an EOS or the limit is dropped.
    """
    events = own_stdout()
    request = Request(**json.loads(sys.stdin.readline()))
    try:
        _answer(request, packages, load, events)
    except ImportError as error:
        name = (error.name or str(error)).split(".")[0]
        _send(events, event="skipped", reason=f"{name} is not installed" if error.name else str(error))
    except Skipped as reason:
        _send(events, event="skipped", reason=one_line(reason))
    except Exception as error:
        _send(events, event="failed", reason=f"{type(error).__name__}: {one_line(error)}")


def own_stdout() -> TextIO:
    """The real stdout, for events only: what frameworks print, in C too, goes to stderr from here on."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return events


def _answer(request: Request, packages: Iterable[str], load: Callable[[Request], Generate], events: TextIO) -> None:
    os.environ["OMP_NUM_THREADS"] = str(request.threads)  # before any framework reads it
    before = perf_counter()
    generate = load(request)
    _send(events, event="ready", version=versions(packages), load_seconds=perf_counter() - before)
    for i in range(request.warm_up):
        prompt = request.prompts[i % len(request.prompts)]
        limit = min(WARM_UP_TOKENS, request.max_new_tokens)
        generate(prompt, limit, Recorder(limit, request.eos_ids))
    for i, prompt in enumerate(request.prompts):
        seen = Recorder(request.max_new_tokens, request.eos_ids)
        generate(prompt, request.max_new_tokens, seen)
        _send(events, event="sample", prompt=i, tokens=seen.tokens, first_seconds=seen.first, total_seconds=seen.total)
    _send(events, event="end", peak_bytes=peak_bytes())


def _send(events: TextIO, **event: Any) -> None:
    events.write(json.dumps(event) + "\n")
    events.flush()


def one_line(error: object) -> str:
    return " ".join(str(error).split())[:500]


def versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
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
