"""What the commands share: errors to exit codes, warnings and progress on stderr, exports, what a reply shows."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pard_onnx
from pard_onnx.interrupts import Interrupts
from pard_onnx.models.atomic import recover
from pard_onnx.models.checks import Progress
from pard_onnx.models.errors import PardError, PardWarning, escaped, one_line
from pard_onnx.models.extras import needs
from pard_onnx.models.system_errors import is_out_of_memory, os_error_line, out_of_memory
from pard_onnx.standard_streams import STANDARD_OUTPUT, to_null_device, utf8_streams

if TYPE_CHECKING:  # with what a command runs by, and with rich, --help would take half a second
    from rich import progress as rich_progress

    from pard_onnx.export.job import Job
    from pard_onnx.models.checkpoints.checkpoint import Checkpoint
    from pard_onnx.models.manifest import Manifest, Source
    from pard_onnx.models.precision import Precision
    from pard_onnx.runtime.result import Chunk, Result

REASONING = SHOW, HIDE = "show", "hide"
TRACEBACK = "PARD_ONNX_TRACEBACK"  # an environment variable: if set, unexpected errors are raised with a traceback


# Control characters but tab and line end: a model's text must not move the cursor, or write to the clipboard
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def for_stdout(text: str) -> str:
    """A model's text as it is printed: on a terminal, control characters are written as their escapes."""
    return printable(text) if sys.stdout.isatty() else text


def printable(text: str) -> str:
    """The text, with escapes for control characters."""
    return CONTROLS.sub(lambda found: escaped(found[0]), text)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of all bad input, and which knows --version."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_argument(
            "--version", action=PrintVersion, nargs=0, default=argparse.SUPPRESS, help="print the version"
        )

    def print_help(self, file: Any = None) -> None:
        """As argparse's, which ignores that the output cannot be written."""
        if file is not None:
            super().print_help(file)
        elif code := exit_code(lambda: print(self.format_help(), end="")):
            self.exit(code)

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f"error: {message}; {self.prog} --help lists the options") + "\n")


class PrintVersion(argparse.Action):
    """Prints the version, and ends the command."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        parser.exit(exit_code(lambda: print(f"pard-onnx {pard_onnx.__version__}")))


def exit_code(command: Callable[[], None]) -> int:
    """Run a command and return 0, or 2 for bad input and 1 for failures, with one line on stderr.

    After a signal that ended it the code is 128 and the signal's number (130 for Ctrl-C), whatever became of the
    signal's exception: C extensions turn it into others.
    """
    utf8_streams()
    interrupts = Interrupts()
    code = 0
    try:
        with interrupts:
            code = outcome(command, interrupts)
    except KeyboardInterrupt:  # a signal on the way out, or without handlers of ours
        code = 128 + signal.SIGINT
    finally:
        interrupts.restore()
    return interrupts.exit_code or code


def outcome(command: Callable[[], None], interrupts: Interrupts) -> int:
    """The exit code of a command that no signal has ended."""
    try:
        with one_line_warnings():
            command()
            sys.stdout.flush()
    except Exception as error:
        if interrupts.number is not None:
            return interrupts.exit_code
        if isinstance(error, PardError):
            return complain(str(error), error.exit_code)
        if isinstance(error, BrokenPipeError):  # the reader has closed the pipe; Python must not write to it at exit
            to_null_device(sys.stdout)
            return 1
        if isinstance(error, OSError):
            return complain(system_problem(error), 1)
        if os.environ.get(TRACEBACK):
            raise
        if is_out_of_memory(error):
            return complain(system_problem(error), 1)
        return complain(f"{type(error).__name__}: {error}; not foreseen, please report it with {TRACEBACK}=1", 1)
    return 0


def system_problem(error: Exception) -> str:
    """What to say of memory or of a file that the system does not give."""
    if is_out_of_memory(error) or not isinstance(error, OSError):
        return str(out_of_memory(error))
    if error.filename == STANDARD_OUTPUT:
        to_null_device(sys.stdout)  # which holds text that cannot be written
    return os_error_line(error)


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print this package's warnings as one line on stderr; all other warnings are shown as usual."""
    usual = warnings.showwarning

    def show_warning(message: Warning | str, category: type[Warning], *location: Any, **more: Any) -> None:
        if issubclass(category, PardWarning):
            print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            usual(message, category, *location, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", PardWarning)
        warnings.showwarning = show_warning
        yield


def complain(message: str, code: int) -> int:
    """Print an error in one line on stderr and return the exit code."""
    try:
        print(f"error: {' '.join(one_line(message).split())}", file=sys.stderr)
    except OSError:  # nobody reads stderr any more
        to_null_device(sys.stderr)
    return code


@contextmanager
def stages() -> Iterator[Progress]:
    """Progress bars on stderr, one for each stage."""
    from rich import progress as rich
    from rich.console import Console

    columns = (rich.TextColumn("{task.description:>8}"), rich.BarColumn(), rich.TaskProgressColumn())
    bars = rich.Progress(*columns, rich.TimeElapsedColumn(), console=Console(stderr=True))
    tasks: dict[str, rich_progress.TaskID] = {}

    def progress(stage: str, done: int, total: int) -> None:
        bars.start()  # not before the first stage: errors before it are one line, without an empty line above
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
    with needs("export"):
        from pard_onnx.export.exporter import export
    with stages() as progress:
        return export(job, progress)


def exported_once(checkpoint: Checkpoint, source: Source, output: Path, precision: Precision) -> Path:
    """The folder `output`, to which the checkpoint is exported now if it does not exist."""
    recover(output)
    if not output.exists():
        from pard_onnx.export.job import Job  # imported late, as most commands do not export

        print(f"exporting {source.model} to {precision}", file=sys.stderr)
        export_job(Job(checkpoint, source, output, precision))
    return output


class Thoughts:
    """Shows reasoning on stderr, dimmed on a terminal; the reply is on stdout."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._shown = options.reasoning == SHOW
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._open_line = False

    def show(self, chunk: Chunk) -> None:
        """Call this before the chunk's text is shown."""
        if self._shown and chunk.reasoning:
            from rich.text import Text

            text = printable(chunk.reasoning) if self._console.is_terminal else chunk.reasoning
            self._console.print(Text(text, style="dim"), end="", soft_wrap=True)
            self._open_line = True
        if chunk.text or chunk.tool_calls:
            self.end_line()

    def end_line(self) -> None:
        if self._open_line:
            self._open_line = False
            print(file=sys.stderr, flush=True)


def call_lines(result: Result) -> list[str]:
    """The calls of a reply as lines: JSON objects in OpenAI's form."""
    return [for_stdout(json.dumps(call.as_message(), ensure_ascii=False)) for call in result.tool_calls]
