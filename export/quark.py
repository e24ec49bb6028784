"""`--device npu-oga`: a checkpoint in the layout of AMD Quark, which AMD's `model_generate` makes an NPU's model of.

1. plan     output folder, what the layout cannot hold, the groups of tensors, disk space
2. weights  rounded by a recipe, or the integers of a quantized checkpoint, written matrix by matrix
3. configs  config.json with `quantization_config`, tokenizer files, a record of what was exported
4. check    the folder is read again by this package's own reader
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.checkpoints.checkpoint import EMBEDDING, Checkpoint
from pard_onnx.models.checkpoints.config import FILE as CONFIG
from pard_onnx.models.checkpoints.quantization import KEY, PackedMatrix
from pard_onnx.models.checkpoints.tensors import encoded, read_tensor, require_finite, row_blocks
from pard_onnx.models.checks import Progress, no_progress
from pard_onnx.models.devices import NPU_OGA
from pard_onnx.models.errors import BadInput, Failure
from pard_onnx.models.families import shapes
from pard_onnx.models.json_files import read_json, write_json
from pard_onnx.models.manifest import Quantization, Source
from pard_onnx.models.spec import PROJECTION, ModelSpec
from pard_onnx.quantize.packing.imported import imported_matrices
from pard_onnx.quantize.packing.pack import Float, PackedRows, RoundingError, pack, unpack
from pard_onnx.quantize.packing.prepared import HEAD, Prepared
from pard_onnx.quantize.quantizer import QuantizationRequest, quantize
from pard_onnx.quantize.recipes import INT4_ZERO, NamedRecipe

from .output import ELSEWHERE, QUARK_RECORD, checked_output_folder, copy_side_files, replacing
from .quark_layout import (
    GROUP,
    PER_WORD,
    older_rotary_keys,
    quantization_config,
    quark_levels,
    words_of,
)
from .shards import NewTensor, TensorGroup, write_shards

ROWS = 512  # of a matrix, which are packed at a time; a multiple of PER_WORD
LAYOUT = "quark uint4 per group of 128"


@dataclass(frozen=True, slots=True)
class QuarkJob:
    """What to export, and how it is rounded."""

    checkpoint: Checkpoint
    source: Source
    output: Path  # a folder that does not exist, unless `force` is set
    order: QuantizationRequest | None  # None: the checkpoint's own integers are kept
    force: bool = False  # replace an earlier export in `output`


@dataclass(frozen=True, slots=True)
class QuarkExport:
    """What was written."""

    spec: ModelSpec
    source: Source
    dtype: str  # of scales, embedding, norms and biases, safetensors' name
    matrices: int
    bytes: int  # of the tensors
    error: float  # root mean square of the weights' rounding errors over that of the weights; 0: integers were kept
    quantization: Quantization | None


def export_quark(job: QuarkJob, progress: Progress = no_progress) -> QuarkExport:
    """Write the checkpoint folder `job.output`, all or nothing. Raises BadInput for what the layout cannot hold."""
    output = checked_output_folder(job.output, job.checkpoint.path, force=job.force)
    require_exportable(job)
    with replacing(output, force=job.force) as folder:
        require_space(job, folder)
        with _weights(job, folder, progress) as weights:
            groups = list(weights.groups())
            write_shards(folder, groups)
            progress("weights", weights.total, weights.total)
        write_configs(job, weights, folder)
        done = QuarkExport(
            job.checkpoint.spec,
            job.source,
            weights.dtype,
            len(weights.matrices),
            sum(group.nbytes for group in groups),
            weights.error.relative,
            weights.quantization,
        )
        write_json(folder / QUARK_RECORD, record(done))
        require_readable(job.checkpoint.spec, folder)
    return done


# 1. Plan


def require_exportable(job: QuarkJob) -> None:
    """BadInput for a draft, for widths that groups of 128 do not divide, and for integers of another form."""
    checkpoint = job.checkpoint
    if checkpoint.spec.role == "draft" or f"{PROJECTION}.weight" in checkpoint.tensors:
        raise BadInput(
            f"{checkpoint.path}: is a draft, and AMD's runtime runs no drafts: its loop has no mask tokens and feeds "
            f"no hidden states; export the draft with --device cpu, and a target with --device {NPU_OGA}"
        )
    matrices = matrix_shapes(checkpoint)
    for name, (_, width) in matrices.items():
        if width % GROUP:
            raise BadInput(
                f"{checkpoint.path}: {name} has {width} columns, which are no multiple of {GROUP}, and the groups of "
                f"{NPU_OGA} are {GROUP} columns; take a model of other widths, or --device npu"
            )
    if checkpoint.quantization is None:
        if job.order is None or not holds(job.order.recipe, checkpoint.spec):
            raise BadInput(f"{NPU_OGA} needs a recipe with zero points in blocks of {GROUP}")
        return
    imported = imported_matrices(checkpoint)
    assert imported is not None
    for name in matrices:
        fmt = imported.format(name)
        if fmt is None:
            found = "is in floats, which AMD's model builder reads of the LM head only"
        elif imported.order(name) is not None:
            found = f"has columns in another order than its groups' (act-order), which {NPU_OGA} cannot say"
        elif fmt.minimums or (fmt.bits, fmt.block) != (4, GROUP):
            found = f"is {fmt.name}, and {NPU_OGA} has 4 bits in groups of {GROUP} columns"
        else:
            continue
        raise BadInput(f"{checkpoint.path}: {name} {found}; name the checkpoint in floats")


def holds(recipe: NamedRecipe, spec: ModelSpec) -> bool:
    """Whether a recipe rounds every matrix to the layout's format."""
    formats = recipe.formats(spec)
    found = {formats.matrices, formats.head, *(fmt for _, fmt in formats.overrides)}
    return not recipe.mixed and found == {INT4_ZERO}


def matrix_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """The matrices that are stored in integers, or would be, by name; also a tied head, which becomes one."""
    spec = checkpoint.spec
    found = {name.removesuffix(".weight"): shape for name, shape in shapes(spec) if len(shape) == 2}
    embedding = found.pop(EMBEDDING.removesuffix(".weight"))
    kept = checkpoint.quantization is not None and HEAD not in checkpoint.packed  # its maker left the head in floats
    if not kept:
        found[HEAD] = embedding
    else:
        found.pop(HEAD, None)
    return {name: (shape[0], shape[1]) for name, shape in found.items()}


def require_space(job: QuarkJob, folder: Path) -> None:
    """Failure if the disk of `folder` has too little room; a recipe that reads text keeps packed matrices there too."""
    spec = job.checkpoint.spec
    packed = sum(map(prod, matrix_shapes(job.checkpoint).values())) * 9 // 16
    floats = 2 * spec.vocabulary.rows * spec.hidden
    needed, free = packed * (2 if job.order else 1) + floats + (64 << 20), shutil.disk_usage(folder).free
    if free < needed:
        found = f"{free >> 20} MiB free, the export needs about {needed >> 20} MiB"
        raise Failure(f"{folder.parent}: {found}; free some space or {ELSEWHERE}")


# 2. Weights


@dataclass(slots=True)
class _Weights:
    """The tensors of the new folder, computed when they are written."""

    checkpoint: Checkpoint
    prepared: Prepared | None  # rounded matrices, or the integers of a quantized checkpoint
    quantization: Quantization | None
    progress: Progress
    matrices: dict[str, tuple[int, int]]
    dtype: str  # of the floats
    total: int  # weights
    done: int = 0
    error: RoundingError = field(default_factory=RoundingError)

    def groups(self) -> Iterator[TensorGroup]:
        """Every tensor, in the checkpoint's order; a tied head last."""
        names = dict(shapes(self.checkpoint.spec))
        for name, shape in names.items():
            matrix = name.removesuffix(".weight")
            yield self._packed(matrix) if matrix in self.matrices else self._floats(name, shape)
        if HEAD in self.matrices and f"{HEAD}.weight" not in names:
            yield self._packed(HEAD)

    def _floats(self, name: str, shape: tuple[int, ...]) -> TensorGroup:
        def arrays() -> Iterator[NDArray[Any]]:
            vector = self.prepared.vector(name) if self.prepared else None
            if vector is not None:
                yield _stored(name, vector, self.dtype)
                return
            for rows in row_blocks(shape):
                yield _stored(name, read_tensor(self.checkpoint.tensors[name], rows), self.dtype)
                self._advance(prod((rows.stop - rows.start, *shape[1:])))

        return TensorGroup((NewTensor(name, self.dtype, shape),), arrays)

    def _packed(self, name: str) -> TensorGroup:
        outputs, width = self.matrices[name]
        words, groups = -(-outputs // PER_WORD), width // GROUP
        tensors = (
            NewTensor(f"{name}.weight", "I32", (width, words)),
            NewTensor(f"{name}.weight_zero_point", "I32", (groups, words)),
            NewTensor(f"{name}.weight_scale", self.dtype, (groups, outputs)),
        )
        return TensorGroup(tensors, lambda: self._arrays(name, (outputs, width)))

    def _arrays(self, name: str, shape: tuple[int, int]) -> Iterator[NDArray[Any]]:
        """The three tensors of a matrix. The words are filled by blocks of rows, which are columns of the words."""
        (outputs, width), words = shape, -(-shape[0] // PER_WORD)
        weight, zero = (np.zeros((extent, words), np.uint32) for extent in (width, width // GROUP))
        scale = np.zeros((width // GROUP, outputs), np.float32)
        for first in range(0, outputs, ROWS):
            rows = slice(first, min(first + ROWS, outputs))
            part = slice(first // PER_WORD, -(-rows.stop // PER_WORD))
            levels, zeros, scales = quark_levels(name, self._rows(name, rows))
            weight[:, part], zero[:, part], scale[:, rows] = words_of(levels), words_of(zeros), scales.T
            self._advance((rows.stop - first) * width)
        yield weight
        yield zero
        yield _stored(f"{name}.weight_scale", scale, self.dtype)

    def _rows(self, name: str, rows: slice) -> PackedRows:
        """Rows of a matrix, rounded. A tied head has the embedding's name."""
        stored = EMBEDDING.removesuffix(".weight") if name == HEAD and self.checkpoint.spec.tied else name
        if self.prepared and self.prepared.format(stored) is not None:
            if rows.start == 0:
                self.error.add(self.prepared.error(stored))
            return self.prepared.rows(stored, rows)
        weight: Float = read_tensor(self.checkpoint.tensors[f"{stored}.weight"], rows)
        require_finite(f"{stored}.weight", weight)
        packed = pack(weight, INT4_ZERO)
        self.error.add(RoundingError.between(weight, unpack(packed, INT4_ZERO)))
        return packed

    def _advance(self, count: int) -> None:
        self.done += count
        self.progress("weights", self.done, self.total)


@contextmanager
def _weights(job: QuarkJob, folder: Path, progress: Progress) -> Iterator[_Weights]:
    """The weights, which can be read inside only: a recipe's packed matrices are in a file in `folder`."""
    checkpoint, matrices = job.checkpoint, matrix_shapes(job.checkpoint)
    known = set(matrices)
    rest = (shape for name, shape in shapes(checkpoint.spec) if name.removesuffix(".weight") not in known)
    total = sum(map(prod, [*matrices.values(), *rest]))
    if job.order is None:
        yield _Weights(checkpoint, imported_matrices(checkpoint), None, progress, matrices, dtype_of(checkpoint), total)
        return
    with quantize(checkpoint, job.order, folder, progress) as found:
        dtype = dtype_of(checkpoint)
        yield _Weights(checkpoint, found.prepared, found.quantization, progress, matrices, dtype, total)


def dtype_of(checkpoint: Checkpoint) -> str:
    """The type of scales and of what is in floats: as AMD's guide has it, bfloat16 for a model in bfloat16 and float16
    for all others. Where integers are kept it is the type of their scales, which stay exact."""
    end = "weight_scale"
    for matrix in checkpoint.packed.values():
        if isinstance(matrix, PackedMatrix):
            held = next((part.dtype for name, part in matrix.parts.items() if name in (end, "scales")), None)
            if held in ("F16", "BF16"):
                return held
    return "BF16" if checkpoint.spec.dtype == "bfloat16" else "F16"


def _stored(name: str, values: Float, dtype: str) -> NDArray[Any]:
    """Floats in the type of the file. BadInput for those that it cannot hold."""
    require_finite(name, values)
    found = encoded(np.ascontiguousarray(values), dtype)
    if dtype == "F16" and not np.isfinite(found).all():
        most = float(np.abs(values).max())
        raise BadInput(f"{name} has {most:.3g}, and float16 ends at 65504; take the checkpoint in bfloat16")
    return found


# 3. Configs


def write_configs(job: QuarkJob, weights: _Weights, folder: Path) -> None:
    """Copy the tokenizer and configs; config.json says how the matrices are stored."""
    checkpoint = job.checkpoint
    copy_side_files(checkpoint, folder)
    values = older_rotary_keys(read_json(folder / CONFIG))
    exclude = [] if HEAD in weights.matrices else [HEAD]
    values.pop("dtype", None)
    values["torch_dtype"] = {"F16": "float16", "BF16": "bfloat16"}[weights.dtype]
    values["tie_word_embeddings"] = checkpoint.spec.tied and bool(exclude)
    values.pop("compression_config", None)
    values[KEY] = quantization_config(exclude)
    write_json(folder / CONFIG, values)


def record(done: QuarkExport) -> dict[str, Any]:
    """What the folder was made of, for people; --force knows by it that the folder may be replaced."""
    return {
        "layout": LAYOUT,
        "pard_onnx": version("pard-onnx"),
        "source": asdict(done.source),
        "quantization": asdict(done.quantization) if done.quantization else None,
        "weight_error": done.error,
    }


# 4. Check


def require_readable(spec: ModelSpec, folder: Path) -> None:
    """Failure unless this package reads the folder as the same model. The type of the floats, by which transformers
    rounds the factor of some embeddings, and whether a tied head is stored by itself may differ."""
    found = Checkpoint.open(folder).spec
    found = replace(found, tied=spec.tied, dtype=spec.dtype, embedding_scale=spec.embedding_scale)
    if found != spec:
        wanted = asdict(spec)
        differing = next(key for key, value in asdict(found).items() if wanted[key] != value)
        raise Failure(f"{folder.parent}: the written config.json says another {differing}; please report this")
