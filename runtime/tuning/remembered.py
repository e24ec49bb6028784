"""Measurements of an artifact on this machine, kept in the user's cache folder so that they are made only once.

The name of a file is a hash of the artifact, the machine and everything else that the time and the rounding of a step
depend on. A file that is lost is measured again.
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

VERSION = 3  # raised where the measurement or the kernels change, so that older files are not used
CPUINFO = Path("/proc/cpuinfo")
Record = TypeVar("Record")


def processor() -> str:
    """The processor's name; its architecture where the system does not say the name."""
    with suppress(OSError, StopIteration):
        lines = CPUINFO.read_text(errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def record_path(manifest: Manifest, provider: Provider, threads: Threads, subject: str) -> Path:
    """The file for one artifact on one provider with these threads; subject: which measurement it holds."""
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
    """The record in the file at `path`; if there is none, what `measure` returns, which is then written there."""
    record = None if measure_again else load_record(path, kind)
    if record is None:
        record = measure()
        save_record(path, record)
    return record


def load_record(path: Path, kind: type[Record]) -> Record | None:
    """The record in the file; None if there is no file, or it cannot be read."""
    try:
        return from_json(kind, read_json(path))
    except (BadInput, OSError, RuntimeError, ValueError):
        return None


def save_record(path: Path, record: object) -> None:
    """Write the record to the file. A cache folder that cannot be written is no error."""
    with suppress(OSError, RuntimeError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, to_json(record))
