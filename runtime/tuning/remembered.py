"""Measurements of an artifact on this machine, kept in the user's cache folder so that they are made only once.

The name of a file is a hash of the artifact, the machine and everything else that the time and the rounding of a step
depend on. The file has the record and a digest of both, so that a file that was changed, cut or copied from elsewhere
is not believed. What is not as this module writes it is measured again, without a word.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

from pard_onnx.models.cache_folder import private_folder, read_private, write_private
from pard_onnx.models.errors import BadInput
from pard_onnx.models.logs import logger
from pard_onnx.models.manifest import Manifest
from pard_onnx.models.records import from_json, to_json
from pard_onnx.runtime import kernels
from pard_onnx.runtime.providers.discovery import plugin_version
from pard_onnx.runtime.providers.table import Provider, onnxruntime
from pard_onnx.runtime.providers.threads import Threads, physical_cores

LOG = logger(__name__)
VERSION = 5  # raised where the measurement or the kernels change, so that older files are not used
MOST_BYTES = 1 << 20  # of a file; records have a few hundred
CPUINFO = Path("/proc/cpuinfo")
DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))
Record = TypeVar("Record")


def processor() -> str:
    """The processor's name and features; its architecture where the system does not say them."""
    with suppress(OSError):
        lines = CPUINFO.read_text("utf-8", "replace").splitlines()
        found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if words := [found[name] for name in ("model name", "flags", "Features") if name in found]:
            return "\n".join(words)
    return platform.processor() or platform.machine()


def drivers() -> tuple[str, ...]:
    """What the system says of the drivers of its devices: another driver may compute other rows, and in other times."""
    found = [platform.release(), platform.version()]
    for path in DRIVERS:
        with suppress(OSError):
            found.append(path.read_text("utf-8", "replace"))
    return tuple(found)


def record_path(manifest: Manifest, provider: Provider, threads: Threads, subject: str) -> Path | None:
    """The file for one artifact on one provider with these threads; None where nothing can be kept.

    subject: which measurement it holds.
    """
    folder = private_folder("machine")
    facts = (
        VERSION,
        version("pard-onnx"),
        subject,
        *((file.name, file.sha256) for file in manifest.files),
        provider.key,
        provider.options,
        kernels.isa() if provider.key == "cpu" else (plugin_version(provider), *drivers()),
        onnxruntime().__version__,
        threads.count or physical_cores(),
        threads.shared,
        processor(),
        platform.system(),
        platform.machine(),
        os.cpu_count(),
    )
    return folder and folder / f"{hashlib.sha256(repr(facts).encode()).hexdigest()}.json"


def load_or_measure(
    path: Path | None,
    kind: type[Record],
    measure: Callable[[], Record],
    *,
    measure_again: bool = False,
    fits: Callable[[Record], bool] = lambda _: True,
) -> Record:
    """The record in the file at `path`; if none is there that fits, what `measure` returns, which is kept there."""
    record = load_record(path, kind) if path and not measure_again else None
    subject = kind.__name__.lower()
    if record is None or not fits(record):
        start = perf_counter()
        record = measure()
        LOG.info("%s measured in %.2f s; %s", subject, perf_counter() - start, "kept" if path else "not kept: no cache")
        if path:
            save_record(path, record)
    else:
        LOG.debug("%s as measured before", subject)
    return record


def load_record(path: Path, kind: type[Record]) -> Record | None:
    """The record in the file; None if there is no file, or it is not as `save_record` has written it."""
    try:
        content = json.loads(read_private(path, MOST_BYTES))
        if not isinstance(content, dict) or content.keys() != {"digest", "record"}:
            return None
        if content["digest"] != digest(path, content["record"]):
            return None
        return from_json(kind, content["record"])
    except (BadInput, OSError, RuntimeError, ValueError, OverflowError):  # RecursionError is a RuntimeError
        return None


def save_record(path: Path, record: object) -> None:
    """Write the record to the file. A cache folder that cannot be written is no error."""
    value = to_json(record)
    with suppress(OSError, RuntimeError):
        write_private(path, json.dumps({"digest": digest(path, value), "record": value}, indent=1).encode())


def digest(path: Path, value: Any) -> str:
    """The hash of the record's JSON, together with what the file's name says of artifact and machine."""
    return hashlib.sha256(f"{path.stem}\n{json.dumps(value, sort_keys=True)}".encode()).hexdigest()
