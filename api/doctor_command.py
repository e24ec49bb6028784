"""`pard-doctor`: what is installed, which providers work, and which artifacts they run with the right results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pard_onnx.cli import Parser, exit_code
from pard_onnx.models.records import to_json
from pard_onnx.runtime.doctor import ArtifactReport, DoctorReport, ProviderReport, examine
from pard_onnx.runtime.model import open_artifact

STYLES = {"ready": "green", "right": "green", "token by token": "yellow", "absent": "dim", "does not fit": "dim"}
WRONG = "red"


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
        found.append(examine([open_artifact(name) for name in options.artifacts]))
        show(found[0], as_json=options.json)

    code = exit_code(run)
    return code or int(not found[0].usable)


def show(report: DoctorReport, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(to_json(report) | {"usable": report.usable}))
        return
    console = Console(highlight=False)
    console.print(summary(report), soft_wrap=True)
    for line in filter(None, (report.conflict, *report.slow)):
        console.print(Text(line, style=WRONG), soft_wrap=True)
    console.print(providers_table(report.providers))
    if report.artifacts:
        console.print(artifacts_table(report.artifacts))


def summary(report: DoctorReport) -> Text:
    """Versions, CPU kernels, memory and devices, one line each."""
    lines = [", ".join(f"{name} {version}" for name, version in (*report.versions, *report.onnxruntime))]
    lines.append(f"CPU kernels: {report.kernel or 'ONNX Runtime’s own'}")
    if report.memory.total:
        free = f", {report.memory.available / 2**30:.1f} GiB free" if report.memory.available else ""
        lines.append(f"memory: {report.memory.total / 2**30:.1f} GiB{free}")
    return Text("\n".join([*lines, *report.devices]))


def providers_table(reports: Sequence[ProviderReport]) -> Table:
    out = Table("provider", "state", "", box=SIMPLE_HEAD, caption="in the order in which --provider auto tries them")
    for report in reports:
        detail = f"get it by {report.install}" if report.state == "absent" else report.detail
        out.add_row(report.key, Text(report.state, style=STYLES.get(report.state, WRONG)), Text(detail))
    return out


def artifacts_table(reports: Sequence[ArtifactReport]) -> Table:
    out = Table("artifact", "provider", "steps", "MiB", "", box=SIMPLE_HEAD, caption="MiB: weights and one KV cache")
    for report in reports:
        result = Text(report.result, style=STYLES.get(report.result, WRONG))
        size = f"{report.bytes / 2**20:.0f}"
        out.add_row(Text(Path(report.artifact).name), report.provider, result, size, Text(report.detail))
    return out


if __name__ == "__main__":
    sys.exit(main())
