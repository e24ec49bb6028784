"""The terminal of a chat: replies on stdout, everything else on stderr; prompt and colours for people only."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from rich.console import Console
from rich.text import Text

from pard_onnx.cli import for_stdout
from pard_onnx.models.errors import BadInput
from pard_onnx.runtime.result import Chunk

PROMPT = "> "
DRAFTED = "bold green"


class Screen:
    """Input and output of a chat. `person`: stdin is a terminal; otherwise each line of stdin is a message."""

    def __init__(self) -> None:
        self.person = sys.stdin.isatty()
        self._console = Console(highlight=False)
        self._open_line = False
        if self.person:
            with suppress(ImportError):  # not on Windows
                import readline  # noqa: F401 gives input() editing and history

    def lines(self) -> Iterator[str]:
        """The lines of stdin, without line ends."""
        try:
            if self.person:
                yield from self._typed()
            else:
                for number, line in enumerate(sys.stdin):
                    yield (line if number else line.removeprefix("\ufeff")).rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise BadInput(f"stdin: not valid UTF-8: {error}") from error

    def _typed(self) -> Iterator[str]:
        while True:
            try:
                if sys.stdout.isatty():
                    line = input(PROMPT)
                else:  # input() would write the prompt to stdout, among the replies
                    print(PROMPT, end="", file=sys.stderr, flush=True)
                    line = input()
            except (EOFError, KeyboardInterrupt) as end:
                print(file=sys.stderr)  # the shell's prompt gets a line of its own
                if isinstance(end, KeyboardInterrupt):
                    raise
                return
            yield line

    def show(self, chunk: Chunk, *, mark: bool) -> None:
        """Write a part of a reply; mark: colour the draft's tokens, on a terminal."""
        if not chunk.text and (chunk.reasoning or chunk.tool_calls):
            return
        if mark and self._console.is_terminal:
            flags = [*chunk.drafted, *[False] * (len(chunk.pieces) - len(chunk.drafted))]
            for piece, drafted in zip(chunk.pieces, flags, strict=True):
                self._console.print(Text(for_stdout(piece), style=DRAFTED if drafted else ""), end="", soft_wrap=True)
        else:
            sys.stdout.write(for_stdout(chunk.text))
            sys.stdout.flush()
        self._open_line = True

    def end_line(self) -> None:
        if self._open_line:
            self._open_line = False
            print(flush=True)

    def note(self, text: str) -> None:
        Console(stderr=True, highlight=False).print(Text(text, style="dim"), soft_wrap=True)

    @contextmanager
    def interrupts(self, act: Callable[[], object]) -> Iterator[None]:
        """In the body, Ctrl-C calls `act` and a second one ends the process; without a person the first one does."""
        previous = signal.getsignal(signal.SIGINT)

        def once(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGINT, previous)
            act()

        handled = self.person and callable(previous)  # not where Ctrl-C is ignored
        try:
            if handled:
                signal.signal(signal.SIGINT, once)
        except ValueError:  # not in the main thread, where Python has no signals
            handled = False
        try:
            yield
        finally:
            if handled:
                signal.signal(signal.SIGINT, previous)
