"""Which sessions drive an artifact's graphs: a table by attention variant, and whether shapes are fixed."""

from __future__ import annotations

from dataclasses import dataclass

from pard_onnx.models.errors import BadArtifact
from pard_onnx.models.manifest import Manifest

from .fixed_shapes import StaticDraft, StaticTarget
from .portable import PortableDraft, PortableTarget
from .session import DraftSession, TargetSession

Target = TargetSession | StaticTarget
Draft = DraftSession | StaticDraft


@dataclass(frozen=True, slots=True)
class Sessions:
    target: type[Target]
    draft: type[Draft]


SESSIONS = {
    ("gqa", False): Sessions(TargetSession, DraftSession),
    ("portable", False): Sessions(PortableTarget, PortableDraft),
    ("portable", True): Sessions(StaticTarget, StaticDraft),
}


def sessions(manifest: Manifest) -> Sessions:
    """Those of the artifact's graphs; BadArtifact for an attention variant that this version does not know."""
    found = SESSIONS.get((manifest.attention, bool(manifest.graphs)))
    if found is None:
        known = ", ".join(sorted({attention for attention, _ in SESSIONS}))
        raise BadArtifact(f"attention variant {manifest.attention!r} is not known here, only {known}; update pard-onnx")
    return found
