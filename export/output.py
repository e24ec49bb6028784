"""Where an export goes: a folder that appears whole or not at all, and takes nobody else's place."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from pard_onnx.models import draft_vocabulary
from pard_onnx.models.errors import BadInput, Failure
from pard_onnx.models.manifest import DATA, FILE_NAME, GRAPH, VITISAI_CONFIG

from . import runtime_configs as genai

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "config.json",
)
WRITTEN = frozenset((FILE_NAME, GRAPH, DATA, genai.FILE_NAME, VITISAI_CONFIG, draft_vocabulary.FILE_NAME, *COPIED))
STATIC = re.compile(r"model\.\d+(\.prefill)?\.onnx")


def place(output: Path, checkpoint: Path, *, force: bool) -> Path:
    """The absolute path of `output`, which may be written. Raises BadInput for what is in the way.

    force: a folder that an export has written may be replaced; nothing else ever is.
    """
    try:
        folder = output.expanduser().resolve()
        present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
        blocked = present is None and folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: no home folder
        raise BadInput(f"{output}: {_reason(error)}; choose another --output") from error
    if checkpoint.resolve().is_relative_to(folder):
        raise BadInput(f"{output}: holds the checkpoint itself; choose another --output")
    if blocked:
        raise BadInput(f"{output}: is a file; choose another --output")
    if present is not None and not force:
        raise BadInput(f"{output} exists already; choose another --output, or --force to replace it")
    if present and (strange := _strangers(present)):
        raise BadInput(
            f"{output}: holds {strange[0]}, which is not an export's, so --force does not replace the folder; "
            "choose another --output or move that away"
        )
    return folder


def _strangers(names: list[str]) -> list[str]:
    """Of a folder's files, those that no export wrote: all of them where there is no manifest."""
    if FILE_NAME not in names:
        return names
    return [name for name in names if name not in WRITTEN and not STATIC.fullmatch(name)]


@contextlib.contextmanager
def replacing(folder: Path, *, force: bool) -> Iterator[Path]:
    """A temporary sibling of `folder` that takes its place if the body succeeds, and goes if it does not."""
    missing = [parent for parent in folder.parents if not parent.exists()]  # innermost first
    unique = uuid4().hex[:8]
    temporary, aside = (folder.with_name(f".pard-{unique}.{end}") for end in ("partial", "old"))
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise BadInput(f"{folder}: cannot be made: {_reason(error)}; choose another --output") from error
        yield temporary
        _swap(temporary, folder, aside, force=force)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:  # goes only where it is empty
            with contextlib.suppress(OSError):
                parent.rmdir()


def _swap(new: Path, folder: Path, aside: Path, *, force: bool) -> None:
    if folder.exists() and not force:
        raise Failure(f"{folder} was made by someone else meanwhile; choose another --output, or --force to replace it")
    try:
        if folder.exists():  # Windows cannot rename over a folder: the old one steps aside first
            folder.rename(aside)
        new.rename(folder)
    finally:
        if aside.exists() and not folder.exists():
            aside.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
