"""What an artifact folder holds: `pard_onnx.json`, the only thing that export and runtime share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .precision import Precision, Recipe
from .spec import ModelSpec, Role

FILE_NAME = "pard_onnx.json"
FORMAT_VERSION = 1
KV_MARGIN = 64  # rows beyond the capacity, for masks, rejected drafts and padding


@dataclass(frozen=True, slots=True)
class File:
    name: str
    size: int  # bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class Source:
    """model: hub id or folder name, never a local path; revision: the commit, for hub ids."""

    model: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One stored matrix. error: root mean square of the rounding error over that of the weights."""

    name: str
    format: str
    bytes: int
    error: float


@dataclass(frozen=True, slots=True)
class Parity:
    """An export against torch. Errors are absolute, of logits; agreement is the share of equal argmax rows."""

    rows: int
    max_error: float
    mean_error: float
    top1_agreement: float
    rollback_error: float  # multi-token steps after a rollback, against torch


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
    kv_dtype: Literal["float32", "float16"]
    files: tuple[File, ...]
    source: Source
    tools: tuple[tuple[str, str], ...]  # (distribution, version)
    tensors: tuple[TensorReport, ...] = ()
    parity: Parity | None = None
    format_version: int = FORMAT_VERSION
