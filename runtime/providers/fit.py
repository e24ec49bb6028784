"""Whether a graph has the inputs and outputs that its manifest says, before buffers are made by the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pard_onnx.models.errors import BadArtifact
from pard_onnx.models.manifest import Manifest

PAST, PRESENT = "past_key_values.", "present."
TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}
CACHE_DIMENSIONS = ("batch", "kv_heads", "kv_rows", "head_dim")


def require_fit(path: Path, session: Any, manifest: Manifest) -> None:
    """BadArtifact, naming the first difference, unless the KV caches and the logits are the manifest's.

    session: the InferenceSession of the graph at `path`. A dimension that the graph leaves open fits any number.
    """
    spec = manifest.spec
    cache = (1, spec.kv_heads, manifest.kv_rows, spec.head_dim)
    parts = [f"{layer}.{part}" for layer in range(spec.layers) for part in ("key", "value")]
    for prefix, values in ((PAST, session.get_inputs()), (PRESENT, session.get_outputs())):
        found = {value.name: value for value in values if value.name.startswith(prefix)}
        if len(found) != len(parts) or any(prefix + part not in found for part in parts):
            raise misfit(path, f"{len(found)} KV caches named {prefix}", f"{spec.layers} layers, which have two each")
        for name, value in found.items():
            if not _fits(value.shape, cache) or value.type != TYPES[manifest.kv_dtype]:
                wanted = ", ".join(f"{n} {size}" for n, size in zip(CACHE_DIMENSIONS, cache, strict=True))
                raise misfit(path, f"{name} of shape {value.shape} and {value.type}", f"{wanted}, {manifest.kv_dtype}")
    for value in session.get_outputs():
        if value.name == "logits" and not _fits(value.shape[-1:], (manifest.columns,)):
            raise misfit(path, f"logits of {value.shape[-1]} columns", f"{manifest.columns}")


def misfit(path: Path, found: str, said: str) -> BadArtifact:
    return BadArtifact(f"{path}: has {found}; pard_onnx.json says {said}; export or download the folder again")


def _fits(shape: list[Any], wanted: tuple[int, ...]) -> bool:
    """Whether the fixed dimensions are these; those that are not fixed have a name, or None."""
    fixed = [size if isinstance(size, int) else None for size in shape]
    return len(fixed) == len(wanted) and all(a in (None, b) for a, b in zip(fixed, wanted, strict=True))
