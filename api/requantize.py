"""`pard-quantize` on an exported folder: which options still say something, and where the result goes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from pard_onnx.cli import requantize_with_progress
from pard_onnx.export.output import place
from pard_onnx.export_command import default_output
from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import Manifest
from pard_onnx.models.precision import FLOATS
from pard_onnx.quantize.quantizer import Order

# Options of exports, and what an exported folder has fixed
FIXED: dict[str, Callable[[Manifest], object]] = {
    "role": lambda found: found.role,
    "context_length": lambda found: found.capacity,
    "draft_vocabulary": lambda found: "that of all ids",
    "vocabulary_text": lambda found: "that of all ids",
    "device": lambda found: found.device,
    "attention": lambda found: found.attention,
    "io_dtype": lambda found: next(name for name, floats in FLOATS.items() if floats == found.recipe.floats),
    "opset": lambda found: found.opset,
    "static": lambda found: bool(found.graphs),
    "draft_length": lambda found: found.draft_length or "any",
}


def requantize_as_told(options: argparse.Namespace, folder: Path, order: Order) -> tuple[Manifest, Path]:
    """Quantize an export by a checkpoint's options; BadInput for those that say otherwise than its graphs are."""
    found = Manifest.read(folder)
    for name, fixed in FIXED.items():
        given, there = getattr(options, name), fixed(found)
        if given not in (None, "auto", there):
            raise BadInput(
                f"{_told(name, given)}: quantizing keeps the graphs of {folder}, where it is {str(there).lower()}; "
                f"leave the option out, or name the checkpoint, {found.source.model}"
            )
    output = options.output or default_output(found.source, found.device, order.named.name)
    place(output, folder, force=options.force)
    kept = {"kv_cache": options.kv_cache, "verify": options.verify, "force": options.force}
    return requantize_with_progress(folder, output, order, **kept), output


def _told(name: str, given: object) -> str:
    """The option as the user wrote it."""
    if isinstance(given, bool):
        return f"--{name}" if given else f"--no-{name}"
    return f"--{name.replace('_', '-')} {given}"
