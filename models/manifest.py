"""What an artifact folder holds: `pard_onnx.json`, the only thing that export and runtime share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .cache_folder import is_stamped, stamp
from .draft_vocabulary import DraftVocabulary
from .errors import BadArtifact
from .json_files import read_json, write_json
from .precision import Precision, Recipe
from .records import from_json, to_json
from .spec import ModelSpec, Role

FILE_NAME = "pard_onnx.json"
GRAPH, DATA = "model.onnx", "model.onnx.data"  # of dynamic shapes; the weights of all graphs
VITISAI_CONFIG = "vitisai_config.json"  # what the NPU's compiler is told
FORMAT_VERSION = 1
SEAL = "sha256"  # the last key: the digest of all others, so that no flipped bit or edited number passes
KvCacheFormat = Literal["float", "int8", "int8-tensor"]  # as activations; one scale a channel; one scale a layer
KV_CACHE_FORMATS: tuple[KvCacheFormat, ...] = ("float", "int8", "int8-tensor")
KV_MARGIN = 64  # rows beyond the capacity: masks, rejected drafts (at most checks.DRAFT_LIMIT) and padding


@dataclass(frozen=True, slots=True)
class File:
    name: str  # within the artifact folder
    size: int  # bytes
    sha256: str  # hexadecimal

    @classmethod
    def of(cls, path: Path) -> File:
        return cls(path.name, path.stat().st_size, _sha256(path))


@dataclass(frozen=True, slots=True)
class Source:
    """model: hub id or folder name, never a local path; revision: the commit, for hub ids; quantization: the method of
    a checkpoint whose integer weights were taken as they are; export: the precision of its export that the weights
    were read from, None: the checkpoint itself."""

    model: str
    revision: str | None = None
    quantization: str | None = None
    export: Precision | None = None


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One stored matrix. error: root mean square of the rounding error over that of the weights."""

    name: str
    format: str
    bytes: int
    error: float
    output_error: float | None = None  # the same of its products with calibration inputs


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """name, sha256: of the file; tokens: of it that were used, masks included."""

    name: str
    sha256: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Matrices of one input in a mixed recipe. loss: share of the layer's output that 4 bits cost, squared."""

    names: tuple[str, ...]
    bits: int
    loss: float
    extra_bytes: int  # of 8 bits over 4
    protected: bool


@dataclass(frozen=True, slots=True)
class Tried:
    """A draft's format, measured. bytes: of all files; draft_length: the best one; step_seconds, accepted: of a draft
    step and tokens a round at that length; tokens_per_second: predicted from them and the target's steps."""

    recipe: str
    bytes: int
    draft_length: int
    step_seconds: float
    accepted: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Throughput:
    """Why a draft has its format: the formats that were tried with a target where it was made. target: name of its
    model; plain: its tokens a second without a draft."""

    target: str
    precision: Precision
    plain: float
    tried: tuple[Tried, ...]


@dataclass(frozen=True, slots=True)
class Quantization:
    """How weights were rounded. recipe, rounding: names of quantize's tables; budget: bytes of all matrices."""

    recipe: str
    rounding: str
    calibration: CalibrationText | None = None
    budget: int | None = None
    choices: tuple[Choice, ...] = ()
    throughput: Throughput | None = None


@dataclass(frozen=True, slots=True)
class Parity:
    """An export against torch. Errors are absolute, of logits; agreement is the share of equal argmax rows.

    exact_widths: the numbers of tokens in a step whose rows were bitwise those of the widest step tried, with ONNX
    Runtime's own kernels where it was exported. What holds on the machine that runs it, the runtime finds out there.
    """

    rows: int
    max_error: float
    mean_error: float
    top1_agreement: float
    rollback_error: float  # multi-token steps after a rollback, against torch
    exact_widths: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StaticGraph:
    """A graph of fixed shapes. logits: whether it gives any; without, it only fills the KV cache."""

    file: str  # within the artifact folder
    width: int  # tokens a step
    logits: bool


@dataclass(frozen=True, slots=True)
class Manifest:
    role: Role
    spec: ModelSpec
    precision: Precision
    recipe: Recipe
    opset: int
    attention: str  # the variant, a key of export's table
    capacity: int  # tokens
    kv_rows: int
    kv_dtype: Literal["float32", "float16", "int8"]
    files: tuple[File, ...]
    source: Source
    tools: tuple[tuple[str, str], ...]  # (distribution, version)
    tensors: tuple[TensorReport, ...] = ()
    quantization: Quantization | None = None  # None: rounded to nearest, as pard-export does
    parity: Parity | None = None
    device: str = "cpu"  # the profile it was exported for, a key of models.devices.DEVICES
    graphs: tuple[StaticGraph, ...] = ()  # by width; none: GRAPH, of dynamic shapes
    kv_cache: KvCacheFormat = "float"
    draft_vocabulary: DraftVocabulary | None = None  # None: a draft proposes any of the tokenizer's ids
    format_version: int = FORMAT_VERSION

    @property
    def bytes(self) -> int:
        """Of all files but this one."""
        return sum(file.size for file in self.files)

    @property
    def token_rows(self) -> int:
        """Rows of the KV buffers that tokens may take; behind them static graphs have room for their padding."""
        return self.kv_rows - max((graph.width for graph in self.graphs), default=0)

    @property
    def columns(self) -> int:
        """Of a row of logits."""
        return self.draft_vocabulary.size if self.draft_vocabulary else self.spec.vocabulary.rows

    @property
    def draft_length(self) -> int | None:
        """Drafts a round that static graphs are made for; None: any."""
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
        if not path.is_file():
            checkpoint = (folder / "config.json").is_file()
            reason = "is a checkpoint, not exported yet" if checkpoint else f"has no {FILE_NAME}"
            raise BadArtifact(f"{folder}: {reason}; run pard-export --model first and name the folder it writes")
        value = read_json(path, BadArtifact)
        # Before the keys: a newer format may have other ones
        version = value.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise BadArtifact(
                f"{path}: has format version {version}, this pard-onnx reads up to {FORMAT_VERSION}; update pard-onnx"
            )
        seal = value.pop(SEAL, None)
        manifest = from_json(cls, value, error=BadArtifact, context=f"{path}: ")
        if seal != _digest(value):
            raise BadArtifact(f"{path}: has been changed since it was written; export or download the folder again")
        return manifest

    def verify(self, folder: Path) -> None:
        """Check that every file is there with its size and hash. Raises BadArtifact, naming the first that is not.

        A file that was hashed before and has not changed since is not hashed again (see stamps).
        """
        for file in self.files:
            path = folder / file.name
            if Path(file.name).name != file.name or "\\" in file.name:
                raise BadArtifact(f"{folder / FILE_NAME}: {file.name!r} is not the name of a file beside it")
            if not path.is_file():
                raise _damaged(path, "is missing")
            if (size := path.stat().st_size) != file.size:
                raise _damaged(path, f"has {size} bytes instead of {file.size}")
            if is_stamped(path, file.sha256):
                continue
            if _sha256(path) != file.sha256:
                raise _damaged(path, "has been changed (its hash differs)")
            stamp(path, file.sha256)


def _digest(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _damaged(path: Path, problem: str) -> BadArtifact:
    return BadArtifact(f"{path}: {problem}, so the folder does not match its {FILE_NAME}; export or download it again")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
