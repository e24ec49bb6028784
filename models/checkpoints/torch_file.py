"""Tensors of a file that `torch.save` wrote, read without torch and without running anything that the file names.

Such a file is a zip archive: `data.pkl`, a pickle that describes the tensors, and the tensors' values beside it. A
pickle may name any function of Python, which pickle's own reader would import and call. The reader here is another one:
it knows the few instructions that describe tensors in dictionaries, and a table of the names that these may use. Every
name stands for a function of this file. Whatever else is in the pickle is refused before any value is read.

Values are read where they lie in the file. `torch.save` never compresses them, so a compressed entry is refused, and no
file takes more memory than it has bytes.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from pard_onnx.models.errors import BadCheckpoint, shown
from pard_onnx.models.folder_files import open_file
from pard_onnx.models.json_files import FETCH, LFS_POINTER

from .tensors import DTYPES

MOST_PICKLE = 1 << 22  # bytes; that of a whole model of 1,000 tensors has 100 KB
MOST_DIRECTORY = 1 << 22  # bytes of the zip's list of entries
MOST_DIMENSIONS = 8
MOST_VALUES = 1 << 40  # of a tensor
TAIL = 1 << 16  # bytes at the end of a file in which the zip's list is found: its comment has no more
END, END64, LOCATOR64, LOCAL = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\3\4"
FULL = 0xFFFFFFFF  # of a number that has its value in the record of 64 bits
# Storage classes by the types of their values, as safetensors names them; only the types of DTYPES are read
STORAGES = {
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "DoubleStorage": ("F64", 8),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file of torch's: some values of a storage, which may lie in another order than the tensor's."""

    file: Path
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # values between neighbours of each axis
    offset: int  # bytes, of the first value in the file
    extent: int  # values from the first to the last one, in the file

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self, first: int, stop: int) -> NDArray[Any]:
        stored = DTYPES[self.dtype]
        if not self.shape:
            return np.fromfile(self.file, stored, 1, offset=self.offset).reshape(())
        shape = (max(0, stop - first), *self.shape[1:])
        if not prod(shape):
            return np.empty(shape, stored)
        mapped = np.memmap(self.file, stored, "r", self.offset, (self.extent,))
        strides = tuple(stride * stored.itemsize for stride in self.strides)
        # A copy, so that the map can be closed
        return np.array(as_strided(mapped[first * self.strides[0] :], shape, strides), order="C")


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a dictionary that torch saved, by name. Raises BadCheckpoint."""
    with open_file(path, BadCheckpoint) as stream:
        try:
            return _read(path, stream)
        except BadCheckpoint:  # a ValueError too
            raise
        except (
            ValueError,
            IndexError,
            KeyError,
            TypeError,
            OverflowError,
            RecursionError,
            EOFError,
            zipfile.BadZipFile,
            NotImplementedError,
            struct.error,
        ) as problem:
            reason = str(problem) if isinstance(problem, _Refused) else "it is damaged"
            raise BadCheckpoint(
                f"{path}: is not a file of tensors that is read here: {reason}; download it again, or convert it to "
                "safetensors"
            ) from problem


class _Refused(ValueError):
    """What no file of tensors holds, as the end of a sentence."""


# The zip


@dataclass(frozen=True, slots=True)
class _Archive:
    stream: BinaryIO
    path: Path
    opened: zipfile.ZipFile
    entries: dict[str, zipfile.ZipInfo]  # by their names within the archive's one folder
    end: int  # bytes, of all entries

    def read(self, name: str, most: int) -> bytes:
        """The bytes of a small entry."""
        entry = self.entries.get(name)
        if entry is None:
            raise _Refused(f"it has no {name}")
        if entry.file_size > most:
            raise _Refused(f"its {name} has {entry.file_size} bytes; at most {most} are read")
        self.place(name)
        return self.opened.read(entry)

    def place(self, name: str) -> tuple[int, int]:
        """Where an entry's bytes begin in the file, and how many they are."""
        entry = self.entries.get(name)
        if entry is None:
            raise _Refused(f"it has no entry {shown(name)}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            raise _Refused(f"its entry {shown(name)} is compressed or encrypted, which torch never does")
        self.stream.seek(entry.header_offset)
        header = self.stream.read(30)
        if len(header) < 30 or header[:4] != LOCAL:
            raise _Refused(f"its entry {shown(name)} has no header")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + entry.file_size > self.end:
            raise _Refused(f"its entry {shown(name)} ends behind the file")
        return start, entry.file_size


def _read(path: Path, stream: BinaryIO) -> dict[str, StoredTensor]:
    start = stream.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise BadCheckpoint(f"{path}: {FETCH}")
    if start[:4] != LOCAL:
        old = "it is in the format of torch before 1.6" if start[:2] == b"\x80\x02" else "it is no zip archive"
        raise _Refused(f"{old} (torch.save(torch.load(FILE, weights_only=True), FILE) writes the present one)")
    end = _directory_start(stream)
    with zipfile.ZipFile(stream) as opened:
        entries: dict[str, zipfile.ZipInfo] = {}
        folders = set()
        for entry in opened.infolist():
            folder, _, name = entry.filename.partition("/")
            folders.add(folder)
            if name in entries:
                raise _Refused(f"it has the entry {shown(name)} twice")
            entries[name] = entry
        if len(folders) > 1:
            raise _Refused("its entries are in several folders")
        archive = _Archive(stream, path, opened, entries, end)
        if "byteorder" in entries and archive.read("byteorder", 16) != b"little":
            raise _Refused("it was written on a machine of another byte order")
        return dict(_tensors(_value(archive.read("data.pkl", MOST_PICKLE)), archive))


def _directory_start(stream: BinaryIO) -> int:
    """Where the zip's list of entries begins. It is checked here, since zipfile reads a list of any length."""
    size = stream.seek(0, 2)
    stream.seek(max(0, size - TAIL))
    tail = stream.read()
    place = tail.rfind(END)
    if place < 0 or len(tail) < place + 22:
        raise _Refused("it is truncated")
    length, start = struct.unpack("<II", tail[place + 12 : place + 20])
    if FULL in (length, start) or tail[place - 20 : place - 16] == LOCATOR64:
        record = struct.unpack("<Q", tail[place - 12 : place - 4])[0] if place >= 20 else size
        stream.seek(min(record, size))
        data = stream.read(56)
        if len(data) < 56 or data[:4] != END64:
            raise _Refused("it is truncated")
        length, start = struct.unpack("<QQ", data[40:56])
    if length > MOST_DIRECTORY:
        raise _Refused(f"its list of entries has {length} bytes; at most {MOST_DIRECTORY} are read")
    if start + length > size:
        raise _Refused("it is truncated")
    stream.seek(0)
    return int(start)


# The pickle


@dataclass(frozen=True, slots=True)
class _Storage:
    """The values of tensors: an entry of the archive."""

    dtype: str
    size: int  # bytes of a value
    key: str
    count: int  # values


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor as the pickle describes it."""

    storage: _Storage
    offset: int  # values
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Kind:
    """A storage's class."""

    dtype: str
    size: int


def _rebuilt(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _View:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or any(type(number) is not int or number < 0 for number in numbers):
        raise _Refused("a tensor has no place, shape or strides")
    if len(shape) != len(strides) or len(shape) > MOST_DIMENSIONS or prod(shape) > MOST_VALUES:
        raise _Refused(f"a tensor has the shape {shown(shape)}")
    return _View(storage, offset, tuple(shape), tuple(strides))


def _parameter(data: Any, *_: Any) -> _View:
    if not isinstance(data, _View):
        raise _Refused("a parameter is no tensor")
    return data


def _dictionary(*arguments: Any) -> dict[Any, Any]:
    if arguments:
        raise _Refused("a dictionary is made of something")
    return {}


# What the names of a pickle stand for. A function is called with the arguments that the pickle gives it.
NAMES: dict[tuple[str, str], Callable[..., Any] | _Kind] = {
    ("collections", "OrderedDict"): _dictionary,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    **{("torch", name): _Kind(*kind) for name, kind in STORAGES.items()},
}


class _Machine:
    """The stack of a pickle's instructions."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise _Refused("its instructions are in no order")
        return self.stack.pop()

    def tuple_of(self, count: int, _: Any) -> None:
        self.stack.append(tuple(reversed([self.pop() for _ in range(count)])))

    def remember(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def name(self, names: str) -> None:
        module, _, name = names.partition(" ")
        found = NAMES.get((module, name))
        if found is None:
            raise _Refused(f"it names {shown(f'{module}.{name}')}, which is no part of a tensor and is never called")
        self.stack.append(found)

    def call(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(arguments, tuple) or isinstance(function, _Kind) or not callable(function):
            raise _Refused("it calls what is no function")
        self.stack.append(function(*arguments))

    def storage(self, _: Any) -> None:
        kind, found, key, _device, count = self.pop()
        if kind != "storage" or not isinstance(found, _Kind) or not isinstance(key, str) or type(count) is not int:
            raise _Refused("it holds an object that is no tensor")
        self.stack.append(_Storage(found.dtype, found.size, key, count))

    def set_items(self, items: list[Any]) -> None:
        into = self.stack[-1]
        if not isinstance(into, dict) or len(items) % 2:
            raise _Refused("it sets entries of what is no dictionary")
        into.update(zip(items[::2], items[1::2], strict=True))

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def add(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise _Refused("it adds to what is no list")
        self.stack[-1].extend(items)

    def drop_state(self, _: Any) -> None:
        """The attributes of an object (`_metadata` of a model's dictionary); nothing reads them."""
        self.pop()
        if not isinstance(self.stack[-1], dict):
            raise _Refused("it gives attributes to what is no dictionary")


Instruction = Callable[[_Machine, Any], None]
_push: Instruction = lambda machine, value: machine.stack.append(value)  # noqa: E731


def _constant(make: Callable[[], Any]) -> Instruction:
    return lambda machine, _: machine.stack.append(make())


def _tuple(count: int) -> Instruction:
    return lambda machine, _: machine.tuple_of(count, _)


# Those of protocol 2, which torch writes; it reads no others itself (weights_only=True)
INSTRUCTIONS: dict[str, Instruction] = {
    "PROTO": lambda machine, _: None,
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), _push),
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "EMPTY_DICT": _constant(dict),
    "EMPTY_LIST": _constant(list),
    "EMPTY_TUPLE": _constant(tuple),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    **{f"TUPLE{count}": _tuple(count) for count in (1, 2, 3)},
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, key: machine.stack.append(machine.memo[key])),
    "GLOBAL": _Machine.name,
    "BINPERSID": _Machine.storage,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.drop_state,
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "APPEND": lambda machine, _: machine.add([machine.pop()]),
    "APPENDS": lambda machine, _: machine.add(machine.since_mark()),
}


def _value(data: bytes) -> Any:
    """The value that a pickle describes."""
    machine = _Machine()
    for instruction, argument, _ in pickletools.genops(data):
        if instruction.name == "STOP":
            return machine.pop()
        known = INSTRUCTIONS.get(instruction.name)
        if known is None:
            raise _Refused(f"its pickle has the instruction {instruction.name}, which no tensors need")
        known(machine, argument)
    raise _Refused("its pickle does not end")


# Tensors


def _tensors(value: Any, archive: _Archive) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of a dictionary; its other values are left out, as of a whole state of a training."""
    if not isinstance(value, dict):
        raise _Refused("it holds no dictionary of tensors")
    for name, view in value.items():
        if isinstance(name, str) and isinstance(view, _View):
            yield name, _placed(name, view, archive)


def _placed(name: str, view: _View, archive: _Archive) -> StoredTensor:
    storage = view.storage
    start, nbytes = archive.place(f"data/{storage.key}")
    last = sum((extent - 1) * stride for extent, stride in zip(view.shape, view.strides, strict=True))
    extent = last + 1 if prod(view.shape) else 0
    if storage.count * storage.size != nbytes or (extent and view.offset + extent > storage.count):
        raise _Refused(f"the tensor {shown(name)} is larger than its values, of which the file has {nbytes} bytes")
    offset = start + view.offset * storage.size if extent else start
    return StoredTensor(archive.path, storage.dtype, view.shape, view.strides, offset, extent)
