"""safetensors files that are written one tensor after the other, so that a checkpoint never is in memory as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.checkpoints.tensors import DTYPES, INDEX, ONE_FILE
from pard_onnx.models.json_files import write_json
from pard_onnx.models.system_errors import naming

SHARD_BYTES = 4 << 30  # of a file, at most where no single group of tensors has more
STORED = {**DTYPES, "I32": np.dtype("<i4")}


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor that is to be written."""

    name: str
    dtype: str  # safetensors' name, a key of STORED
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * STORED[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors that are computed together and stored in one file, one behind the other."""

    tensors: tuple[NewTensor, ...]
    arrays: Callable[[], Iterable[NDArray[Any]]]  # their values in order, in pieces, in the types that STORED has

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def write_shards(folder: Path, groups: Sequence[TensorGroup]) -> list[str]:
    """Write the tensors to one safetensors file, or to several and their index; the names of the files."""
    shards = list(_shards(groups))
    names = [ONE_FILE]
    if len(shards) > 1:
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        held = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in _tensors(shard)}
        total = sum(group.nbytes for group in groups)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": held})
    for name, shard in zip(names, shards, strict=True):
        with naming(folder / name), (folder / name).open("wb") as file:
            _write(file, shard)
    return names if len(names) == 1 else [INDEX, *names]


def _shards(groups: Sequence[TensorGroup]) -> Iterator[list[TensorGroup]]:
    shard: list[TensorGroup] = []
    for group in groups:
        if shard and sum(held.nbytes for held in shard) + group.nbytes > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(group)
    yield shard


def _tensors(shard: Sequence[TensorGroup]) -> Iterator[NewTensor]:
    return (tensor for group in shard for tensor in group.tensors)


def _write(file: IO[bytes], shard: Sequence[TensorGroup]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without which transformers refuses the file
    end = 0
    for tensor in _tensors(shard):
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)
    for group in shard:
        written = sum(file.write(np.ascontiguousarray(piece).data) for piece in group.arrays())
        assert written == group.nbytes, f"{group.tensors[0].name}: {written} bytes, not {group.nbytes}"
