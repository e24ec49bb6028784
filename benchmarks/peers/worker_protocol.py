"""The protocol of the worker scripts: a request on stdin and events on stdout, each a JSON object on one line.

A worker runs in the environment of its framework, so this file and the workers import only the standard library, numpy
and that framework. Their folder is the first entry of sys.path, so no file in it may have the name of a module that a
framework imports.
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

WARM_UP_TOKENS = 16  # enough for several rounds
TUNING_TOKENS = 48  # of each prompt, while draft lengths are compared
TUNING_PROMPTS = 2
Emit = Callable[[Iterable[int]], None]
Generate = Callable[[list[int], int, Emit, int], None]  # prompt, limit, emit, draft length
Send = Callable[..., None]  # takes an event's fields


@dataclass(frozen=True)
class Request:
    """Prompts to decode."""

    mode: str
    models: dict[str, str]  # paths of the "target" and the "draft"
    threads: int
    prompts: list[list[int]]
    max_new_tokens: int
    eos_ids: list[int]
    warm_up: int  # generations before the first that is timed
    format: str = ""
    draft_lengths: list[int] = field(default_factory=list)  # the fastest one is used; none in plain decoding
    settings: dict[str, Any] = field(default_factory=dict)  # for this worker alone

    @property
    def longest(self) -> int:
        """The most tokens of a prompt and its generation."""
        return max(map(len, self.prompts)) + self.max_new_tokens

    @property
    def longest_draft(self) -> int:
        """The largest draft length; 0 in plain decoding."""
        return max(self.draft_lengths, default=0)


class Recorder:
    """The tokens of one generation and their times; `full` is set when the generation is complete."""

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


def serve(
    packages: Iterable[str],
    load: Callable[[Request], Generate],
    make_form: Callable[[dict[str, str]], None] | None = None,
) -> None:
    """Answer the request on stdin; an error becomes the last event.

    packages: the distributions whose versions are sent.
    load: returns `generate(prompt, limit, emit, draft_length)`. It imports the framework, so that a missing one becomes
    an event. Tokens are timed when they are given to `emit`; tokens after an end of text or the limit are dropped.
    make_form: answers a request {"form": values} by converting a model, for workers that do so.
    """
    events = own_stdout()

    def send(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    try:
        request = json.loads(sys.stdin.readline())
        Thread(target=end_with_parent, daemon=True).start()
        if "form" in request:
            assert make_form is not None
            make_form(request["form"])
            send(event="end")
        else:
            _decode(Request(**request), packages, load, send)
    except ImportError as error:
        name = (error.name or "").split(".")[0]
        send(event="skipped", reason=f"{name} is not installed" if name else one_line(error))
    except Exception as error:
        send(event="failed", reason=f"{type(error).__name__}: {one_line(error)}")


def end_with_parent() -> None:
    """End this process when stdin is closed, which happens when the parent process ends, in whatever way."""
    while os.read(0, 1024):  # not sys.stdin, whose lock no thread may hold at exit
        pass
    os._exit(1)


def own_stdout() -> TextIO:
    """The real stdout, for events only; all other output of this process, also from C code, then goes to stderr."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return events


def _decode(request: Request, packages: Iterable[str], load: Callable[[Request], Generate], send: Send) -> None:
    os.environ["OMP_NUM_THREADS"] = str(request.threads)  # before any framework reads it
    before = perf_counter()
    generate = load(request)
    send(event="ready", versions=versions(packages), load_seconds=perf_counter() - before)

    def record(prompt: list[int], most: int, length: int) -> Recorder:
        limit = min(most, request.max_new_tokens)
        recorder = Recorder(limit, request.eos_ids)
        generate(prompt, limit, recorder, length)
        return recorder

    for i in range(request.warm_up):
        record(request.prompts[i % len(request.prompts)], WARM_UP_TOKENS, request.longest_draft)
    length = fastest(request, record)
    for i, prompt in enumerate(request.prompts):
        one = record(prompt, request.max_new_tokens, length)
        send(event="sample", prompt=i, tokens=one.tokens, first_seconds=one.first, total_seconds=one.total)
    send(event="end", peak_bytes=peak_bytes(), draft_length=length)


def fastest(request: Request, record: Callable[[list[int], int, int], Recorder]) -> int:
    """The draft length that decodes the first prompts at the highest rate."""
    if len(request.draft_lengths) < 2:
        return request.longest_draft
    rates = {}
    for length in request.draft_lengths:
        recorders = [record(prompt, TUNING_TOKENS, length) for prompt in request.prompts[:TUNING_PROMPTS]]
        seconds = sum(one.total - one.first for one in recorders)
        rates[length] = sum(len(one.tokens) for one in recorders) / seconds if seconds else 0.0
    return max(rates, key=rates.__getitem__)


def token_streamer(emit: Emit) -> Any:
    """A streamer for transformers' `generate` that emits the new tokens; for the workers that use transformers."""
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):
        """The first tokens that it receives are the prompt's."""

        def __init__(self) -> None:
            self.prompt_received = False

        def put(self, value: Any) -> None:
            if self.prompt_received:
                emit(value.reshape(-1).tolist())
            self.prompt_received = True

        def end(self) -> None: ...

    return Streamer()


def one_line(error: object) -> str:
    return " ".join(str(error).split())[:500]


def versions(packages: Iterable[str]) -> list[tuple[str, str]]:
    found = []
    for name in packages:
        with suppress(PackageNotFoundError):
            found.append((name, version(name)))
    return found


def peak_bytes() -> int | None:
    """The most resident memory that this process has held; None if the system does not report it."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count memory of the parent process before the start
        fields = dict(line.split(":", 1) for line in status.read_text("utf-8").splitlines() if ":" in line)
        return 1024 * int(fields["VmHWM"].split()[0])
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
