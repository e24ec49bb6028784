"""Whether a provider can run an artifact's kind of graphs at all, by what is known before it is tried."""

from __future__ import annotations

from pard_onnx.models.manifest import Manifest

from .providers import Provider

FUSED = "gqa"


def misfit(manifest: Manifest, provider: Provider) -> str | None:
    """Why it cannot, with the fix; None if it can."""
    fix = f"export it with pard-export --device {provider.key}"
    if manifest.attention not in provider.attention:
        kind = "one fused operator" if manifest.attention == FUSED else f"of the variant {manifest.attention!r}"
        return f"its attention is {kind}, which {provider.key} lacks or computes wrongly; {fix}"
    if provider.static and not manifest.graphs:
        return f"its graph has dynamic shapes, and {provider.key} needs fixed ones; {fix}"
    return None
