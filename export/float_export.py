"""`FloatExport`: an exported folder whose weights are floats, read as a checkpoint.

It holds all weights of its checkpoint. The data file has the matrices as [in, out], which MatMul reads, with those of
one input side by side, and the embedding as [rows, hidden]. Norms and biases are in the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from pard_onnx.models.checkpoints.checkpoint import EMBEDDING, Checkpoint
from pard_onnx.models.checkpoints.config import FILE as CONFIG
from pard_onnx.models.checkpoints.tensors import DTYPES, Tensor, TensorEntry
from pard_onnx.models.devices import Form, device_named
from pard_onnx.models.errors import BadArtifact, BadInput
from pard_onnx.models.families import shapes
from pard_onnx.models.graph_file import read_graph
from pard_onnx.models.manifest import FILE_NAME, Manifest

PLAIN = "plain."  # the prefix of constants of portable graphs
TYPES = {ir.DataType.FLOAT: "F32", ir.DataType.FLOAT16: "F16"}


@dataclass(frozen=True, slots=True)
class Columns:
    """A matrix [out, in] that a file holds as some columns of a matrix [in, pitch]."""

    file: Path
    dtype: str  # safetensors' name
    shape: tuple[int, ...]  # [out, in]
    offset: int  # bytes, of the first value
    pitch: int  # values between the rows of the stored matrix

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self, first: int, stop: int) -> NDArray[Any]:
        stored, width = DTYPES[self.dtype], self.shape[1]
        if stop <= first:
            return np.empty((0, width), stored)
        offset, count = self.offset + first * stored.itemsize, (width - 1) * self.pitch + stop - first
        mapped = np.memmap(self.file, stored, "r", offset, (count,))
        strides = (stored.itemsize, self.pitch * stored.itemsize)
        # A copy, so that the map can be closed
        return np.array(as_strided(mapped, (stop - first, width), strides), order="C")


@dataclass(frozen=True, slots=True, eq=False)
class InMemory:
    """A small tensor, which is stored in the graph."""

    dtype: str
    values: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def read(self, first: int, stop: int) -> NDArray[Any]:
        return self.values[first:stop].copy()


@dataclass(frozen=True, slots=True)
class FloatExport:
    """An exported folder in fp32 or fp16."""

    manifest: Manifest
    checkpoint: Checkpoint  # the export's folder and weights, by the names of the checkpoint that it was made of

    @classmethod
    def open(cls, folder: Path) -> FloatExport:
        """Read manifest, graph and hashes. Raises BadInput for an export that is quantized, BadArtifact for damage."""
        manifest = Manifest.read(folder)
        lossy = [tensor.format for tensor in manifest.tensors if tensor.format not in ("float32", "float16")]
        if lossy:
            raise BadInput(
                f"{folder}: is quantized already ({lossy[0]}), and rounding twice loses more; name the checkpoint that "
                f"it was exported from, {manifest.source.model}, or an export of that in fp32 or fp16"
            )
        if manifest.draft_vocabulary:
            raise BadInput(
                f"{folder}: its LM head has only {manifest.draft_vocabulary.size} of the ids; name the checkpoint "
                f"that it was exported from, {manifest.source.model}"
            )
        manifest.verify(folder)
        if CONFIG not in manifest.sizes:
            raise BadArtifact(f"{folder / FILE_NAME}: its files have no {CONFIG}; export {manifest.source.model} again")
        for name in manifest.graph_files:
            read_graph(folder / name, manifest.sizes)
        spec = manifest.spec
        found = dict(_tensors(ir.load(folder / manifest.graph_files[0]), dict(shapes(spec)), spec.norm_offset))
        absent = [name for name, _ in shapes(spec) if name not in found]
        if absent:
            raise BadArtifact(f"{folder}: its graph has no {absent[0]}; export {manifest.source.model} again")
        tensors = {name: found[name] for name, _ in shapes(spec)}
        return cls(manifest, Checkpoint(folder, spec, tensors, names=frozenset(manifest.sizes)))

    def form(self) -> Form:
        """The form of its graphs. Raises BadInput for a device that this version does not know."""
        found = self.manifest
        attention: Any = found.attention
        return Form(device_named(found.device), attention, found.opset, found.recipe.floats, found.draft_length)

    def graphs(self) -> list[ir.Model]:
        """The graphs, read from their files, in the manifest's order; the first has every matrix."""
        return [ir.load(self.checkpoint.folder / name) for name in self.manifest.graph_files]


def tensor_names(constant: str) -> list[str]:
    """The checkpoint's names of the tensors that a constant of the graph holds, by the constant's name.

    Several tensors: `a.q_proj+k_proj.weight` (matrices, store.py), `a.q_proj.bias+a.k_proj.bias` (vectors, lower.py).
    """
    whole, _, kind = constant.removeprefix(PLAIN).rpartition(".")
    if f".{kind}+" in whole:
        return f"{whole}.{kind}".split("+")
    first, *others = whole.split("+")
    stem = first.rpartition(".")[0]
    return [f"{first}.{kind}", *(f"{stem}.{other}.{kind}" for other in others)]


def is_norm(names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a constant of these tensors is a norm's weight: the only vectors that are no biases."""
    return len(names) == 1 and len(shapes.get(names[0], ())) == 1 and names[0].endswith(".weight")


def _tensors(model: ir.Model, needed: Mapping[str, tuple[int, ...]], offset: float) -> Iterator[tuple[str, Tensor]]:
    """offset: what norms add to their weights; the graph has the sum."""
    for value in model.graph.initializers.values():
        names, stored = tensor_names(str(value.name)), value.const_value
        if stored is None or stored.dtype not in TYPES or not all(name in needed for name in names):
            continue
        if offset and is_norm(names, needed):
            # In float32 the sum less the offset is exact, and gives the same sum again
            yield names[0], InMemory("F32", stored.numpy().astype(np.float32) - np.float32(offset))
            continue
        extents = [needed[name] for name in names]
        _require_shape(str(value.name), tuple(stored.shape), extents, names == [EMBEDDING])
        yield from zip(names, _parts(stored, extents, names == [EMBEDDING]), strict=True)


def _require_shape(name: str, found: tuple[object, ...], shapes: list[tuple[int, ...]], upright: bool) -> None:
    """BadArtifact unless a constant holds tensors of these shapes: as they are, or matrices [out, in] as columns."""
    first = shapes[0]
    joined = (sum(shape[0] for shape in shapes), *first[1:])
    expected = joined if upright or len(first) == 1 else joined[::-1]
    if found != expected or any(shape[1:] != first[1:] for shape in shapes):
        raise BadArtifact(
            f"the tensor {name} of the graph has the shape {list(found)}; the manifest says {list(expected)}"
        )


def _parts(stored: ir.TensorProtocol, shapes: list[tuple[int, ...]], upright: bool) -> list[Tensor]:
    """The tensors of these shapes in one constant. upright: stored as [out, in], as in the checkpoint."""
    dtype, item, ends = TYPES[stored.dtype], stored.dtype.itemsize, np.cumsum([shape[0] for shape in shapes])
    starts = [int(end) - shape[0] for end, shape in zip(ends, shapes, strict=True)]
    if not isinstance(stored, ir.ExternalTensor):
        values = stored.numpy()
        return [InMemory(dtype, values[start : start + shape[0]]) for start, shape in zip(starts, shapes, strict=True)]
    path, offset = Path(stored.path), stored.offset or 0
    if upright:
        return [TensorEntry(path, dtype, shapes[0], offset, int(item) * prod(shapes[0]))]
    pitch = int(ends[-1])
    return [
        Columns(path, dtype, shape, offset + start * int(item), pitch)
        for start, shape in zip(starts, shapes, strict=True)
    ]
