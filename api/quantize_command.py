"""`pard-quantize`: a checkpoint to a folder that ONNX Runtime runs, quantized by a named recipe; quality reports."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pard_onnx.cli import Parser, exit_code, requantize_with_progress
from pard_onnx.export.output import place
from pard_onnx.export_command import add_export_options, default_output, export_as_told, form_of, report, summary
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadInput
from pard_onnx.models.hub import resolve_artifact, resolve_checkpoint
from pard_onnx.models.manifest import FILE_NAME, Manifest, Quantization, Source
from pard_onnx.models.precision import FLOATS
from pard_onnx.quantize.quantizer import BUDGET, QuantizationRequest
from pard_onnx.quantize.recipes import BLOCKS, RECIPES, named_recipe
from pard_onnx.quantize_choice import add_choice, require_choice, run_choice
from pard_onnx.quantize_report import add_report, run_report


def parser() -> argparse.ArgumentParser:
    out = Parser(prog="pard-quantize", description="Quantize a model by a named recipe, or compare quantized ones.")
    model = "a checkpoint folder, a hub id, demo-target, demo-draft or demo-ar-draft; or an export in fp32 or fp16"
    out.add_argument("model", nargs="?", metavar="MODEL", help=model)
    out.add_argument("--recipe", metavar="NAME", help=", ".join(RECIPES))
    out.add_argument("--block-size", type=int, metavar="N", help=f"weights that share a scale: {BLOCKS} (default: 128)")
    out.add_argument("--calibration", type=Path, metavar="F", help=".txt or .jsonl; default: a small set that ships")
    budget = f"of int4-mixed: a share of the size at 8 bits, or a size as 600MB (default: {BUDGET})"
    out.add_argument("--budget", metavar="SIZE", help=budget)
    out.add_argument("--output", type=Path, metavar="DIR", help="default: NAME-RECIPE in the current folder")
    add_export_options(out)
    add_report(out)
    add_choice(out)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    if options.optimize_for is not None:
        require_choice(options)
        run_choice(options, *opened(options))
        return
    if options.prompts is not None:
        raise BadInput(f"--prompts {options.prompts}: only --optimize-for measures on prompts; leave it out")
    if options.report is not None:
        run_report(options)
        return
    if options.model is None or options.recipe is None:
        raise BadInput("name what to quantize and how: MODEL --recipe NAME; or what to compare: --report DIR...")
    named = named_recipe(options.recipe, options.block_size)
    order = QuantizationRequest(named, options.calibration, options.budget)
    folder, source = resolve_checkpoint(options.model, options.revision)
    if (folder / FILE_NAME).is_file():
        manifest, output = requantize_as_told(options, resolve_artifact(options.model, options.revision), order)
    else:
        checkpoint, form = Checkpoint.open(folder).as_role(options.role), form_of(options)
        manifest, output = export_as_told(options, checkpoint, source, form, named.precision, named.name, order)
    show(manifest, output, as_json=options.json)


def opened(options: argparse.Namespace) -> tuple[Checkpoint, Source]:
    folder, source = resolve_checkpoint(options.model, options.revision)
    if (folder / FILE_NAME).is_file():
        source = Manifest.read(folder).source
        raise BadInput(f"{folder}: is exported already; name the checkpoint that it was exported from, {source.model}")
    return Checkpoint.open(folder).as_role(options.role), source


def show(manifest: Manifest, output: Path, *, as_json: bool) -> None:
    used = manifest.quantization
    assert used is not None
    if as_json:
        print(json.dumps(summary(manifest, output) | {"quantization": asdict(used)}))
        return
    console = Console(highlight=False)
    console.print(of_tensors(manifest))
    if used.choices:
        console.print(of_choices(used))
    report(manifest, output, as_json=False)


def of_tensors(manifest: Manifest) -> Table:
    """Every stored matrix; errors are relative, root mean square."""
    out = Table("matrix", "format", "MB", "weight error", "output error", box=SIMPLE_HEAD)
    for tensor in manifest.tensors:
        products = "" if tensor.output_error is None else f"{tensor.output_error:.2%}"
        out.add_row(tensor.name, tensor.format, f"{tensor.bytes / 1e6:.2f}", f"{tensor.error:.2%}", products)
    return out


def of_choices(used: Quantization) -> Table:
    out = Table("matrices", "bits", "loss at 4 bits", "MB for 8", "", box=SIMPLE_HEAD, title="mixed precision")
    for choice in used.choices:
        facts = (str(choice.bits), f"{choice.loss:.2g}", f"{choice.extra_bytes / 1e6:.2f}")
        out.add_row("+".join(choice.names), *facts, "protected" if choice.protected else "")
    return out


if __name__ == "__main__":
    sys.exit(main())


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


def requantize_as_told(options: argparse.Namespace, folder: Path, order: QuantizationRequest) -> tuple[Manifest, Path]:
    """Quantize an export by a checkpoint's options; BadInput for those that say otherwise than its graphs are."""
    found = Manifest.read(folder)
    for name, fixed in FIXED.items():
        given, there = getattr(options, name), fixed(found)
        if given not in (None, "auto", there):
            raise BadInput(
                f"{_told(name, given)}: quantizing keeps the graphs of {folder}, where it is {str(there).lower()}; "
                f"leave the option out, or name the checkpoint, {found.source.model}"
            )
    output = options.output or default_output(found.source, found.device, order.recipe.name)
    place(output, folder, force=options.force)
    kept = {"kv_cache": options.kv_cache, "verify": options.verify, "force": options.force}
    return requantize_with_progress(folder, output, order, **kept), output


def _told(name: str, given: object) -> str:
    """The option as the user wrote it."""
    if isinstance(given, bool):
        return f"--{name}" if given else f"--no-{name}"
    return f"--{name.replace('_', '-')} {given}"
