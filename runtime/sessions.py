"""Which sessions drive an artifact's graphs: a table by attention variant."""

from __future__ import annotations

from dataclasses import dataclass

from pard_onnx.models.errors import BadArtifact
from pard_onnx.models.manifest import Manifest

from .session import DraftSession, TargetSession


@dataclass(frozen=True, slots=True)
class Sessions:
    target: type[TargetSession]
    draft: type[DraftSession]


SESSIONS: dict[str, Sessions] = {"gqa": Sessions(TargetSession, DraftSession)}


def sessions(manifest: Manifest) -> Sessions:
    """Those of the artifact's attention variant; BadArtifact for one that this version does not know."""
    found = SESSIONS.get(manifest.attention)
    if found is None:
        known = ", ".join(SESSIONS)
        raise BadArtifact(f"attention variant {manifest.attention!r} is not known here, only {known}; update pard-onnx")
    return found
