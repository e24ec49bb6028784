"""JSON files that hold one object: read with one-line errors, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import BadInput


def read_json(path: Path, error: type[BadInput] = BadInput) -> dict[str, Any]:
    """The object in `path` (UTF-8, with or without a byte order mark); raises `error` if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise error(f"{path.parent}: no {path.name}") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from problem
    except (ValueError, RecursionError) as problem:  # UnicodeDecodeError is a ValueError
        raise error(f"{path}: not valid JSON: {problem}") from problem
    if not isinstance(value, dict):
        raise error(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` to a file beside `path`, then rename it: a reader sees the old text or the new one."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        scratch.write_text(text, encoding="utf-8", newline="\n")
        scratch.replace(path)  # os.replace: also over an existing file, also on Windows
    finally:
        scratch.unlink(missing_ok=True)
