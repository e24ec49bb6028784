"""What the commands share: UTF-8 streams, and errors to exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from pard_onnx.models.errors import PardError

INTERRUPTED = 130  # 128 + SIGINT, as shells count


def utf8_streams() -> None:
    """Make stdin, stdout and stderr UTF-8, which on Windows they are not."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # tests and notebooks put other objects there
        if reconfigure:
            reconfigure(encoding="utf-8")


def exit_code(command: Callable[[], None]) -> int:
    """Run a command: 0 done, 2 bad input, 1 failure, each told in one line on stderr; 130 interrupted."""
    utf8_streams()
    try:
        command()
        sys.stdout.flush()
    except PardError as error:
        return complain(str(error), error.exit_code)
    except BrokenPipeError:  # the reader has left; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return complain(str(error), 1)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def complain(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on stderr, one a stage: call with its name, what is done and the total."""
    columns = (TextColumn("{task.description:>8}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress
