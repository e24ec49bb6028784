"""`pard-quantize --report`: what quantized models lose, and what they save."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from pard_onnx.benchmarks import display
from pard_onnx.benchmarks.quality.report import ReportRequest, make_report
from pard_onnx.cli import stages


def add_report(out: argparse.ArgumentParser) -> None:
    """The options of a report, for a command that has --json already."""
    group = out.add_argument_group("report", "exported folders of one role, compared on a text that they did not see")
    group.add_argument("--report", nargs="+", metavar="DIR", help="folders that were exported or quantized")
    reference = "the unquantized model: its checkpoint, or an exported folder in fp32 or fp16"
    group.add_argument("--reference", metavar="DIR_OR_ID", help=reference)
    group.add_argument("--text", type=Path, metavar="F.txt", help="default: Python's standard library, in part")
    group.add_argument("--tokens", type=int, default=2048, metavar="N", help="of the text (default: 2048)")
    partner = group.add_mutually_exclusive_group()
    partner.add_argument("--draft", metavar="DIR", help="mean accepted length of each target with this draft")
    partner.add_argument(
        "--target",
        metavar="DIR",
        help="mean accepted length of each draft with this target; of --optimize-for, whose draft it is",
    )
    group.add_argument("--plot", type=Path, metavar="F.png", help="quality against size")


def run_report(options: argparse.Namespace) -> None:
    """Measure and show, as `add_report`'s options say. Raises BadInput before anything runs."""
    wanted = ReportRequest(
        tuple(options.report),
        options.reference,
        options.text,
        options.tokens,
        options.draft,
        options.target,
    )
    if options.plot:
        display.require_plot_path(options.plot)
    with stages() as progress:
        found = make_report(wanted, progress)
    if options.plot:
        display.save_quality_plot(options.plot, found)
    if options.json:
        print(json.dumps(asdict(found)))
    else:
        Console(highlight=False).print(display.quality_table(found), display.steps_table(found))
