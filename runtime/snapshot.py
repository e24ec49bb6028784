"""Conversations on disk: one .npz file of plain arrays, which cannot hold code.

header    JSON: `Header`
messages  JSON
tokens    int64 [n]: the conversation's
target    `KvCache.read` of the target's rows, of tokens 0 .. length - 1
draft     of the draft's, of tokens draft_start .. draft_start + length - 1; without a draft, none

Its size is that of the KV rows, 2 * layers * kv_heads * head_dim numbers a token and model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.errors import BadArtifact, BadInput, PardError, TooLong
from pard_onnx.models.manifest import File, Manifest
from pard_onnx.models.records import from_json, to_json

from .sequence import Sequence
from .sessions.kv_cache import KvCache, Rows
from .text.prompt import Messages, copy_messages
from .text.tokenizer import Message

FORMAT = "pard-onnx conversation"
VERSION = 1
DECISIVE = (".onnx", ".onnx.data", "tokenizer.json")  # ends of the names of files that KV rows depend on
ZIP = b"PK"


class Misfit(BadArtifact):
    """What stands in the file cannot be; told with the file's name."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose KV rows they are."""

    model: str
    precision: str
    files: tuple[File, ...]

    @classmethod
    def of(cls, manifest: Manifest) -> Origin:
        files = tuple(file for file in manifest.files if file.name.endswith(DECISIVE))
        return cls(manifest.source.model, manifest.precision, files)


@dataclass(frozen=True, slots=True)
class Header:
    target: Origin
    draft: Origin | None
    draft_start: int
    format: str = FORMAT
    version: int = VERSION


def write(
    path: str | PathLike[str], sequence: Sequence, messages: Items[Message], target: Manifest, draft: Manifest | None
) -> None:
    """Write the file, whole or not at all. BadInput if it cannot be, or another kind of file is there."""
    draft_origin = Origin.of(draft) if draft and sequence.draft else None
    header = Header(Origin.of(target), draft_origin, sequence.memory.start)
    arrays = {
        "header": packed(to_json(header)),
        "messages": packed(messages),
        "tokens": np.array(sequence.tokens, np.int64),
        "target": sequence.target.read(0, sequence.target.length),
    }
    if sequence.draft:
        arrays["draft"] = sequence.draft.read(0, sequence.draft.length)
    try:
        place = Path(path).expanduser().resolve()
        if place.exists() and not is_ours(place):
            raise BadInput(f"{path}: is there already, and is no saved conversation; choose another name")
        write_whole(place, arrays)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: no home folder; ValueError: a null character
        if isinstance(error, PardError):
            raise
        raise BadInput(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def write_whole(place: Path, arrays: dict[str, Any]) -> None:
    """By a file beside it that is renamed once it is complete."""
    partial = place.with_name(f".pard-{uuid4().hex[:8]}.partial")
    try:
        with partial.open("xb") as file:
            np.savez(file, **arrays)
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


def read(
    path: str | PathLike[str], target: Manifest, draft: Manifest | None, new_sequence: Callable[[], Sequence]
) -> tuple[Messages, Sequence]:
    """The messages and the sequence in the file; the draft's KV rows only if it is the same draft.

    new_sequence: makes an empty one for the models of these manifests.
    Raises BadArtifact (another file, damaged, another version, another target), TooLong (for this capacity).
    """
    sequence = new_sequence()
    capacity = min(manifest.capacity for manifest in (target, draft) if manifest)
    with opened(path) as found:
        header = read_header(path, found)
        if header.target.files != Origin.of(target).files:
            theirs = f"{header.target.model} in {header.target.precision}"
            raise BadArtifact(f"{path}: was saved with another target, an export of {theirs}; load that one")
        tokens = found["tokens"]
        if len(tokens) > capacity:
            raise TooLong(
                f"{path}: the conversation has {len(tokens)} tokens, but the capacity is {capacity}; "
                "load it without the draft, or with one of a larger --context-length"
            )
        require(tokens.dtype == np.int64 and tokens.ndim == 1, "tokens that are none")
        size = target.spec.vocabulary.size
        require(bool(np.all((tokens >= 0) & (tokens < size))), "tokens that the tokenizer does not have")
        sequence.tokens = tokens.tolist()
        fill(sequence.target, found["target"], 0, len(tokens))
        if draft and sequence.draft and header.draft and header.draft.files == Origin.of(draft).files:
            fill(sequence.draft, found["draft"], header.draft_start, len(tokens))
            sequence.memory.start = header.draft_start
        return read_messages(found), sequence


def fill(cache: KvCache, rows: Rows, start: int, end: int) -> None:
    """The rows of tokens from `start` on, of a conversation of `end` tokens."""
    try:
        cache.write(rows)
    except BadArtifact as error:
        raise Misfit(str(error)) from error
    require(0 <= start <= end - cache.length, "more KV rows than tokens")


def read_messages(found: Any) -> Messages:
    try:
        return copy_messages(unpacked(found["messages"]))
    except BadInput as error:
        raise Misfit(str(error)) from error


@contextmanager
def opened(path: str | PathLike[str]) -> Iterator[Any]:
    """The file's arrays by name, read as they are asked for; what goes wrong meanwhile is a BadArtifact."""
    try:
        with Path(path).expanduser().open("rb") as file:
            magic = file.read(len(ZIP))
            if magic != ZIP:
                raise BadArtifact(f"{path}: is no saved conversation; name a file that Chat.save or /save wrote")
            file.seek(0)
            with np.load(file, allow_pickle=False) as found:
                yield found
    except FileNotFoundError:
        raise BadArtifact(f"{path}: no such file; name one that Chat.save or /save wrote") from None
    except OSError as error:
        raise BadArtifact(f"{path}: cannot be read: {error.strerror or error}") from error
    except Misfit as error:
        raise BadArtifact(f"{path}: is damaged ({error}); take another copy") from error
    except PardError:
        raise
    except Exception as error:  # zipfile and numpy raise a dozen kinds for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadArtifact(f"{path}: is damaged ({reason}); take another copy") from error


def read_header(path: str | PathLike[str], found: Any) -> Header:
    value = unpacked(found["header"]) if "header" in found.files else None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise BadArtifact(f"{path}: is no saved conversation; name a file that Chat.save or /save wrote")
    version = value.get("version")
    if version != VERSION:  # before the keys: another version may have other ones
        raise BadArtifact(f"{path}: has format version {version}, this pard-onnx reads {VERSION}; use the one it is of")
    return from_json(Header, value, error=Misfit)


def is_ours(place: Path) -> bool:
    try:
        with opened(place) as found:
            read_header(place, found)
    except BadArtifact:
        return False
    return True


def require(holds: bool, problem: str) -> None:
    if not holds:
        raise Misfit(problem)


def packed(value: object) -> NDArray[np.uint8]:
    """JSON as an array; BadInput for what has no JSON form."""
    try:
        return np.frombuffer(json.dumps(value, allow_nan=False).encode(), np.uint8)
    except (TypeError, ValueError) as error:
        raise BadInput(f"the messages cannot be saved: {error}") from error


def unpacked(array: NDArray[np.uint8]) -> Any:
    return json.loads(array.tobytes())
