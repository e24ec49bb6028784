"""`GgufFile`: the header of a GGUF file, checked against the file's size before anything is allocated.

A file has, in this order: magic, version, the numbers of tensors and of metadata entries, the metadata (a key, a type
and a value each), the descriptions of tensors, and from the next multiple of the alignment on the tensors' data.
Source: docs/gguf.md of https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pard_onnx.models.checkpoints.config import Config
from pard_onnx.models.errors import BadCheckpoint, shown
from pard_onnx.models.folder_files import has_file
from pard_onnx.models.json_files import FETCH, LFS_POINTER

from .types import TYPE_NUMBERS, TYPES, GgmlType

ENDING = ".gguf"
MAGIC = b"GGUF"
SHORTEST = 24  # bytes: magic, version, two counts
VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes, where the metadata names none
DIMENSIONS = 4
# Far more than any model has: a damaged or hostile header must not keep a machine busy
MOST_TENSORS, MOST_ENTRIES, MOST_ITEMS, MOST_BYTES = 1 << 20, 1 << 16, 1 << 24, 1 << 26
MOST_TEXTS = 1 << 22  # of all lists; vocabularies and their merges have up to a million
LONGEST_NAME = 1000
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by value type
SPLIT = re.compile(r"-([0-9]{5})-of-([0-9]{5})\.gguf$")


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor as the header describes it."""

    file: Path
    kind: GgmlType
    shape: tuple[int, ...]  # [out, in] of a matrix: the file has the dimensions in the other order
    offset: int  # bytes from the beginning of the file


@dataclass(frozen=True, slots=True)
class GgufFile:
    """metadata: integers, floats, flags and texts; lists of texts; arrays of numbers. A text that is not UTF-8 stays
    bytes."""

    path: Path
    metadata: Config
    tensors: dict[str, Described]

    @classmethod
    def read(cls, path: Path) -> GgufFile:
        """Read the header, or the headers of a model in parts, of which `path` is the first.

        Raises BadCheckpoint for a broken, truncated or unsupported file, with its name.
        """
        first, *others = (cls._read_one(part) for part in _parts(path))
        tensors = dict(first.tensors)
        for part in others:
            for name, tensor in part.tensors.items():
                if name in tensors:
                    raise BadCheckpoint(f"{part.path}: has tensor {name}, which {tensors[name].file.name} has too")
                tensors[name] = tensor
        return cls(path, first.metadata, tensors)

    @classmethod
    def _read_one(cls, path: Path) -> GgufFile:
        try:
            size = path.stat().st_size
            if size < SHORTEST:
                raise BadCheckpoint(f"{path}: truncated or not GGUF: it has {size} bytes; download it again")
            with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                reader = _Reader(path, data, size)
                tensors, entries = reader.start()
                metadata = Config(path, reader.metadata(entries))
                return cls(path, metadata, reader.tensors(tensors, _alignment(metadata)))
        except OSError as error:
            raise BadCheckpoint(f"{path}: cannot be read: {error.strerror}") from error


def _parts(path: Path) -> list[Path]:
    """The files of a model; BadCheckpoint where parts are missing, or `path` is not the first of them."""
    found = SPLIT.search(path.name)
    if found is None:
        return [path]
    index, count = int(found[1]), int(found[2])
    stem = path.name[: found.start()]
    if index != 1:
        raise BadCheckpoint(f"{path}: is part {index} of {count}; name the first, {stem}-00001-of-{found[2]}{ENDING}")
    parts = [path, *(path.with_name(f"{stem}-{i:05}-of-{found[2]}{ENDING}") for i in range(2, count + 1))]
    for part in parts:
        if part is not path and not has_file(part, BadCheckpoint):
            raise BadCheckpoint(f"{part}: is missing beside {path.name}; download it")
    return parts


def _alignment(metadata: Config) -> int:
    alignment = metadata.integer("general.alignment", ALIGNMENT)
    if alignment & (alignment - 1):
        raise metadata.fault("general.alignment", f"is {alignment}; it must be a power of two")
    return alignment


class _Reader:
    """Reads values one after another; each is checked to end within the file before it is read."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size = path, data, size
        self.place = 0
        self.texts = 0  # in all lists
        self.what = "the header"  # what is being read, for errors

    def start(self) -> tuple[int, int]:
        """The numbers of tensors and of metadata entries. Raises BadCheckpoint for what is no GGUF of a known kind."""
        if self.data[: len(LFS_POINTER)] == LFS_POINTER:
            raise BadCheckpoint(f"{self.path}: {FETCH}")
        if self.data[:4] != MAGIC:
            raise BadCheckpoint(f"{self.path}: not a GGUF file: it begins with {self.data[:4]!r}; download it again")
        self.place = 4
        version = self.scalar("I")
        if version & 0xFFFF == 0:
            raise BadCheckpoint(f"{self.path}: is big-endian GGUF, which is not read; take the little-endian file")
        if version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise BadCheckpoint(f"{self.path}: is GGUF version {version}; {known} are read: convert the model again")
        tensors, entries = self.scalar("Q"), self.scalar("Q")
        self.require(tensors <= MOST_TENSORS and entries <= MOST_ENTRIES, f"{tensors} tensors and {entries} entries")
        return tensors, entries

    def metadata(self, entries: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for index in range(entries):
            self.what = f"metadata entry {index}"
            key = self.name()
            self.what = key
            if key in found:
                raise BadCheckpoint(f"{self.path}: has {key} twice; convert the model again")
            found[key] = self.value(self.scalar("I"))
        return found

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind != ARRAY:
            raise BadCheckpoint(f"{self.path}: {self.what} has the unknown value type {kind}; download it again")
        inner, count = self.scalar("I"), self.scalar("Q")
        self.require(count <= MOST_ITEMS, f"a list of {count}")
        if inner == STRING:
            self.require(count * 8 <= self.size - self.place, f"a list of {count}")
            self.texts += count
            self.require(self.texts <= MOST_TEXTS, f"{self.texts} texts")
            return [self.text() for _ in range(count)]
        if inner not in SCALARS:
            raise BadCheckpoint(f"{self.path}: {self.what} is a list of the unknown value type {inner}")
        dtype = np.dtype("<" + SCALARS[inner])
        return np.frombuffer(self.raw(count * dtype.itemsize), dtype)

    def tensors(self, count: int, alignment: int) -> dict[str, Described]:
        found: dict[str, Described] = {}
        for index in range(count):
            self.what = f"the description of tensor {index}"
            name = self.name()
            self.what = f"the description of tensor {name}"
            if name in found:
                raise BadCheckpoint(f"{self.path}: has two tensors {name}; convert the model again")
            found[name] = self.described(name)
        start = -(-self.place // alignment) * alignment
        placed = {name: Described(self.path, t.kind, t.shape, t.offset + start) for name, t in found.items()}
        for name, tensor in placed.items():
            end = tensor.offset + tensor.kind.nbytes(tensor.shape)
            if end > self.size:
                raise BadCheckpoint(
                    f"{self.path}: truncated: tensor {name} ends at byte {end} but the file has {self.size}; "
                    "download it again"
                )
        return placed

    def described(self, name: str) -> Described:
        """The description of one tensor, its offset counted from the beginning of the data."""
        count = self.scalar("I")
        self.require(1 <= count <= DIMENSIONS, f"{count} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(count))[::-1]
        self.require(min(shape) > 0 and math.prod(shape) < 1 << 48, f"the shape {list(shape)}")
        number = self.scalar("I")
        kind, offset = TYPES.get(TYPE_NUMBERS.get(number, "")), self.scalar("Q")
        if kind is None:
            known = TYPE_NUMBERS.get(number, f"type {number}")
            raise BadCheckpoint(f"{self.path}: tensor {name} is stored as {known}; supported: {', '.join(TYPES)}")
        self.require(shape[-1] % kind.block == 0, f"rows of {shape[-1]}, no multiple of {kind.name}'s {kind.block}")
        return Described(self.path, kind, shape, offset)

    def name(self) -> str:
        found = self.text()
        if isinstance(found, bytes):
            raise BadCheckpoint(f"{self.path}: {self.what} has a name that is not UTF-8; download it again")
        if len(found) > LONGEST_NAME or not found.isprintable():  # names stand in errors, which are one line
            raise BadCheckpoint(f"{self.path}: {self.what} has the name {shown(found)}; download it again")
        return found

    def text(self) -> str | bytes:
        length = self.scalar("Q")
        self.require(length <= MOST_BYTES, f"a text of {length} bytes")
        raw = self.raw(length)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw

    def scalar(self, form: str) -> Any:
        form = "<" + form
        return struct.unpack(form, self.raw(struct.calcsize(form)))[0]

    def raw(self, length: int) -> bytes:
        end = self.place + length
        if end > self.size:
            raise BadCheckpoint(f"{self.path}: truncated: ends within {self.what}; download it again")
        found = self.data[self.place : end]
        self.place = end
        return found

    def require(self, holds: bool, claimed: str) -> None:
        if not holds:
            raise BadCheckpoint(f"{self.path}: {self.what} claims {claimed}; the file is damaged, download it again")
