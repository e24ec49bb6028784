"""What no manifest says: numbers that no model has, names of other folders' files, and facts that exclude one another.

A manifest from a stranger has a right digest whatever it says, since anyone can compute that. Buffers are made by its
numbers and files are opened by its names, so they are checked before.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from .errors import shown
from .folder_files import LONGEST_NAME, is_plain_name

if TYPE_CHECKING:
    from .manifest import Manifest

HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)
LARGE = 1 << 40
# The most of a number, a multiple of what any model has. The least is 1.
MOST = {
    "layers": 1 << 12,
    "hidden": 1 << 20,
    "intermediate": 1 << 22,
    "heads": 1 << 14,
    "kv_heads": 1 << 14,
    "head_dim": 1 << 14,
    "max_positions": LARGE,
}
MOST_VOCABULARY = 1 << 24
MOST_ROWS = 1 << 24  # of the KV buffers: the longest contexts have 10 million tokens
MOST_WIDTH = 1 << 16
MOST_FILE = 1 << 48

Range = tuple[str, int | None, int, int]  # a number's name, its value (None: it has none), the least and the most


def faults(manifest: Manifest) -> Iterator[str]:
    """The faults of a manifest, each a part of a sentence that names the value."""
    for name, value, least, most in _ranges(manifest):
        if value is not None and not least <= value <= most:
            yield f"{name} is {value}; it must be from {least} to {most}"
    yield from _long_names(manifest)
    yield from _file_faults(manifest)
    yield from _misfits(manifest)


def _ranges(manifest: Manifest) -> Iterator[Range]:
    spec = manifest.spec
    vocabulary = spec.vocabulary
    rows = vocabulary.rows
    yield "format_version", manifest.format_version, 1, manifest.format_version
    yield from ((f"spec.{name}", getattr(spec, name), 1, most) for name, most in MOST.items())
    yield "spec.vocabulary.rows", rows, 1, MOST_VOCABULARY
    yield "spec.vocabulary.size", vocabulary.size, 1, rows
    yield "spec.vocabulary.bos_id", vocabulary.bos_id, 0, rows - 1
    yield from (("spec.vocabulary.eos_ids", eos, 0, rows - 1) for eos in vocabulary.eos_ids)
    yield "spec.pard.mask_id", spec.pard.mask_id if spec.pard else None, 0, rows - 1
    yield from (("feature_layers", layer, -spec.layers - 1, -1) for layer in manifest.feature_layers)
    if spec.pard and (features := spec.pard.features):
        yield "spec.pard.features.width", features.width, 1, MOST["hidden"]
        yield from (("spec.pard.features.layers", layer, -MOST["layers"], MOST["layers"]) for layer in features.layers)
    yield from (("spec.attention.window", layer.window, 1, LARGE) for layer in spec.attention)
    yield "kv_rows", manifest.kv_rows, 1, MOST_ROWS
    yield from (("graphs.width", graph.width, 1, MOST_WIDTH) for graph in manifest.graphs)
    yield "capacity", manifest.capacity, 1, max(1, manifest.token_rows)
    reduced = manifest.draft_vocabulary
    yield "draft_vocabulary.size", reduced.size if reduced else None, 1, rows
    yield from ((f"the size of {shown(file.name)}", file.size, 0, MOST_FILE) for file in manifest.files)


def _long_names(manifest: Manifest) -> Iterator[str]:
    """Names stand in errors, which are one line."""
    names = (manifest.attention, manifest.device, manifest.spec.family, manifest.source.model)
    yield from (f"{shown(name)} has {len(name)} letters" for name in names if len(name) > LONGEST_NAME)


def _file_faults(manifest: Manifest) -> Iterator[str]:
    names = [file.name for file in manifest.files]
    opened = [*manifest.graph_files, "tokenizer.json"]
    for name in (*names, *manifest.graph_files):
        if not is_plain_name(name):
            yield f"{shown(name)} is not the name of a file beside it"
    yield from (f"it lists the file {shown(name)} twice" for name in _repeated(name.casefold() for name in names))
    yield from (f"its files have no {name[:LONGEST_NAME]}" for name in opened if name not in names)
    yield from (
        f"the hash of {shown(f.name)} is {shown(f.sha256)}" for f in manifest.files if not HASH.fullmatch(f.sha256)
    )


def _misfits(manifest: Manifest) -> Iterator[str]:
    """Facts of which one must be wrong."""
    spec, graphs = manifest.spec, manifest.graphs
    if manifest.role != spec.role:
        yield f"it is a {manifest.role} whose spec is a {spec.role}'s"
    if manifest.feature_layers and manifest.role == "draft":
        yield "it is a draft that has feature_layers"
    yield from (f"feature_layers has {layer} twice" for layer in _repeated(manifest.feature_layers))
    if spec.pard and (features := spec.pard.features):
        if not features.layers or features.width % len(features.layers):
            yield f"spec.pard.features has {len(features.layers)} layers, and the width {features.width}"
        if not 0 < features.scale < LARGE:
            yield f"spec.pard.features.scale is {features.scale}"
    if len(spec.attention) not in (0, spec.layers):
        yield f"spec.attention has {len(spec.attention)} layers, spec.layers is {spec.layers}"
    if (manifest.kv_cache == "float") == (manifest.kv_dtype == "int8"):
        yield f"kv_cache is {manifest.kv_cache}, kv_dtype {manifest.kv_dtype}"
    yield from (f"two graphs have the width {width}" for width in _repeated(graph.width for graph in graphs))
    if graphs and not (manifest.draft_length or 0) > 0:
        yield "no graph is wide enough to read drafts and gives logits"


def _repeated(values: Iterable[object]) -> list[object]:
    return [value for value, count in Counter(values).items() if count > 1]
