"""What pard-doctor reports: what is installed, which providers start, and which artifacts they run correctly."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any, Literal

from pard_onnx.models.cache_folder import private_folder
from pard_onnx.models.errors import BadInput, BadProvider

from . import kernels
from .model import Artifact, open_model
from .providers.choice import incompatibility
from .providers.discovery import WINDOWS_ML, as_installed, plugin_version, provider_source
from .providers.memory import start_provider
from .providers.table import AUTO_ORDER, CPU, PLUGIN_ADVICE, PROVIDERS, Provider, onnxruntime
from .providers.threads import Threads
from .sessions.device_cache import cache_bytes
from .speed import Placed, slow_reasons

State = Literal["ready", "absent", "fails"]
Outcome = Literal["right", "token by token", "does not fit", "fails"]

PACKAGES = ("pard-onnx", "numpy", "tokenizers")
ABSENT = "not installed"  # in place of a version
MODULE = "onnxruntime"
MEMINFO = Path("/proc/meminfo")
GRAPHICS = Path("/sys/class/drm")  # where the amdgpu driver says how much memory a card has


@dataclass(frozen=True, slots=True)
class HostMemory:
    """The host's memory in bytes; None where the system does not say."""

    total: int | None
    available: int | None


@dataclass(frozen=True, slots=True)
class ProviderReport:
    """What was found of one provider."""

    key: str
    state: State
    detail: str  # where the provider comes from, or why it does not work
    install: str  # how to install it


@dataclass(frozen=True, slots=True)
class ArtifactReport:
    """What was found of one artifact on one provider that is ready."""

    artifact: str
    provider: str
    result: Outcome
    bytes: int  # of the weights and the KV cache
    detail: str  # the differences and times of the self-check, or what went wrong


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """Everything that pard-doctor shows; the fields are the keys of its JSON output."""

    versions: tuple[tuple[str, str], ...]  # (name, version)
    onnxruntime: tuple[tuple[str, str], ...]  # (distribution, version) of the installed onnxruntime
    conflict: str | None  # what is wrong with `onnxruntime`, and the fix
    kernel: str | None  # the instruction set of this package's CPU kernels; None where they are not used
    slow: tuple[str, ...]  # why models run slower here than they could, each with the fix
    memory: HostMemory
    devices: tuple[str, ...]  # one description each
    providers: tuple[ProviderReport, ...]
    artifacts: tuple[ArtifactReport, ...]

    @property
    def usable(self) -> bool:
        """Whether a provider is ready and, if artifacts were named, runs at least one of them."""
        ready = any(provider.state == "ready" for provider in self.providers)
        runs = any(artifact.result in ("right", "token by token") for artifact in self.artifacts)
        return ready and (runs or not self.artifacts)


def examine(artifacts: Sequence[Artifact]) -> DoctorReport:
    """Start every provider, and run the self-check of the artifacts on those that start."""
    private_folder("machine")  # warns where measurements of this machine cannot be kept
    distributions = onnxruntime_distributions()
    providers = tuple(provider_report(PROVIDERS[key]) for key in AUTO_ORDER)
    ready = [as_installed(PROVIDERS[report.key]) for report in providers if report.state == "ready"]
    return DoctorReport(
        slow=tuple(slow_here(artifacts, ready)),
        versions=versions(),
        onnxruntime=distributions,
        conflict=conflict(distributions),
        kernel=kernels.isa(),
        memory=host_memory(),
        devices=devices(),
        providers=providers,
        artifacts=tuple(artifact_reports(artifacts, ready)),
    )


def slow_here(artifacts: Sequence[Artifact], ready: Sequence[Provider]) -> list[str]:
    """Why models run slower than they could: kernels that are missing, and artifacts for other devices where the CPU is
    all there is."""
    problem = kernels.problem()
    on_cpu = [Placed(one.name, one.manifest, CPU) for one in artifacts] if ready == [CPU] else []
    return [problem] if problem and not on_cpu else slow_reasons(on_cpu)


def provider_report(provider: Provider) -> ProviderReport:
    """Find and start one provider."""
    try:
        source = provider_source(provider)
        origin = f"{source.origin} {plugin_version(provider)}" if source.devices else source.origin
    except BadInput as error:
        advice = PLUGIN_ADVICE.get(provider.key, provider.install)  # beside the onnxruntime that is installed
        return ProviderReport(provider.key, "absent", str(error), advice)
    try:
        if provider.key != CPU.key:
            start_provider(provider)
    except BadInput as error:
        return ProviderReport(provider.key, "fails", str(error), provider.install)
    return ProviderReport(provider.key, "ready", origin, provider.install)


def artifact_reports(artifacts: Sequence[Artifact], providers: Sequence[Provider]) -> Iterator[ArtifactReport]:
    """Every artifact on every one of these providers."""
    for artifact in artifacts:
        for provider in providers:
            size = artifact.manifest.weight_bytes + cache_bytes(artifact.manifest, provider)
            result, detail = try_artifact(artifact, provider)
            yield ArtifactReport(artifact.name, provider.key, result, size, detail)


def try_artifact(artifact: Artifact, provider: Provider) -> tuple[Outcome, str]:
    """Open the artifact on the provider, which runs the self-check; the outcome and its details."""
    if reason := incompatibility(artifact.manifest, provider):
        return "does not fit", reason
    try:
        model = open_model(artifact, provider, Threads())
    except BadInput as error:
        return "fails", str(error)
    if model.warning:
        return "token by token", model.warning
    if model.verdict is None:
        return "right", "the CPU is what others are compared with"
    passed = "; --provider auto passes it over" if model.slow else ""
    return "right", f"{model.verdict.describe()}; {model.verdict.pace()}{passed}"


def versions() -> tuple[tuple[str, str], ...]:
    """(name, version) of Python, of PACKAGES, and of the installed packages that bring providers."""
    plugins = (provider.plugin.replace("_", "-") for provider in PROVIDERS.values() if provider.plugin)
    found = ((name, installed_version(name)) for name in (*plugins, WINDOWS_ML))
    return (
        ("Python", platform.python_version()),
        *((name, installed_version(name)) for name in PACKAGES),
        *((name, number) for name, number in found if number != ABSENT),
    )


def installed_version(distribution: str) -> str:
    """The version of a distribution, or ABSENT."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ABSENT


def onnxruntime_distributions() -> tuple[tuple[str, str], ...]:
    """(name, version) of every installed distribution that has the module onnxruntime; there should be exactly one."""
    names = sorted(set(packages_distributions().get(MODULE, ())))
    return tuple((name, installed_version(name)) for name in names)


def conflict(distributions: tuple[tuple[str, str], ...]) -> str | None:
    """What is wrong with these distributions of onnxruntime, with the fix; None if there is exactly one."""
    if len(distributions) == 1:
        return None
    if not distributions:
        return f"onnxruntime is not installed; each device has its extra; run: {CPU.install}"
    names = [name for name, _ in distributions]
    return (
        f"{' and '.join(names)} are installed together and overwrite one another's files: which one runs is chance; "
        f"uninstall them, then install the one that you want; run: pip uninstall -y {' '.join(names)}"
    )


def devices() -> tuple[str, ...]:
    """Descriptions of the devices that ONNX Runtime lists, then of graphics memory."""
    try:
        ort = onnxruntime()
    except BadProvider:
        return ()
    listed = ort.get_ep_devices() if hasattr(ort, "get_ep_devices") else ()
    return tuple(dict.fromkeys(describe_device(entry) for entry in listed)) + graphics_memory()


def describe_device(entry: Any) -> str:
    """A description of an OrtEpDevice."""
    kind = str(entry.device.type).rpartition(".")[2]
    name = entry.device.metadata.get("Description") or entry.device.vendor or "unnamed"
    return f"{kind}: {name} ({entry.ep_name})"


def graphics_memory() -> tuple[str, ...]:
    """The memory of the graphics cards whose driver says it."""
    out = []
    for file in sorted(GRAPHICS.glob("card*/device/mem_info_vram_total")):
        try:
            out.append(f"GPU: {file.parts[-3]}, {int(file.read_text('utf-8')) / 2**30:.1f} GiB of its own")
        except (OSError, ValueError):
            continue
    return tuple(out)


def host_memory() -> HostMemory:
    """The host's memory, on Linux, macOS and Windows."""
    if sys.platform == "win32":
        return windows_memory()
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return HostMemory(None, None)
    try:
        lines = MEMINFO.read_text("utf-8").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        return HostMemory(total, available)
    except (OSError, StopIteration, ValueError):
        return HostMemory(total, None)


def memory_limit() -> int | None:
    """The most memory that this process may have: the host's, or less in a container or service with a limit; None
    where the system does not say."""
    found = [host_memory().total, *cgroup_limits()]
    return min((one for one in found if one is not None), default=None)


def cgroup_limits(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """The limits of this process's control groups, version 1 or 2, and of those around them."""
    try:
        lines = groups.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root, file = (mounted, "memory.max") if not kinds else (mounted / kinds, "memory.limit_in_bytes")
        inner = root / path.strip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(root):
                with suppress(OSError, ValueError):  # "max", or a group that is not visible in a container
                    yield int((folder / file).read_text("utf-8"))


def windows_memory() -> HostMemory:
    """The host's memory by GlobalMemoryStatusEx, whose structure has two 32-bit numbers and seven 64-bit ones."""
    status = (ctypes.c_uint64 * 8)()
    ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] = ctypes.sizeof(status)
    done = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined,unused-ignore]
    return HostMemory(int(status[1]), int(status[2])) if done else HostMemory(None, None)
