"""A worker script as a process: it takes one request and sends events, the last of which says how it ended."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import IO, Any

from pard_onnx.models.errors import BadInput

Event = dict[str, Any]
FOLDER = Path(__file__).parent
LAST = ("end", "skipped", "failed")
GRACE = 10.0  # seconds to end by itself after the last event
POLL = 0.2


def events(python: Path, script: Path, request: object, silence: float) -> Iterator[Event]:
    """Run a script and yield its events; the last one is of the kind "end", "skipped" or "failed".

    silence: seconds without an event after which the worker counts as hung. If the worker dies, hangs or sends
    something else, the last event is a failed one. The process ends with the iteration, also when Ctrl-C stops it.
    Raises BadInput if there is no such Python.
    """
    with _process(python, script) as process:
        assert process.stdin and process.stdout and process.stderr
        messages: deque[str] = deque(maxlen=20)
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        readers = (_thread(_read, process.stderr, messages.append), _thread(_read, process.stdout, lines.put))
        writer = _thread(_write, process.stdin, json.dumps(request))
        try:
            while event := _next(process, lines, silence):
                yield event
                if event["event"] in LAST:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(GRACE)
                    return
            readers[0].join(POLL)
            yield {"event": "failed", "reason": _failure_reason(process, silence, messages)}
        finally:
            kill(process)
            for thread in (*readers, writer):  # a pipe may not be closed while a thread uses it
                thread.join(GRACE)
            with suppress(OSError):  # a dead worker has not read all of its input
                process.stdin.close()


def _process(python: Path, script: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if python != Path(sys.executable):  # another environment, for which this one's settings are wrong
        for name in ("PYTHONPATH", "PYTHONHOME"):
            environment.pop(name, None)
    try:
        return subprocess.Popen(
            [python, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
            start_new_session=os.name == "posix",  # so that its own child processes can be ended with it
        )
    except OSError as error:
        raise BadInput(f"{python}: is no Python that can be run: {error.strerror or error}") from error


def kill(process: subprocess.Popen[Any]) -> None:
    """End the worker and its child processes, if it still runs."""
    if process.poll() is not None:
        return
    if sys.platform != "win32":
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _thread(work: Callable[..., None], *arguments: Any) -> Thread:
    thread = Thread(target=work, args=arguments, daemon=True)
    thread.start()
    return thread


def _read(stream: IO[str], take: Callable[[Any], None]) -> None:
    for line in stream:
        take(line)
    take(None)


def _write(stream: IO[str], line: str) -> None:
    """Write a line and leave the stream open: a worker ends when its stdin is closed."""
    with suppress(OSError, ValueError):  # the worker may have ended already
        stream.write(line + "\n")
        stream.flush()


def _next(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None], silence: float) -> Event | None:
    """The next event; None if there is none."""
    deadline, ended = monotonic() + silence, False
    while monotonic() < deadline and not ended:
        ended = process.poll() is not None  # asked before its lines are read for the last time
        with suppress(queue.Empty):
            line = lines.get(timeout=POLL)
            if line is None:
                return None
            if event := _event(line):
                return event
            ended = False
    return None


def _event(line: str) -> Event | None:
    """The event of a line; None for a line that is not an event."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("event"), str) else None


def _failure_reason(process: subprocess.Popen[str], silence: float, messages: deque[str]) -> str:
    """Why there is no further event, in one line."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(POLL)  # the process ends a moment after its pipes are closed
    code = process.poll()
    if code is None:
        how = f"no word from it for {silence:g} seconds"
    elif code < 0:
        how = f"ended by signal {-code}" + (", as when memory runs out" if code == -9 else "")
    else:
        how = f"ended with exit code {code}"
    last = next((line.strip() for line in reversed(messages) if line and line.strip()), "")
    return f"{how}: {last[:500]}" if last else how
