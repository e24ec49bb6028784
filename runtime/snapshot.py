"""Saved conversations: one .npz file of plain arrays, which cannot contain code.

header    JSON: `Header`
messages  JSON
tokens    int64 [n]: the tokens of the conversation
target    the target's KV rows of tokens 0 .. length - 1, as `KvCache.read` returns them
draft     the draft's KV rows of tokens draft_start .. draft_start + length - 1; missing without a draft
features  the target's hidden states of its last tokens, [n, width], which the draft has not read yet; missing where it
          reads none

The KV rows make up its size: 2 * layers * kv_heads * head_dim numbers for each token and model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass
from os import SEEK_END, PathLike
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, ZipFile

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from pard_onnx.models.atomic import atomic_file
from pard_onnx.models.errors import BadArtifact, BadInput, PardError, TooLong
from pard_onnx.models.manifest import File, Manifest
from pard_onnx.models.records import from_json, to_json
from pard_onnx.models.system_errors import write_problem

from .model import longer_context
from .sequence import Sequence
from .sessions.kv_cache import KvCache, KvRows
from .text.prompt import Messages, copy_messages
from .text.template import Message

FORMAT = "pard-onnx conversation"
VERSION = 1
MODEL_FILES = (".onnx", ".onnx.data", "tokenizer.json")  # endings of the names of files that KV rows depend on
ZIP = b"PK"
NPY = ".npy"  # the ending of an array's name in the file
NPY_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
MOST_ARRAYS = 16


class DamagedSnapshot(BadArtifact):
    """The content of the file is not valid. `open_arrays` adds the file's name to the message."""


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """The model that computed KV rows."""

    model: str
    precision: str
    files: tuple[File, ...]  # the artifact's files that KV rows depend on

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> ModelIdentity:
        files = tuple(file for file in manifest.files if file.name.endswith(MODEL_FILES))
        return cls(manifest.source.model, manifest.precision, files)


@dataclass(frozen=True, slots=True)
class Header:
    """What a saved conversation belongs to."""

    target: ModelIdentity
    draft: ModelIdentity | None
    draft_start: int  # the first token whose KV row the draft's cache holds
    format: str = FORMAT
    version: int = VERSION


def write(
    path: str | PathLike[str], sequence: Sequence, messages: Items[Message], target: Manifest, draft: Manifest | None
) -> None:
    """Write the file completely or not at all; BadInput if it cannot be written, or replaces another kind of file."""
    draft_origin = ModelIdentity.from_manifest(draft) if draft and sequence.draft else None
    header = Header(ModelIdentity.from_manifest(target), draft_origin, sequence.memory.start)
    arrays: dict[str, Any] = {
        "header": to_array(to_json(header)),
        "messages": to_array(messages),
        "tokens": np.array(sequence.tokens, np.int64),
        "target": sequence.target.read(0, sequence.target.length),
    }
    if sequence.draft:
        arrays["draft"] = sequence.draft.read(0, sequence.draft.length)
        if waiting := unread_features(sequence):
            arrays["features"] = np.stack(waiting)
    try:
        destination = Path(path).expanduser().resolve()
        if destination.exists() and not is_snapshot(destination):
            raise BadInput(f"{path}: is there already, and is no saved conversation; choose another name")
        with atomic_file(destination) as file:
            np.savez(file, **arrays)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: no home folder; ValueError: a null character
        if isinstance(error, PardError):
            raise
        raise BadInput(write_problem(path, error, "choose another file")) from error


def read(
    path: str | PathLike[str], target: Manifest, draft: Manifest | None, new_sequence: Callable[[], Sequence]
) -> tuple[Messages, Sequence]:
    """The messages and the sequence in the file. The draft's KV rows are left out if the draft is another one.

    new_sequence: makes an empty sequence for the models of these manifests.

    Raises BadArtifact (another kind of file, damaged, another version or target), TooLong (for this capacity).
    """
    sequence = new_sequence()
    capacity = min(manifest.capacity for manifest in (target, draft) if manifest)
    with open_arrays(path) as arrays:
        header = read_header(path, arrays)
        if header.target.files != ModelIdentity.from_manifest(target).files:
            theirs = f"{header.target.model} in {header.target.precision}"
            raise BadArtifact(f"{path}: was saved with another target, an export of {theirs}; load that one")
        tokens = arrays["tokens"]
        if len(tokens) > capacity:
            raise TooLong(
                f"{path}: the conversation has {len(tokens)} tokens, but the capacity is {capacity}; "
                f"{longer_context(target, draft)}"
            )
        require(tokens.dtype == np.int64 and tokens.ndim == 1, "tokens that are none")
        size = target.spec.vocabulary.size
        require(bool(np.all((tokens >= 0) & (tokens < size))), "tokens that the tokenizer does not have")
        sequence.tokens = tokens.tolist()
        fill(sequence.target, arrays["target"], 0, len(tokens))
        if draft and sequence.draft and header.draft and header.draft.files == ModelIdentity.from_manifest(draft).files:
            fill(sequence.draft, arrays["draft"], header.draft_start, len(tokens))
            sequence.memory.start = header.draft_start
            if "features" in arrays:
                fill_features(sequence, arrays["features"], draft)
        return read_messages(arrays), sequence


def fill(cache: KvCache, rows: KvRows, start: int, end: int) -> None:
    """Write KV rows to a cache: those of the tokens from `start` on, in a conversation of `end` tokens."""
    try:
        cache.write(rows)
    except BadArtifact as error:
        raise DamagedSnapshot(str(error)) from error
    require(0 <= start <= end - cache.length, "more KV rows than tokens")


def unread_features(sequence: Sequence) -> list[Any]:
    """The target's hidden states of the last tokens whose rows it has, which the draft needs to read on; none where
    one of them is not known."""
    memory, draft = sequence.memory, sequence.draft
    first = max(0, memory.start + (draft.length if draft else 0) - 1)
    rows = [memory.feature(token) for token in range(first, sequence.target.length)]
    known = memory.seen == sequence.target.length and not any(row is None for row in rows)
    return rows if known else []


def fill_features(sequence: Sequence, features: NDArray[Any], draft: Manifest) -> None:
    """Keep the hidden states of the target's last tokens for a draft that reads them."""
    pard, end = draft.spec.pard, sequence.target.length
    if pard is None or pard.features is None:
        return
    fits = features.ndim == 2 and len(features) <= end and features.shape[1] == pard.features.width
    require(fits and features.dtype.kind == "f", "hidden states that are none of the target's")
    sequence.memory.first = end - len(features)
    sequence.memory.add(row.copy() for row in features)


def read_messages(arrays: Arrays) -> Messages:
    """The messages in the file's arrays."""
    try:
        return copy_messages(from_array(arrays["messages"]))
    except BadInput as error:
        raise DamagedSnapshot(str(error)) from error


@contextmanager
def open_arrays(path: str | PathLike[str]) -> Iterator[Arrays]:
    """The file's arrays by name, each read when it is used. Errors of the `with` block become BadArtifact."""
    try:
        name = Path(path).expanduser()
        if name.exists() and not name.is_file():  # opening a pipe would wait for its writer
            raise BadArtifact(f"{path}: cannot be read: it is no file; name one that Chat.save or /save wrote")
        with name.open("rb") as file:
            magic = file.read(len(ZIP))
            if magic != ZIP:
                raise BadArtifact(f"{path}: is no saved conversation; name a file that Chat.save or /save wrote")
            with Arrays(file) as arrays:
                yield arrays
    except FileNotFoundError:
        raise BadArtifact(f"{path}: no such file; name one that Chat.save or /save wrote") from None
    except OSError as error:
        raise BadArtifact(f"{path}: cannot be read: {error.strerror or error}") from error
    except DamagedSnapshot as error:
        raise BadArtifact(f"{path}: is damaged ({error}); take another copy") from error
    except (PardError, MemoryError):
        raise
    except Exception as error:  # zipfile and numpy raise many kinds of errors for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadArtifact(f"{path}: is damaged ({reason}); take another copy") from error


class Arrays:
    """The arrays of an .npz file by name, each read when it is used.

    `Chat.save` stores its arrays as they are. What is compressed, or claims to be longer than the file, is refused
    before anything is read, so that an array takes no more memory than the file has bytes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._zip = ZipFile(file)
        size = file.seek(0, SEEK_END)
        infos = self._zip.infolist()
        self._infos = {info.filename.removesuffix(NPY): info for info in infos}
        require(len(self._infos) == len(infos) <= MOST_ARRAYS, "arrays of the same name, or too many")
        stored = all(info.compress_type == ZIP_STORED and info.file_size == info.compress_size for info in infos)
        require(stored, "compressed arrays, which Chat.save does not write")
        require(sum(info.file_size for info in infos) <= size, "arrays that are longer than the file")

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def __getitem__(self, name: str) -> NDArray[Any]:
        require(name in self._infos, f"no array {name}")
        info = self._infos[name]
        with self._zip.open(info) as stream:
            version = npy.read_magic(stream)
            require(version in NPY_HEADERS, "an array in another format")
            shape, by_columns, dtype = NPY_HEADERS[version](stream)
            require(dtype.kind in "iuf" and all(extent >= 0 for extent in shape), "an array that has no numbers")
            # Python's own integers: those of numpy wrap
            length = math.prod(map(int, shape)) * dtype.itemsize
            require(length == info.file_size - stream.tell(), "an array of another length than it claims")
            data = stream.read()  # whose check sum is compared at its end
        return np.frombuffer(data, dtype).reshape(shape, order="F" if by_columns else "C")

    def __enter__(self) -> Arrays:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()


def read_header(path: str | PathLike[str], arrays: Arrays) -> Header:
    """The header in the file's arrays; BadArtifact if the file is not a saved conversation, or of another version."""
    value = from_array(arrays["header"]) if "header" in arrays else None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise BadArtifact(f"{path}: is no saved conversation; name a file that Chat.save or /save wrote")
    version = value.get("version")
    if version != VERSION:  # checked before the keys, which may differ in another version
        raise BadArtifact(f"{path}: has format version {version}, this pard-onnx reads {VERSION}; use the one it is of")
    return from_json(Header, value, error=DamagedSnapshot)


def is_snapshot(path: Path) -> bool:
    """Whether the file is a saved conversation."""
    try:
        with open_arrays(path) as arrays:
            read_header(path, arrays)
    except BadArtifact:
        return False
    return True


def require(holds: bool, problem: str) -> None:
    """Raise DamagedSnapshot with this problem unless the condition holds."""
    if not holds:
        raise DamagedSnapshot(problem)


def to_array(value: object) -> NDArray[np.uint8]:
    """The value's JSON as an array of bytes; BadInput if the value has no JSON form."""
    try:
        return np.frombuffer(json.dumps(value, allow_nan=False).encode(), np.uint8)
    except (TypeError, ValueError) as error:
        raise BadInput(f"the messages cannot be saved: {error}") from error


def from_array(array: NDArray[np.uint8]) -> Any:
    """The value whose JSON `to_array` returned."""
    return json.loads(array.tobytes())
