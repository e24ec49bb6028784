"""`pard-deploy`: the configuration and the command with which another engine serves the same checkpoints."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pard_onnx.cli import Parser, exit_code
from pard_onnx.models.checks import path_text
from pard_onnx.models.errors import printable
from pard_onnx.serve.engines.command import Command
from pard_onnx.serve.engines.deployment import Deployment, write_deployment
from pard_onnx.serve.engines.plan import Plan, planned
from pard_onnx.serve.engines.table import ENGINES

POSIX, POWERSHELL = "posix", "powershell"


def parser() -> argparse.ArgumentParser:
    out = Parser(prog="pard-deploy", description="Show how another engine serves a target with its PARD draft.")
    model = "hub id or folder of the checkpoint, or an exported folder, which knows its checkpoint"
    out.add_argument("--target", required=True, metavar="ID_OR_DIR", help=model)
    out.add_argument("--draft", metavar="ID_OR_DIR", help="likewise; default: the published draft of the target")
    out.add_argument("--engine", required=True, choices=tuple(ENGINES))
    out.add_argument("--draft-length", type=int, metavar="K", help="drafts a round; default: from measurements, or 8")
    out.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the target, if it is a hub id")
    out.add_argument("--draft-revision", metavar="NAME", help="the same of the draft")
    shell = POWERSHELL if sys.platform == "win32" else POSIX
    out.add_argument("--shell", choices=(POSIX, POWERSHELL), default=shell, help=f"of the command (default: {shell})")
    out.add_argument("--output", type=Path, metavar="DIR", help="a new folder for the configuration and start scripts")
    out.add_argument("--json", action="store_true", help="one JSON object")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    plan = planned(
        path_text("--target", options.target),
        options.draft,
        options.draft_length,
        revision=options.revision,
        draft_revision=options.draft_revision,
    )
    found = ENGINES[options.engine].deploy(plan)
    if options.output is not None:
        write_deployment(found, options.output)
    if options.json:
        print(json.dumps(summary(plan, found, options)))
    else:
        show(found, options)


def show(found: Deployment, options: argparse.Namespace) -> None:
    """Print what can be pasted: all but commands and files are comments."""
    for note in found.notes:
        print(f"# {printable(note)}")
    if options.output is None:
        for name, text in found.files:
            if any(name in command.arguments for command in found.commands):  # else the command holds it all
                print(f"# {name}:\n{text.rstrip()}")
    else:
        print(f"# {printable(str(options.output))}: configuration, serve.sh and serve.ps1")
    for command in found.commands:
        print(f"# {command.purpose}:\n{line(command, options.shell)}")


def line(command: Command, shell: str) -> str:
    return command.powershell if shell == POWERSHELL else command.posix


def summary(plan: Plan, found: Deployment, options: argparse.Namespace) -> dict[str, object]:
    engine = ENGINES[options.engine]
    used = plan.draft if engine.runs_pard else None
    return {
        "engine": options.engine,
        "runs_pard": engine.runs_pard,
        "target": {"name": plan.target.name, "revision": plan.target.revision, "local": plan.target.local},
        "draft": {"name": used.name, "revision": used.revision, "local": used.local} if used else None,
        "draft_length": plan.length if used else None,
        "commands": [asdict(one) | {"posix": one.posix, "powershell": one.powershell} for one in found.commands],
        "files": dict(found.files),
        "notes": list(found.notes),
        "output": str(options.output) if options.output else None,
    }


if __name__ == "__main__":
    sys.exit(main())
