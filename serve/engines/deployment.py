"""`Deployment`: what another engine needs to serve a plan, and its files in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pard_onnx.models.atomic import atomic_folder
from pard_onnx.models.errors import BadInput
from pard_onnx.models.system_errors import write_error

from .command import Command

ELSEWHERE = "choose another --output"


@dataclass(frozen=True, slots=True)
class Deployment:
    """What an engine needs to serve a plan."""

    commands: tuple[Command, ...]  # the first one is the recommended one
    files: tuple[tuple[str, str], ...] = ()  # configuration files by name, which commands name
    notes: tuple[str, ...] = ()


def write_deployment(found: Deployment, output: Path) -> None:
    """Write configuration files, serve.sh and serve.ps1 to a new folder, all or nothing. Raises BadInput or Failure."""
    first = found.commands[0]
    files = dict(found.files)
    files["serve.sh"] = f'#!/bin/sh\n# {first.purpose}\ncd "$(dirname "$0")" || exit\nexec {first.posix}\n'
    # The mark at the beginning is how Windows PowerShell knows UTF-8
    files["serve.ps1"] = f"\ufeff# {first.purpose}\nSet-Location -LiteralPath $PSScriptRoot\n{first.powershell}\n"
    try:
        with atomic_folder(output) as partial:
            for name, text in files.items():
                path = partial / name
                path.write_text(text, encoding="utf-8", newline="\n")
                path.chmod(0o755 if name == "serve.sh" else 0o644)
    except FileExistsError as error:
        raise BadInput(f"{output}: is there already; {ELSEWHERE}") from error
    except OSError as error:
        raise write_error(output, error, ELSEWHERE) from error
