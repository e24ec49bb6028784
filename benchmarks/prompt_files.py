"""Prompts of a JSON lines file: one object a line, the text under "data" or "prompt"."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pard_onnx.models.errors import BadInput
from pard_onnx.models.json_files import text_lines

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
        whole = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: the prompts cannot be read: {error}") from error
    prompts = tuple(text_lines(whole, str(path), FIELDS, empty=False))
    if not prompts:
        raise BadInput(f'{path}: has no prompts; one JSON object a line, the text under "data" or "prompt"')
    return PromptSet(path.stem, prompts[:limit])
