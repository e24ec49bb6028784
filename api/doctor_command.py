"""`pard-doctor`: what is installed, which providers work, and which artifacts they run with the right results."""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pard_onnx.__main__ import COMMANDS
from pard_onnx.cli import Parser, exit_code
from pard_onnx.models.records import to_json

if TYPE_CHECKING:
    from rich.text import Text

    from pard_onnx.runtime.doctor import DoctorReport

STYLES = {"ready": "green", "right": "green", "token by token": "yellow", "absent": "dim", "does not fit": "dim"}
WRONG = "red"
# A command in a sentence: pip with all words up to a comma or semicolon, or one of this package's with its options
WORD = r"""(?:"[^"]*"|'[^']*'|[^\s;,"']+)"""
COMMAND = re.compile(
    rf"(?:uv )?pip (?:un)?install(?: {WORD})+|pard-(?:{'|'.join(COMMANDS)})(?: --?[a-z][\w-]*(?: (?!-){WORD})?)+"
)


def parser() -> argparse.ArgumentParser:
    out = Parser(prog="pard-doctor", description="Show which execution providers work here, and what they run right.")
    out.add_argument("artifacts", nargs="*", metavar="DIR", help="exported folders to try on every provider that works")
    out.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if anything can be run, 1 if nothing can, 2 for a folder that pard-export has not written."""
    options = parser().parse_args(argv)
    found: list[DoctorReport] = []

    def run() -> None:
        from pard_onnx.runtime.doctor import examine
        from pard_onnx.runtime.model import open_artifact

        found.append(examine([open_artifact(name) for name in options.artifacts]))
        show(found[0], as_json=options.json)

    code = exit_code(run)
    return code or int(not found[0].usable)


def show(report: DoctorReport, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(to_json(report) | {"usable": report.usable}))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for text in paragraphs(report):
        found = list(fitted(text.plain, console.width))
        for line in [text] if len(found) == 1 else [Text(one, style=text.style) for one in found]:
            console.print(line, soft_wrap=True)  # rich would break commands


def paragraphs(report: DoctorReport) -> Iterator[Text]:
    """What is printed, one fact after the other."""
    from rich.text import Text

    for name, version in (*report.versions, *report.onnxruntime):
        yield Text(f"{name} {version}")
    yield Text(f"CPU kernels: {report.kernel or 'ONNX Runtime’s own'}")
    if report.memory.total:
        free = f", {report.memory.available / 2**30:.1f} GiB free" if report.memory.available else ""
        yield Text(f"memory: {report.memory.total / 2**30:.1f} GiB{free}")
    yield from map(Text, report.devices)
    for problem in filter(None, (report.conflict, *report.slow)):
        yield Text(problem, style=WRONG)
    yield Text("\nproviders, in the order of auto", style="bold")
    for found in report.providers:
        yield Text.assemble(f"{found.key:9} ", (found.state, STYLES.get(found.state, WRONG)))
        yield Text(f"  {found.install if found.state == 'absent' else found.detail}")
    for tried in report.artifacts:
        yield Text(f"\n{Path(tried.artifact).name} on {tried.provider}", style="bold")
        yield Text.assemble("steps: ", (tried.result, STYLES.get(tried.result, WRONG)))
        yield Text(f"weights and KV cache: {tried.bytes / 2**20:.0f} MiB")
        yield Text(f"  {tried.detail}")


def fitted(text: str, width: int) -> Iterator[str]:
    """The text in lines of at most `width` characters, each command whole and in a line of its own, however long."""
    if text.startswith("\n"):
        yield ""
    indent = "  " if text.startswith("  ") else ""
    text, at = text.strip(), 0
    for command in (*COMMAND.finditer(text), None):
        words = text[at : command.start() if command else len(text)].strip()
        more = "" if at == 0 and not indent else "  "
        yield from textwrap.wrap(
            words, width, initial_indent=more, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        if command:
            yield f"  {command[0]}"
            at = command.end() + text.startswith((";", ","), command.end())


if __name__ == "__main__":
    sys.exit(main())
