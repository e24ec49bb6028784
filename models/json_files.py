"""JSON files with one-line errors: files of one object, written whole or not at all, and JSON lines of texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .atomic import atomic_file
from .errors import BadInput, shown
from .folder_files import read_file

MOST = 1 << 24  # bytes of a file: some times what real ones have, since Python's values take up to 25 times as much
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how a file begins that stands for one in Git LFS
FETCH = "is a Git LFS pointer, not the file itself; fetch that with git lfs pull or hf download"


def read_json(
    path: Path, error: type[BadInput] = BadInput, *, most: int = MOST, unique: bool = False
) -> dict[str, Any]:
    """The object in `path` (UTF-8, with or without a byte order mark); raises `error` if there is none.

    most: bytes of the file. unique: whether a key may stand only once in an object; of several the last one counts.
    """
    content = read_file(path, most, error)
    if content.startswith(LFS_POINTER):
        raise error(f"{path}: {FETCH}")
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique_keys if unique else None)
    except (ValueError, RecursionError) as problem:  # UnicodeDecodeError is a ValueError
        raise error(f"{path}: not valid JSON: {problem}") from problem
    if not isinstance(value, dict):
        raise error(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, as json's `object_pairs_hook`; ValueError where a key is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        key = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"the key {shown(key)} is there twice")
    return found


def text_lines(whole: str, where: str, fields: Sequence[str], *, empty: bool) -> Iterator[str]:
    """The texts of JSON lines: one object a line, with its text under the first of `fields` that it has.

    whole: the text of the file; where: the file's name in errors; empty: whether a text may be empty. Raises BadInput,
    naming the broken line.
    """
    *others, last = (f'"{name}"' for name in fields)
    for number, line in enumerate(whole.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{where} line {number}"
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{place}: is not JSON ({error}); correct the line or remove it") from None
        found = next((value[name] for name in fields if name in value), None) if isinstance(value, dict) else None
        if not isinstance(found, str) or not (found or empty):
            raise BadInput(f"{place}: needs an object with a text under {', '.join(others)} or {last}")
        yield found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` to `path`: a reader sees the old text or the new one, at any time. Raises OSError."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))
