"""What the commands share: UTF-8 streams, errors to exit codes, exporting with progress bars."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich import progress as rich_progress
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from pard_onnx.export.job import Job
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checks import Progress
from pard_onnx.models.errors import BadInput, PardError, PardWarning
from pard_onnx.models.hub import resolve_checkpoint
from pard_onnx.models.manifest import Manifest
from pard_onnx.models.precision import Precision

# Names are the user's own bytes on stdout, and readable whatever they hold on stderr.
STREAMS = {"stdin": ("r", "strict"), "stdout": ("w", "surrogateescape"), "stderr": ("w", "backslashreplace")}
TRACEBACK = "PARD_ONNX_TRACEBACK"  # set: errors that nobody foresaw are shown whole
ENDS = ("SIGTERM", "SIGHUP", "SIGBREAK")  # a process manager's, a closed terminal's, a closed Windows console's


class Parser(argparse.ArgumentParser):
    """Bad options are told as every other bad input: in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help lists the options\n")


class Ended(KeyboardInterrupt):
    """A signal that would end the process at once, as Ctrl-C: what is half done is cleaned up first."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


def utf8_streams() -> None:
    """Make stdin, stdout and stderr UTF-8, which on Windows they are not; those that are closed, empty."""
    for name, (mode, errors) in STREAMS.items():
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 until the process ends
        reconfigure = getattr(getattr(sys, name), "reconfigure", None)  # tests and notebooks put other objects there
        if reconfigure:
            reconfigure(encoding="utf-8", errors=errors)


def exit_code(command: Callable[[], None]) -> int:
    """Run a command: 0 done, 2 bad input, 1 failure, each told in one line on stderr; 130 interrupted."""
    utf8_streams()
    try:
        with ended_as_interrupted(), one_line_warnings():
            command()
            sys.stdout.flush()
    except PardError as error:
        return complain(str(error), error.exit_code)
    except BrokenPipeError:  # the reader has left; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return complain(str(error), 1)
    except Ended as end:
        return end.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        return complain(f"{type(error).__name__}: {error}; not foreseen, please report it with {TRACEBACK}=1", 1)
    return 0


@contextmanager
def ended_as_interrupted() -> Iterator[None]:
    """Signals that end the process raise Ended in the body, unless someone handles or ignores them already."""

    def end(number: int, _: FrameType | None) -> None:
        raise Ended(number)

    numbers = [getattr(signal, name) for name in ENDS if hasattr(signal, name)]
    mine = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in mine:
            signal.signal(number, end)
    except ValueError:  # not in the main thread, where Python has no signals
        mine = []
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """This package's warnings on stderr as errors are told, and others as ever."""
    show = warnings.showwarning

    def tell(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, PardWarning):
            print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            show(message, category, *place, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", PardWarning)
        warnings.showwarning = tell
        yield


def complain(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


@contextmanager
def stages() -> Iterator[Progress]:
    """Progress bars on stderr, one a stage: call with its name, what is done and the total."""
    columns = (TextColumn("{task.description:>8}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    bars = rich_progress.Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, rich_progress.TaskID] = {}

    def progress(stage: str, done: int, total: int) -> None:
        bars.start()  # with the first stage: bad input found before it is one line, with no empty one above
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done, total=total)

    try:
        yield progress
    finally:
        if tasks:
            bars.stop()


def export_job(job: Job) -> Manifest:
    """Export with progress bars on stderr. BadInput where the export extra is missing.

    onnx_ir is imported here and torch while exporting, both after the checks that need neither: the imports take
    seconds, and bad input is refused at once.
    """
    with export_extra():
        from pard_onnx.export.exporter import export
    with stages() as progress:
        return export(job, progress)


@contextmanager
def export_extra() -> Iterator[None]:
    """BadInput, naming the command that installs it, for an import in the body that the export extra would bring."""
    try:
        yield
    except ImportError as error:
        raise BadInput(f'{error.name} is not installed; run: pip install "pard-onnx[cpu,export]"') from error


def exported_demo_model(name: str, parent: Path, precision: Precision) -> Path:
    """The exported folder of a shipped model in `parent`; exported now if it does not exist."""
    output = parent / f"{name}-{precision}"
    if not output.exists():
        folder, source = resolve_checkpoint(name)
        print(f"exporting {name} to {precision}", file=sys.stderr)
        export_job(Job(Checkpoint.open(folder), source, output, precision))
    return output
