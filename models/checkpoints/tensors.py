"""Tensors of a checkpoint: found by the headers of its safetensors files, read in blocks of rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.errors import BadCheckpoint
from pard_onnx.models.folder_files import file_facts, has_file, is_plain_name, open_file
from pard_onnx.models.json_files import FETCH, LFS_POINTER, read_json

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
TRUNK = "model."  # prefix of all tensors but the head's
GGUF, ONNX = ".gguf", ".onnx"  # endings of other formats of weights
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# safetensors' names of the floats that are read, and their types in the file
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
BLOCK_VALUES = 1 << 22  # 16 MiB as float32
MAX_HEADER = (
    1 << 24
)  # bytes: the format allows 100 MB, of which hostile ones take gigabytes; real ones have some 100 KB


class Tensor(Protocol):
    """A tensor whose rows can be read one block at a time. dtype: safetensors' name of its floats."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def read(self, first: int, stop: int) -> NDArray[Any]:
        """Rows first .. stop of its first axis, in the type that DTYPES has for it."""
        ...


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor in a file."""

    file: Path
    dtype: str  # safetensors' name (F32, F16, BF16, ...)
    shape: tuple[int, ...]
    offset: int  # bytes from the beginning of the file
    nbytes: int

    def read(self, first: int, stop: int) -> NDArray[Any]:
        stored, row = DTYPES[self.dtype], math.prod(self.shape[1:])
        shape = (max(0, stop - first), *self.shape[1:]) if self.shape else ()
        count = math.prod(shape)
        raw: NDArray[Any] = np.fromfile(self.file, stored, count, offset=self.offset + first * row * stored.itemsize)
        if raw.size != count:
            raise BadCheckpoint(f"{self.file}: ends within a tensor; download it again")
        return raw.reshape(shape)


def find_tensors(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of a checkpoint folder by name, in one file or in shards. Raises BadCheckpoint.

    A model that was saved without its head's class has names without `model.`; they get it, as in transformers.
    """
    found = _stored_tensors(folder)
    if any(name.startswith(TRUNK) for name in found):
        return found
    head = HEAD.removesuffix("weight")  # also of its parts in a quantized checkpoint
    return {name if name.startswith(head) else TRUNK + name: entry for name, entry in found.items()}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: one file, or the shards. Raises BadCheckpoint."""
    if (folder / ONE_FILE).is_file():
        return [folder / ONE_FILE]
    return [folder / shard for shard in _shards(folder / INDEX, _shard_of(folder / INDEX))]


def _stored_tensors(folder: Path) -> dict[str, TensorEntry]:
    if (folder / ONE_FILE).is_file():
        return read_header(folder / ONE_FILE)
    if (folder / INDEX).is_file():
        return _sharded(folder)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise BadCheckpoint(
            f"{folder}: has only pickled weights ({pickles[0]}), which are never loaded because they can run code; "
            "convert them to safetensors (save_pretrained in transformers does)"
        )
    raise BadCheckpoint(f"{folder}: no weights: neither {ONE_FILE} nor {INDEX} is there{unread_weights(folder)}")


def unread_weights(folder: Path) -> str:
    """The end of an error's text about a folder that holds weights in another format; "" for others."""
    found = {path.suffix.lower(): path for path in sorted(folder.iterdir(), reverse=True)}
    if file := found.get(GGUF):
        return f"; name the file itself: {file}"
    return f"; {file.name} is not read: the checkpoint in safetensors is needed" if (file := found.get(ONNX)) else ""


def _sharded(folder: Path) -> dict[str, TensorEntry]:
    index = folder / INDEX
    shard_of = _shard_of(index)
    headers = {shard: read_header(folder / shard) for shard in _shards(index, shard_of)}
    if not any(HEAD in header for header in headers.values()):
        shard_of.pop(HEAD, None)  # of a tied head, which some tools name and do not store
    for name, shard in shard_of.items():
        if name not in headers[shard]:
            raise BadCheckpoint(f"{folder / shard}: has no tensor {name}, which {INDEX} says it has; download it again")
    # transformers reads all that is in the shards, also what the index leaves out; of two equal names the last one
    return {name: entry for header in headers.values() for name, entry in header.items()}


def _shard_of(index: Path) -> dict[str, str]:
    """The names of the files that hold the tensors, by the tensors' names."""
    shard_of = read_json(index, BadCheckpoint).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise BadCheckpoint(f"{index}: no weight_map from tensor names to file names; download it again")
    return shard_of


def _shards(index: Path, shard_of: Mapping[str, str]) -> list[str]:
    """The names of the files that an index names, all of which are beside it."""
    shards = sorted(set(shard_of.values()))
    for shard in shards:
        if not is_plain_name(shard):  # an index may not reach outside its folder
            raise BadCheckpoint(f"{index}: {shard!r} is not the name of a file beside it")
    absent = [shard for shard in shards if not has_file(index.parent / shard, BadCheckpoint)]
    if absent:
        raise BadCheckpoint(f"{index}: names files that are not there: {', '.join(absent)}; download them")
    return shards


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file by name. Raises BadCheckpoint for a broken or truncated one."""
    size = file_facts(file, BadCheckpoint).st_size
    with open_file(file, BadCheckpoint) as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise BadCheckpoint(f"{file}: {FETCH}")
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise BadCheckpoint(f"{file}: truncated or not safetensors: no whole header in its {size} bytes")
        if length > MAX_HEADER:
            raise BadCheckpoint(f"{file}: has a header of {length} bytes; at most {MAX_HEADER} are read")
        text = stream.read(length)
    try:
        entries = dict(_entries(file, _header(text), start=8 + length))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BadCheckpoint(f"{file}: not a safetensors file (broken header); download it again") from error
    _require_whole(file, entries, 8 + length, size)
    return entries


def _header(text: bytes) -> dict[str, Any]:
    """The header's object. ValueError for JSON that is not strict, and for a name that is there twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name is there twice")
        return found

    def refuse(name: str) -> None:
        raise ValueError(name)

    if not text.startswith(b"{"):
        raise ValueError("no object")
    header = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    json.dumps(header, ensure_ascii=False).encode("utf-8")  # halves of surrogate pairs are no text
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__")
    found: dict[str, Any] = header
    return found


def _entries(file: Path, header: Mapping[str, Any], start: int) -> Iterator[tuple[str, TensorEntry]]:
    for name, fact in header.items():
        begin, end = (_whole(offset) for offset in fact["data_offsets"])
        shape = tuple(_whole(extent) for extent in fact["shape"])
        dtype = DTYPES.get(fact["dtype"])
        if any(product >= 1 << 64 for product in accumulate(shape, mul)):
            raise OverflowError(name)
        if end < begin or (dtype and end - begin != math.prod(shape) * dtype.itemsize):
            raise ValueError(name)
        yield name, TensorEntry(file, fact["dtype"], shape, start + begin, end - begin)


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError(value)
    return value


def _require_whole(file: Path, entries: Mapping[str, TensorEntry], start: int, size: int) -> None:
    """BadCheckpoint unless the tensors lie one behind the other up to the file's end, as the format demands."""
    last = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        end = entry.offset + entry.nbytes
        if end > size:
            raise BadCheckpoint(
                f"{file}: truncated: tensor {name} ends at byte {end} but the file has {size}; download it again"
            )
        if entry.offset != last:
            problem = "overlaps the one before it" if entry.offset < last else "leaves a gap before it"
            raise BadCheckpoint(f"{file}: not a safetensors file (tensor {name} {problem}); download it again")
        last = end
    if last != size:
        raise BadCheckpoint(
            f"{file}: not a safetensors file ({size - last} bytes behind its tensors); download it again"
        )


def read_tensor(entry: Tensor, rows: slice | None = None) -> NDArray[np.float32]:
    """The tensor as float32, or a block of its rows (a slice of step 1 over the first axis).

    No other rows are read, so a matrix can be streamed. Raises BadCheckpoint if the file ends early.
    """
    first, stop, step = (rows or slice(None)).indices(entry.shape[0] if entry.shape else 1)
    if step != 1:
        raise ValueError(f"rows of step {step}; only 1 is read")
    raw = entry.read(first, stop)
    if entry.dtype == "BF16":  # bfloat16 is the upper half of a float32
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    found: NDArray[np.float32] = raw.astype(np.float32, order="C", copy=False)
    return found


def encoded(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Floats rounded to a stored type, halves to even, in the type that DTYPES has for it."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):  # who stores the values refuses infinite ones
            return values.astype(DTYPES[dtype])
    bits = np.ascontiguousarray(values).view(np.uint32)
    found: NDArray[Any] = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), found)


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of rows, in order, of at most BLOCK_VALUES values (one row at least), for reading piece by piece."""
    rows = shape[0]
    step = max(1, BLOCK_VALUES // max(1, math.prod(shape[1:])))
    return (slice(i, min(i + step, rows)) for i in range(0, rows, step))


def equal_tensors(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same values, read by blocks of rows up to the first difference."""
    return all(np.array_equal(read_tensor(a, rows), read_tensor(b, rows)) for rows in row_blocks(a.shape))


def require_finite(name: str, array: NDArray[np.float32]) -> None:
    """Raises BadCheckpoint, naming the tensor, if `array` holds an infinity or a NaN."""
    if not np.isfinite(array).all():
        raise BadCheckpoint(f"tensor {name} holds values that are not finite; the checkpoint is damaged")


def rounded(value: float, dtype: str) -> float:
    """The nearest number that float32, float16 or bfloat16 can hold, halves to even."""
    if dtype != "bfloat16":
        return float(np.dtype(dtype).type(value))
    bits = np.float32(value).view(np.uint32)
    return float(((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32))
