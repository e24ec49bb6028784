"""The opened models of a pair: verified artifacts, sessions, and what was found out about them on this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path

from pard_onnx.models import hub
from pard_onnx.models.errors import BadArtifact
from pard_onnx.models.manifest import Manifest
from pard_onnx.models.spec import Role

from . import machine
from .calibration import TargetCalibration, calibrate_draft, calibrate_target, prefill_chunk
from .costs import StepCosts
from .providers import Provider
from .sessions import Draft, Target, sessions
from .text import TOKENIZER, Text, first_difference
from .threads import Threads


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
    if (target.folder / TOKENIZER).read_bytes() == (draft.folder / TOKENIZER).read_bytes():
        return
    difference = first_difference(target.text().vocabulary(), draft.text().vocabulary())
    if difference:
        token_id, ours, theirs = difference
        raise BadArtifact(
            f"{draft.name}: its tokenizer is not that of {target.name}; id {token_id} is {theirs!r} there and "
            f"{ours!r} here; take a draft made for this target"
        )


@dataclass(frozen=True, slots=True)
class OpenTarget:
    session: Target
    calibration: TargetCalibration


@dataclass(frozen=True, slots=True)
class OpenDraft:
    session: Draft
    costs: StepCosts


def open_target(artifact: Artifact, provider: Provider, threads: Threads, *, anew: bool = False) -> OpenTarget:
    """Load the target, and find out what it does here unless that is known; anew: in any case, and more thoroughly."""
    session = sessions(artifact.manifest).target(artifact.folder, artifact.manifest, provider, threads)
    place = machine.place(artifact.manifest, provider, threads)
    known = None if anew else machine.recall(place, TargetCalibration)
    if known is None:
        known = calibrate_target(session)
        known = replace(known, chunk=prefill_chunk(session)) if anew else known
        machine.keep(place, known)
    return OpenTarget(session, known)


def open_draft(artifact: Artifact, provider: Provider, threads: Threads, *, anew: bool = False) -> OpenDraft:
    """As `open_target`."""
    session = sessions(artifact.manifest).draft(artifact.folder, artifact.manifest, provider, threads)
    place = machine.place(artifact.manifest, provider, threads)
    known = None if anew else machine.recall(place, StepCosts)
    if known is None:
        known = calibrate_draft(session)
        machine.keep(place, known)
    return OpenDraft(session, known)
