"""`Manifest`: what an artifact folder holds, in `pard_onnx.json`. The folder is all that export and runtime share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from .cache_folder import is_stamped, stamp
from .checks import Progress, no_progress
from .errors import BadArtifact, shown
from .folder_files import file_facts, has_file, is_plain_name, open_file
from .json_files import read_json, write_json
from .logs import logger
from .manifest_faults import faults
from .precision import Precision, Recipe
from .records import from_json, to_json
from .spec import ModelSpec, Role

if TYPE_CHECKING:  # numpy takes a tenth of a second to import, and `--help` needs none of it
    import numpy as np
    from numpy.typing import NDArray

LOG = logger(__name__)
FILE_NAME = "pard_onnx.json"
RECORD = "pard_library.json"  # beside it in the user's library, see models.library
GRAPH = "model.onnx"  # the graph of dynamic shapes
DATA = "model.onnx.data"  # the weights of all graphs
VITISAI_CONFIG = "vitisai_config.json"  # settings of the NPU's compiler
DRAFT_IDS = "draft_vocabulary.json"  # the ids that a draft of a reduced vocabulary can propose
FORMAT_VERSION = 1
HASHED_TOGETHER = 1 << 20  # bytes
MOST_BYTES = 1 << 24  # of pard_onnx.json; large models' have some 100 KB
Ids: TypeAlias = "NDArray[np.int64]"
SEAL = "sha256"  # the last key: the digest of all others, so that a flipped bit or an edited number is found
# Floats of the type of activations; int8 with one scale a channel, or with one a layer
KvCacheFormat = Literal["float", "int8", "int8-tensor"]
KV_CACHE_FORMATS: tuple[KvCacheFormat, ...] = ("float", "int8", "int8-tensor")
KV_MARGIN = 64  # rows beyond the capacity: masks, rejected drafts (at most checks.DRAFT_LIMIT) and padding


@dataclass(frozen=True, slots=True)
class File:
    """A file of an artifact folder."""

    name: str  # within the artifact folder
    size: int  # bytes
    sha256: str  # hexadecimal

    @classmethod
    def of(cls, path: Path) -> File:
        """The file at `path` as it is now."""
        return cls(path.name, path.stat().st_size, _sha256(path))


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """The LoRA adapter that was merged into the model."""

    name: str  # hub id or folder name, never a local path
    sha256: str  # of its configuration and weights
    revision: str | None = None  # the commit, for hub ids


@dataclass(frozen=True, slots=True)
class Source:
    """The model that an export was made from."""

    model: str  # hub id or folder name, never a local path
    revision: str | None = None  # the commit, for hub ids
    quantization: str | None = None  # the method of a quantized checkpoint, whose integers were kept
    export: Precision | None = None  # the precision of the float export that was read; None: the checkpoint itself
    adapter: AdapterSource | None = None


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One stored matrix. Errors are root mean squares, relative to the root mean square of the exact values."""

    name: str
    format: str  # the name of its Format
    bytes: int
    error: float  # of the weights
    output_error: float | None = None  # of the products with calibration inputs; None: not measured


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """The text that a recipe read."""

    name: str  # of the file
    sha256: str  # of the file
    tokens: int  # that were used, masks included


@dataclass(frozen=True, slots=True)
class MixedChoice:
    """The number of bits that a mixed recipe gives to the matrices of one input."""

    names: tuple[str, ...]
    bits: int  # 4 or 8
    loss: float  # squared error of the layer's output with 4 bits, as a share of the squared output
    extra_bytes: int  # that 8 bits take beyond 4
    protected: bool  # 8 bits whatever the loss is


@dataclass(frozen=True, slots=True)
class MeasuredFormat:
    """One format of a draft, measured with a target."""

    recipe: str
    bytes: int  # of all files
    draft_length: int  # the fastest one
    step_seconds: float  # of a draft step, at that draft length
    accepted: float  # tokens a round, at that draft length
    tokens_per_second: float  # predicted from these and the target's step costs


@dataclass(frozen=True, slots=True)
class Throughput:
    """The measurements by which a draft's format was chosen, on the machine that exported it."""

    target: str  # the name of the target's model
    precision: Precision  # of the target
    plain: float  # the target's tokens a second without a draft
    tried: tuple[MeasuredFormat, ...]


@dataclass(frozen=True, slots=True)
class Quantization:
    """How weights were rounded."""

    recipe: str  # a key of quantize's recipes
    rounding: str  # a key of quantize's algorithms
    calibration: CalibrationText | None = None  # None: the recipe reads no text
    budget: int | None = None  # bytes of all matrices, of a mixed recipe
    choices: tuple[MixedChoice, ...] = ()  # of a mixed recipe
    throughput: Throughput | None = None  # where the format was chosen by measurement


@dataclass(frozen=True, slots=True)
class Parity:
    """How the logits of an export differ from torch's. Errors are absolute."""

    rows: int  # of logits that were compared
    max_error: float
    mean_error: float
    top1_agreement: float  # the share of rows whose largest logit has the same id
    rollback_error: float  # the largest error in steps after a rollback
    # Widths (tokens a step) whose rows were bitwise those of the widest step tried, with ONNX Runtime's own kernels on
    # the exporting machine; the runtime finds out anew which widths are exact on its machine
    exact_widths: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TextQuality:
    """How well an export predicts a text that ships with this package, against its checkpoint in torch's floats."""

    rows: int  # predictions
    reference_perplexity: float  # of the checkpoint
    perplexity: float  # of the exported graphs
    top1_agreement: float  # the share of rows in which both predict the same token

    @property
    def loss(self) -> float:
        """The change of the perplexity, as a share: 0.03 is 3 % more."""
        return self.perplexity / self.reference_perplexity - 1


@dataclass(frozen=True, slots=True)
class StaticGraph:
    """A graph of fixed shapes."""

    file: str  # within the artifact folder
    width: int  # tokens a step
    logits: bool  # whether it gives logits; without them it only fills the KV cache


@dataclass(frozen=True, slots=True)
class DraftVocabulary:
    """The ids that a draft can propose, where its LM head has only some of the tokenizer's."""

    size: int  # ids
    text: str  # the name of the file whose most frequent tokens they are
    sha256: str  # of that file
    coverage: float  # the share of that text's tokens that have one of these ids


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact folder holds, and how it was made."""

    role: Role
    spec: ModelSpec
    precision: Precision
    recipe: Recipe
    opset: int
    attention: str  # the variant, a key of export's table
    capacity: int  # tokens that a conversation may hold
    kv_rows: int  # rows of the KV buffers
    kv_dtype: Literal["float32", "float16", "int8"]
    files: tuple[File, ...]
    source: Source
    tools: tuple[tuple[str, str], ...]  # (distribution, version)
    tensors: tuple[TensorReport, ...] = ()
    quantization: Quantization | None = None  # None: rounded to nearest, as pard-export does
    parity: Parity | None = None
    quality: TextQuality | None = None  # None: it was not measured
    device: str = "cpu"  # the device that it was exported for, a key of models.devices.DEVICES
    graphs: tuple[StaticGraph, ...] = ()  # narrowest first; empty: one graph of dynamic shapes, GRAPH
    kv_cache: KvCacheFormat = "float"
    draft_vocabulary: DraftVocabulary | None = None  # None: a draft proposes any of the tokenizer's ids
    feature_layers: tuple[int, ...] = ()  # of the output hidden_states of a target; see TargetFeatures.layers
    format_version: int = FORMAT_VERSION

    @property
    def bytes(self) -> int:
        """The size of all files, without the manifest."""
        return sum(file.size for file in self.files)

    @property
    def weight_bytes(self) -> int:
        """The size of the graphs and their weights."""
        return sum(file.size for file in self.files if file.name.startswith("model"))

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of all files by name, without the manifest. What is not here is not read."""
        return {file.name: file.size for file in self.files}

    @property
    def graph_files(self) -> tuple[str, ...]:
        """The names of the graphs' files."""
        return tuple(graph.file for graph in self.graphs) or (GRAPH,)

    @property
    def token_rows(self) -> int:
        """Rows of the KV buffers that tokens may take; behind them static graphs have room for their padding."""
        return self.kv_rows - max((graph.width for graph in self.graphs), default=0)

    @property
    def columns(self) -> int:
        """Columns of a row of logits."""
        return self.draft_vocabulary.size if self.draft_vocabulary else self.spec.vocabulary.rows

    @property
    def draft_length(self) -> int | None:
        """Drafts a round that static graphs have room for; None: the graph takes any number."""
        widest = max((graph.width for graph in self.graphs if graph.logits), default=None)
        return widest if widest is None else widest // 2 if self.role == "draft" else widest - 1

    def write(self, folder: Path) -> None:
        """Write pard_onnx.json into `folder`, whole or not at all."""
        value = to_json(self)
        write_json(folder / FILE_NAME, value | {SEAL: _digest(value)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of an artifact folder; the other files are not looked at. Raises BadArtifact."""
        path = folder / FILE_NAME
        if not folder.is_dir():
            raise BadArtifact(f"{folder}: no such folder; name one that pard-export has written")
        if not has_file(path, BadArtifact):
            checkpoint = (folder / "config.json").is_file()
            reason = "is a checkpoint, not exported yet" if checkpoint else f"has no {FILE_NAME}"
            raise BadArtifact(f"{folder}: {reason}; run pard-export --model first and name the folder it writes")
        value = read_json(path, BadArtifact, most=MOST_BYTES, unique=True)
        # Checked before the keys, since a newer format may have other ones
        version = value.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise BadArtifact(
                f"{path}: has format version {shown(version)}, this pard-onnx reads up to {FORMAT_VERSION}; "
                "update pard-onnx"
            )
        seal = value.pop(SEAL, None)
        manifest = from_json(cls, value, error=BadArtifact, context=f"{path}: ")
        if seal != _digest(value):
            raise BadArtifact(f"{path}: has been changed since it was written; export or download the folder again")
        if problem := next(faults(manifest), None):
            raise BadArtifact(f"{path}: {problem}; export or download the folder again")
        return manifest

    def verify(self, folder: Path, progress: Progress = no_progress) -> None:
        """Check that every file is there with its size and hash. Raises BadArtifact, naming the first that is not.

        A file that was hashed before and has not changed since is not hashed again (see cache_folder).
        progress: of the stage "verify", in bytes.
        """
        done, total, hashed = 0, self.bytes, 0

        def count(size: int) -> None:
            nonlocal done
            done += size
            progress("verify", done, total)

        count(0)
        for file in self.files:
            path = folder / file.name
            if not is_plain_name(file.name):
                raise BadArtifact(f"{folder / FILE_NAME}: {file.name!r} is not the name of a file beside it")
            if not has_file(path, BadArtifact):
                raise _damaged(path, "is missing")
            if (size := file_facts(path, BadArtifact).st_size) != file.size:
                raise _damaged(path, f"has {size} bytes instead of {file.size}")
            if is_stamped(path, file.sha256):
                count(file.size)
                continue
            if _sha256(path, count) != file.sha256:
                raise _damaged(path, "has been changed (its hash differs)")
            hashed += 1
            stamp(path, file.sha256)
        LOG.debug("%d files verified, %d of them by their hashes", len(self.files), hashed)


def write_draft_ids(folder: Path, ids: Ids) -> None:
    """Write the ids of a reduced draft vocabulary. ids: rising, [N]; the id of each column of the draft's logits."""
    write_json(folder / DRAFT_IDS, {"ids": ids.tolist()})


def read_draft_ids(folder: Path) -> Ids:
    """The ids that `write_draft_ids` wrote; `Manifest.verify` checks the file's hash. Raises BadArtifact."""
    import numpy as np

    value = read_json(folder / DRAFT_IDS, BadArtifact)
    return np.array(value["ids"], np.int64)


def _digest(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _damaged(path: Path, problem: str) -> BadArtifact:
    return BadArtifact(f"{path}: {problem}, so the folder does not match its {FILE_NAME}; export or download it again")


def _sha256(path: Path, count: Callable[[int], None] = lambda _: None) -> str:
    """The file's hash. count: is called with the size of each part that was read."""
    digest = hashlib.sha256()
    with open_file(path, BadArtifact) as stream:
        while part := stream.read(HASHED_TOGETHER):
            digest.update(part)
            count(len(part))
    return digest.hexdigest()
