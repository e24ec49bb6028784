"""The opened models of a pair: verified artifacts, sessions, and what was found out about them on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import TypeVar

from pard_onnx.models import hub
from pard_onnx.models.errors import BadArtifact, BadProvider, Failure
from pard_onnx.models.manifest import Manifest
from pard_onnx.models.spec import Role
from pard_onnx.runtime.providers.choice import misfit
from pard_onnx.runtime.providers.memory import start
from pard_onnx.runtime.providers.opening import first_line
from pard_onnx.runtime.providers.table import CPU, Provider
from pard_onnx.runtime.providers.threads import Threads
from pard_onnx.runtime.sessions.single_step import OneByOneDraft, OneByOneTarget
from pard_onnx.runtime.sessions.table import Draft, Target, sessions
from pard_onnx.runtime.text.tokenizer import TOKENIZER, Text, first_difference
from pard_onnx.runtime.tuning import remembered as machine
from pard_onnx.runtime.tuning.costs import StepCosts
from pard_onnx.runtime.tuning.measurement import TargetCalibration, calibrate_draft, calibrate_target, prefill_chunk
from pard_onnx.runtime.tuning.self_check import (
    Verdict,
    check_draft,
    check_target,
    no_gain,
    remedy,
    require_right,
    slow_warning,
)
from pard_onnx.runtime.tuning.widths import ANY

Kind = TypeVar("Kind", Target, Draft)


@dataclass(frozen=True, slots=True)
class Artifact:
    """A folder that was read and verified."""

    name: str  # as the user gave it
    folder: Path
    manifest: Manifest

    def text(self) -> Text:
        return Text(self.folder, self.manifest.spec.chat_template)


def open_artifact(name: str | PathLike[str], role: Role | None = None) -> Artifact:
    """Resolve, read and verify a folder; BadArtifact if it has another role."""
    folder = hub.resolve_artifact(fspath(name))
    manifest = Manifest.read(folder)
    if role and manifest.role != role:
        raise BadArtifact(f"{fspath(name)}: is a {manifest.role}, not a {role}; give it as {manifest.role}")
    manifest.verify(folder)
    return Artifact(fspath(name), folder, manifest)


def require_same_tokenizer(target: Artifact, draft: Artifact) -> None:
    """BadArtifact names the first id whose tokens differ. Padded vocabularies may have different sizes."""
    require_tokenizer_of(target, draft.name, draft.folder)


def require_tokenizer_of(target: Artifact, name: str, folder: Path) -> None:
    """As `require_same_tokenizer`, of any folder that has a tokenizer; name: how the user calls it."""
    if (target.folder / TOKENIZER).read_bytes() == (folder / TOKENIZER).read_bytes():
        return
    difference = first_difference(target.text().vocabulary(), Text(folder, None).vocabulary())
    if difference:
        token_id, ours, theirs = difference
        raise BadArtifact(
            f"{name}: its tokenizer is not that of {target.name}; id {token_id} is {theirs!r} there and "
            f"{ours!r} here; take a draft made for this target"
        )


@dataclass(frozen=True, slots=True)
class OpenTarget:
    """verdict: of the self-check, None on the CPU; wrong, slow: see `choice.Opened`."""

    session: Target | OneByOneTarget
    calibration: TargetCalibration
    verdict: Verdict | None = None
    wrong: str | None = None
    slow: str | None = None


@dataclass(frozen=True, slots=True)
class OpenDraft:
    """As `OpenTarget`."""

    session: Draft | OneByOneDraft
    costs: StepCosts
    verdict: Verdict | None = None
    wrong: str | None = None
    slow: str | None = None


def open_target(artifact: Artifact, provider: Provider, threads: Threads, *, anew: bool = False) -> OpenTarget:
    """Load the target, and find out what it does here unless that is known; anew: in any case, and more thoroughly.

    BadProvider or BadArtifact where the provider does not start, does not fit the artifact, or computes it wrongly.
    """
    opener = partial(opened, sessions(artifact.manifest).target, artifact, threads)
    session = opener(provider)
    verdict = checked(artifact, provider, threads, lambda: check_target(session, lambda: on_cpu(opener)), anew)
    if verdict and verdict.steps == "single":
        costs = TargetCalibration(ANY, (1,), linear(verdict))
        return OpenTarget(OneByOneTarget(session), costs, verdict, slow_warning(verdict, artifact.name, provider))

    def find() -> TargetCalibration:
        found = calibrate_target(session)
        return replace(found, chunk=prefill_chunk(session)) if anew else found

    place = machine.place(artifact.manifest, provider, threads)
    known = machine.remembered(place, TargetCalibration, find, anew=anew)
    return OpenTarget(session, known, verdict, slow=no_gain(verdict, artifact.name, provider))


def open_draft(artifact: Artifact, provider: Provider, threads: Threads, *, anew: bool = False) -> OpenDraft:
    """As `open_target`."""
    opener = partial(opened, sessions(artifact.manifest).draft, artifact, threads)
    session = opener(provider)
    verdict = checked(artifact, provider, threads, lambda: check_draft(session, lambda: on_cpu(opener)), anew)
    if verdict and verdict.steps == "single":
        warning = slow_warning(verdict, artifact.name, provider)
        return OpenDraft(OneByOneDraft(session), linear(verdict), verdict, warning)
    place = machine.place(artifact.manifest, provider, threads)
    costs = machine.remembered(place, StepCosts, lambda: calibrate_draft(session), anew=anew)
    return OpenDraft(session, costs, verdict, slow=no_gain(verdict, artifact.name, provider))


def opened(kind: type[Kind], artifact: Artifact, threads: Threads, provider: Provider) -> Kind:
    """The artifact's session; BadArtifact if its graphs are none for this provider."""
    if reason := misfit(artifact.manifest, provider):
        raise BadArtifact(f"{artifact.name}: {reason}")
    if provider.key != CPU.key:
        start(provider)  # a provider that does not start is told as that, not as a graph that does not load
    return kind(artifact.folder, artifact.manifest, provider, threads)


def on_cpu(opener: Callable[[Provider], Kind]) -> Kind | None:
    """None for a graph that the CPU cannot run."""
    try:
        return opener(CPU)
    except BadArtifact:
        return None


def checked(
    artifact: Artifact, provider: Provider, threads: Threads, check: Callable[[], Verdict], anew: bool
) -> Verdict | None:
    """The self-check's verdict, kept as calibration is; None on the CPU, whose calibration compares more steps."""
    if provider.key == CPU.key:
        return None
    place = machine.place(artifact.manifest, provider, threads, "self-check")
    try:
        verdict = machine.remembered(place, Verdict, check, anew=anew)
    except Failure as error:  # what it lacks may be found out in a step only, such as half precision on WebGPU
        problem = f"provider {provider.title!r} cannot run {artifact.name}: {first_line(error)}"
        raise BadProvider(f"{problem}; {remedy(provider)}") from error
    require_right(verdict, artifact.name, provider)
    return verdict


def linear(verdict: Verdict) -> StepCosts:
    """A token's time for each token."""
    return StepCosts(((1, verdict.seconds), (2, 2 * verdict.seconds)))
