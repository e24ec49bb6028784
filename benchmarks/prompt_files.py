"""Prompts of a JSON lines file: one object a line, the text under "data" or "prompt"."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pard_onnx.models.errors import BadInput

SHIPPED = Path(__file__).parent / "prompts.jsonl"
FIELDS = ("data", "prompt")


@dataclass(frozen=True, slots=True)
class PromptSet:
    """name: the file's, without its ending."""

    name: str
    prompts: tuple[str, ...]


def read(path: Path, limit: int | None = None) -> PromptSet:
    """The first `limit` prompts of a file; BadInput names the line that is broken, whether it is used or not."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: the prompts cannot be read: {error}") from error
    prompts = [prompt(line, f"{path} line {number}") for number, line in numbered(lines)]
    if not prompts:
        raise BadInput(f'{path}: has no prompts; one JSON object a line, the text under "data" or "prompt"')
    return PromptSet(path.stem, tuple(prompts[:limit]))


def numbered(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, counted from 1."""
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def prompt(line: str, where: str) -> str:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: is not JSON ({error}); correct the line or remove it") from None
    found = next((value[name] for name in FIELDS if name in value), None) if isinstance(value, dict) else None
    if not isinstance(found, str) or not found:
        raise BadInput(f'{where}: needs an object with a text under "data" or "prompt"')
    return found
