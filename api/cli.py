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
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.devices import DEFAULT_FORM, Form
from pard_onnx.models.errors import BadInput, PardError, PardWarning
from pard_onnx.models.hub import resolve_checkpoint
from pard_onnx.models.manifest import KvCacheFormat, Manifest, Source
from pard_onnx.models.precision import Precision

if TYPE_CHECKING:
    from pard_onnx.quantize.draft_vocabulary import SelectedVocabulary
    from pard_onnx.quantize.quantizer import QuantizationRequest

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
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on stderr, one a stage: call with its name, what is done and the total."""
    columns = (TextColumn("{task.description:>8}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}

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


def export_with_progress(
    checkpoint: Checkpoint,
    source: Source,
    output: Path,
    precision: Precision,
    *,
    form: Form = DEFAULT_FORM,
    capacity: int | None = None,
    kv_cache: KvCacheFormat = "float",
    verify: bool = True,
    force: bool = False,
    order: QuantizationRequest | None = None,
    vocabulary: SelectedVocabulary | None = None,
) -> Manifest:
    """Export with bars on stderr; arguments as of `export.exporter.Job`. BadInput where the export extra is missing.

    torch is imported here, after what only reads headers: it takes seconds, and bad input is told at once.
    """
    with _export_extra():
        from pard_onnx.export.exporter import Job, export
    job = Job(
        checkpoint,
        source,
        output,
        precision,
        form=form,
        capacity=capacity,
        kv_cache=kv_cache,
        verify=verify,
        force=force,
        order=order,
        vocabulary=vocabulary,
    )
    with stages() as progress:
        return export(job, progress)


def requantize_with_progress(
    folder: Path, output: Path, order: QuantizationRequest, *, kv_cache: KvCacheFormat | None, verify: bool, force: bool
) -> Manifest:
    """Quantize the float export in `folder` with bars on stderr; arguments as of `export.job.requantized`."""
    with _export_extra():
        from pard_onnx.export.exporter import export
        from pard_onnx.export.float_export import FloatExport
        from pard_onnx.export.job import requantized
    job = requantized(FloatExport.open(folder), output, order, kv_cache=kv_cache, verify=verify, force=force)
    with stages() as progress:
        return export(job, progress)


@contextmanager
def _export_extra() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise BadInput(f'{error.name} is not installed; run: pip install "pard-onnx[cpu,export]"') from error


def exported(name: str, place: Path, precision: Precision) -> Path:
    """The exported folder of a shipped model, made now unless it is there."""
    output = place / f"{name}-{precision}"
    if not output.exists():
        folder, source = resolve_checkpoint(name)
        print(f"exporting {name} to {precision}", file=sys.stderr)
        export_with_progress(Checkpoint.open(folder), source, output, precision)
    return output
