"""What works here: providers that start, and artifacts that they run right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import Manifest

from . import kernels
from .model import Artifact, open_model
from .providers import environment
from .providers.choice import incompatibility
from .providers.discovery import provider_source
from .providers.environment import Memory
from .providers.memory import start_provider
from .providers.table import AUTO_ORDER, CPU, PROVIDERS, Provider
from .providers.threads import Threads
from .sessions.device_cache import cache_bytes

State = Literal["ready", "absent", "fails"]
Result = Literal["right", "token by token", "does not fit", "fails"]


@dataclass(frozen=True, slots=True)
class ProviderReport:
    """detail: where it comes from, or why it does not work; install: what brings it."""

    key: str
    state: State
    detail: str
    install: str


@dataclass(frozen=True, slots=True)
class ArtifactReport:
    """One artifact on one provider that is ready. bytes: of weights and KV cache; detail: the self-check's numbers, or
    what went wrong."""

    artifact: str
    provider: str
    result: Result
    bytes: int
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    versions: tuple[tuple[str, str], ...]
    onnxruntime: tuple[tuple[str, str], ...]
    conflict: str | None
    kernel: str | None
    memory: Memory
    devices: tuple[str, ...]
    providers: tuple[ProviderReport, ...]
    artifacts: tuple[ArtifactReport, ...]

    @property
    def usable(self) -> bool:
        """Whether anything can be run: a provider, and of the artifacts, if any were named, one on one of them."""
        ready = any(provider.state == "ready" for provider in self.providers)
        runs = any(found.result in ("right", "token by token") for found in self.artifacts)
        return ready and (runs or not self.artifacts)


def examine(artifacts: Sequence[Artifact]) -> Report:
    found = environment.flavours()
    providers = tuple(provider_report(PROVIDERS[key]) for key in AUTO_ORDER)
    ready = [PROVIDERS[report.key] for report in providers if report.state == "ready"]
    return Report(
        versions=environment.versions(),
        onnxruntime=found,
        conflict=environment.conflict(found),
        kernel=kernels.isa(),
        memory=environment.memory(),
        devices=environment.devices(),
        providers=providers,
        artifacts=tuple(artifact_reports(artifacts, ready)),
    )


def provider_report(provider: Provider) -> ProviderReport:
    try:
        origin = provider_source(provider).origin
    except BadInput as error:
        return ProviderReport(provider.key, "absent", str(error), provider.install)
    try:
        if provider.key != CPU.key:
            start_provider(provider)
    except BadInput as error:
        return ProviderReport(provider.key, "fails", str(error), provider.install)
    return ProviderReport(provider.key, "ready", origin, provider.install)


def artifact_reports(artifacts: Sequence[Artifact], providers: Sequence[Provider]) -> Iterator[ArtifactReport]:
    for artifact in artifacts:
        for provider in providers:
            size = weights(artifact.manifest) + cache_bytes(artifact.manifest, provider)
            result, detail = tried(artifact, provider)
            yield ArtifactReport(artifact.name, provider.key, result, size, detail)


def tried(artifact: Artifact, provider: Provider) -> tuple[Result, str]:
    """The artifact opened on the provider, self-check included."""
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


def weights(manifest: Manifest) -> int:
    return sum(file.size for file in manifest.files if file.name.startswith("model"))
