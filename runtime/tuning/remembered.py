"""What was measured of an artifact on this machine, kept in the user's cache so that it is measured once.

A file is named by the artifact, the machine and everything else that a step's time and rounding depend on; it can
always be made again.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pard_onnx.models.cache_folder import cache_folder
from pard_onnx.models.errors import BadInput
from pard_onnx.models.json_files import read_json, write_json
from pard_onnx.models.manifest import Manifest
from pard_onnx.models.records import from_json, to_json
from pard_onnx.runtime import kernels
from pard_onnx.runtime.providers.table import Provider, onnxruntime
from pard_onnx.runtime.providers.threads import Threads, physical_cores

VERSION = 3  # of the way to measure, and of the kernels
CPUINFO = Path("/proc/cpuinfo")
Record = TypeVar("Record")


def processor() -> str:
    """The processor's own name, as far as the system tells."""
    with suppress(OSError, StopIteration):
        lines = CPUINFO.read_text(errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def record_path(manifest: Manifest, provider: Provider, threads: Threads, subject: str) -> Path:
    """The file of one artifact under one way of running it; subject: what is kept in it."""
    facts = (
        VERSION,
        subject,
        *((file.name, file.sha256) for file in manifest.files),
        provider.key,
        provider.options,
        kernels.isa() if provider.key == "cpu" else None,
        onnxruntime().__version__,
        threads.count or physical_cores(),
        threads.shared,
        processor(),
        os.cpu_count(),
    )
    return cache_folder() / "machine" / f"{hashlib.sha256(repr(facts).encode()).hexdigest()}.json"


def load_or_measure(
    path: Path, kind: type[Record], measure: Callable[[], Record], *, measure_again: bool = False
) -> Record:
    """The record that is kept at `path`, or else what `measure` returns, which is kept from now on."""
    record = None if measure_again else load_record(path, kind)
    if record is None:
        record = measure()
        save_record(path, record)
    return record


def load_record(path: Path, kind: type[Record]) -> Record | None:
    """The record that is kept there; None if there is none, or none that can be read."""
    try:
        return from_json(kind, read_json(path))
    except (BadInput, OSError, RuntimeError, ValueError):
        return None


def save_record(path: Path, record: object) -> None:
    """A cache that cannot be written is no error."""
    with suppress(OSError, RuntimeError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, to_json(record))
