"""What this installation consists of: versions, flavours of onnxruntime, devices, memory."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

from pard_onnx.models.errors import BadProvider

from .table import onnxruntime

PACKAGES = ("pard-onnx", "numpy", "tokenizers")
MODULE = "onnxruntime"
MEMINFO = Path("/proc/meminfo")
GRAPHICS = Path("/sys/class/drm")  # amdgpu's driver tells its memory there


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the host; None where the system does not tell."""

    total: int | None
    available: int | None


def versions() -> tuple[tuple[str, str], ...]:
    """(name, version), Python first."""
    return (("Python", platform.python_version()), *((name, installed_version(name)) for name in PACKAGES))


def installed_version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def flavours() -> tuple[tuple[str, str], ...]:
    """(distribution, version) of all that bring the module onnxruntime; there should be exactly one."""
    names = sorted(set(packages_distributions().get(MODULE, ())))
    return tuple((name, installed_version(name)) for name in names)


def conflict(found: tuple[tuple[str, str], ...]) -> str | None:
    """What is wrong with these flavours, and how to put it right; None if nothing is."""
    if len(found) == 1:
        return None
    if not found:
        return 'onnxruntime is not installed; pip install "pard-onnx[cpu]", or another extra for your device'
    names = [name for name, _ in found]
    return (
        f"{' and '.join(names)} are installed together and overwrite one another's files: which one runs is chance; "
        f"pip uninstall -y {' '.join(names)}, then install the one you want"
    )


def devices() -> tuple[str, ...]:
    """What ONNX Runtime knows of, a line each."""
    try:
        ort = onnxruntime()
    except BadProvider:
        return ()
    found = ort.get_ep_devices() if hasattr(ort, "get_ep_devices") else ()
    return tuple(dict.fromkeys(describe(entry) for entry in found)) + graphics()


def describe(entry: Any) -> str:
    """An OrtEpDevice in words."""
    kind = str(entry.device.type).rpartition(".")[2]
    name = entry.device.metadata.get("Description") or entry.device.vendor or "unnamed"
    return f"{kind}: {name} ({entry.ep_name})"


def graphics() -> tuple[str, ...]:
    """Graphics memory, of cards whose driver tells it."""
    out = []
    for file in sorted(GRAPHICS.glob("card*/device/mem_info_vram_total")):
        try:
            out.append(f"GPU: {file.parts[-3]}, {int(file.read_text()) / 2**30:.1f} GiB of its own")
        except (OSError, ValueError):
            continue
    return tuple(out)


def memory() -> Memory:
    if sys.platform == "win32":
        return windows_memory()
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return Memory(None, None)
    try:
        lines = MEMINFO.read_text().splitlines()
        return Memory(total, next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    except (OSError, StopIteration, ValueError):
        return Memory(total, None)


def windows_memory() -> Memory:
    """By GlobalMemoryStatusEx, whose structure is two 32-bit numbers and seven 64-bit ones."""
    status = (ctypes.c_uint64 * 8)()
    ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] = ctypes.sizeof(status)
    told = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined,unused-ignore]
    return Memory(int(status[1]), int(status[2])) if told else Memory(None, None)
