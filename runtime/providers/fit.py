"""Whether a graph has the inputs and outputs that its manifest says, before buffers are made by the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pard_onnx.models.errors import BadArtifact, shown
from pard_onnx.models.manifest import Manifest
from pard_onnx.models.spec import Role

PAST, PRESENT = "past_key_values.", "present."
TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}
INT64, FLOAT = "tensor(int64)", "tensor(float)"
FEATURES_INPUT, FEATURES_OUTPUT = "target_features", "hidden_states"  # overridable, of drafts; of targets
FEATURES_KEPT = "hidden_states_to_keep"  # overridable: the rows of that output in a graph of dynamic shapes
OUTPUTS: dict[Role, dict[str, str]] = {
    "target": {"logits": FLOAT},
    "draft": {"draft_ids": INT64, "draft_probabilities": FLOAT},
}
CACHE_DIMENSIONS = ("batch", "kv_heads", "kv_rows", "head_dim")


def require_fit(path: Path, session: Any, manifest: Manifest) -> None:
    """BadArtifact, naming the first difference, unless the inputs and outputs are those of the manifest's graphs.

    session: the InferenceSession of the graph at `path`. A dimension that the graph leaves open fits any number.
    """
    spec = manifest.spec
    cache = (1, spec.kv_heads, manifest.kv_rows, spec.head_dim)
    sizes = ", ".join(f"{name} {size}" for name, size in zip(CACHE_DIMENSIONS, cache, strict=True))
    parts = [f"{layer}.{part}" for layer in range(spec.layers) for part in ("key", "value")]
    for prefix, values in ((PAST, session.get_inputs()), (PRESENT, session.get_outputs())):
        found = {value.name: value for value in values if value.name.startswith(prefix)}
        if len(found) != len(parts) or any(prefix + part not in found for part in parts):
            raise _misfit(path, f"{len(found)} KV caches named {prefix}", f"{spec.layers} layers, which have two each")
        for name, value in found.items():
            if not _fits(value.shape, cache) or value.type != TYPES[manifest.kv_dtype]:
                raise _misfit(path, f"{name} of shape {value.shape} and {value.type}", f"{sizes}, {manifest.kv_dtype}")
    _require_inputs(path, session, manifest)
    _require_outputs(path, session, manifest)
    _require_features(path, session, manifest)


def _require_inputs(path: Path, session: Any, manifest: Manifest) -> None:
    given = {value.name: value.type for value in (*session.get_inputs(), *session.get_overridable_initializers())}
    wanted = ["input_ids", "attention_mask", *_own_inputs(manifest)]
    for name in wanted:
        if given.get(name) != INT64:
            raise _misfit(path, f"no input {name} of {INT64}", f"a {manifest.role} of {manifest.attention}")
    for value in session.get_inputs():
        if value.name not in wanted and not value.name.startswith(PAST):
            raise _misfit(path, f"the input {shown(value.name)}", f"it has {', '.join(wanted)}")


def _own_inputs(manifest: Manifest) -> list[str]:
    """The inputs that only some kinds of graphs have."""
    if manifest.graphs:
        return ["position_ids"]
    if manifest.attention == "gqa":
        return ["logits_to_keep" if manifest.role == "target" else "draft_length"]
    return ["position_ids", "logits_to_keep"]


def _require_outputs(path: Path, session: Any, manifest: Manifest) -> None:
    given = {value.name: value for value in session.get_outputs()}
    has_outputs = all(graph.logits for graph in manifest.graphs if graph.file == path.name)
    for name, kind in OUTPUTS[manifest.role].items() if has_outputs else ():
        if name not in given or given[name].type != kind:
            raise _misfit(path, f"no output {name} of {kind}", f"a {manifest.role}")
    if "logits" in given and not _fits(given["logits"].shape[-1:], (manifest.columns,)):
        raise _misfit(path, f"logits of shape {given['logits'].shape}", f"{manifest.columns} columns")


def _require_features(path: Path, session: Any, manifest: Manifest) -> None:
    """The input of a draft that reads its target's hidden states, and the output of a target that gives them."""
    reads = manifest.spec.pard.features if manifest.spec.pard else None
    columns = len(manifest.feature_layers) * manifest.spec.hidden
    floats = TYPES[manifest.recipe.floats]
    for name, values, count in (
        (FEATURES_INPUT, session.get_overridable_initializers(), reads.columns if reads else 0),
        (FEATURES_OUTPUT, session.get_outputs(), columns),
    ):
        found = next((value for value in values if value.name == name), None)
        if (found is None) != (count == 0):
            raise _misfit(path, f"{'no' if found is None else 'the'} {name}", f"features of {count} columns")
        if found is not None and (found.type != floats or not _fits(found.shape[-1:], (count,))):
            raise _misfit(path, f"{name} of shape {found.shape} and {found.type}", f"{count} columns, {floats}")
    overridable = {value.name: value.type for value in session.get_overridable_initializers()}
    if columns and not manifest.graphs and overridable.get(FEATURES_KEPT) != INT64:
        raise _misfit(path, f"no {FEATURES_KEPT} of {INT64}", f"features of {columns} columns")


def _misfit(path: Path, found: str, said: str) -> BadArtifact:
    return BadArtifact(f"{path}: has {found}; pard_onnx.json says {said}; export or download the folder again")


def _fits(shape: list[Any], wanted: tuple[int, ...]) -> bool:
    """Whether the fixed dimensions are these; those that are not fixed have a name, or None."""
    fixed = [size if isinstance(size, int) else None for size in shape]
    return len(fixed) == len(wanted) and all(a in (None, b) for a, b in zip(fixed, wanted, strict=True))
