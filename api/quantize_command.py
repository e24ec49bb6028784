"""`pard-quantize`: a checkpoint to a folder that ONNX Runtime runs, quantized by a named recipe; quality reports."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pard_onnx.cli import Parser, exit_code, export_job, stages
from pard_onnx.export.job import Job, requantize_job
from pard_onnx.export_command import (
    add_export_options,
    add_model,
    add_quantization,
    default_output,
    job_from_options,
    model_of,
    open_checkpoint,
    recipe_from_options,
    report,
    summary,
)
from pard_onnx.features_option import text_of
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadInput
from pard_onnx.models.extras import needs
from pard_onnx.models.hub import resolve_artifact, resolve_checkpoint
from pard_onnx.models.manifest import FILE_NAME, Manifest, Quantization, Source
from pard_onnx.models.precision import FLOATS
from pard_onnx.models.spec import Role
from pard_onnx.quantize.quantizer import QuantizationRequest
from pard_onnx.quantize_choice import add_choice, require_choice, run_choice

if TYPE_CHECKING:
    from rich.table import Table


def parser() -> argparse.ArgumentParser:
    out = Parser(prog="pard-quantize", description="Quantize a model by a named recipe, or compare quantized ones.")
    shipped = "demo-target, demo-draft, demo-pard2-draft, demo-ar-draft"
    model = f"a checkpoint folder, a GGUF file, a hub id, {shipped}; or an export in floats"
    add_model(out, model)
    add_quantization(out)
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
        options.model = model_of(options)
        require_choice(options)
        run_choice(options, *named_checkpoint(options))
        return
    if options.prompts is not None:
        raise BadInput(f"--prompts {options.prompts}: only --optimize-for measures on prompts; leave it out")
    if options.report is not None:
        run_report(options)
        return
    options.model = model_of(options)
    if options.model is None or (options.recipe is None and options.quality is None):
        raise BadInput(
            "name what to quantize and how: MODEL --quality good, or --recipe NAME; or what to compare: --report DIR..."
        )
    folder, source = resolve_checkpoint(options.model, options.revision)
    if (folder / FILE_NAME).is_file():
        artifact = resolve_artifact(options.model, options.revision)
        order = request_of(options, Manifest.read(artifact).role)
        job = requantize_job_from_options(options, artifact, order)
    else:
        checkpoint, source = open_checkpoint(options, folder, source)
        order = request_of(options, checkpoint.spec.role)
        job = job_from_options(options, checkpoint, source, order.recipe.precision, order)
    show(export_job(job), job.output, as_json=options.json)


def request_of(options: argparse.Namespace, role: Role) -> QuantizationRequest:
    """How to quantize a model of this role; a quality is that of int4."""
    return QuantizationRequest(recipe_from_options(options, "int4", role), options.calibration, options.budget)


def named_checkpoint(options: argparse.Namespace) -> tuple[Checkpoint, Source]:
    """The checkpoint that MODEL names; BadInput for an exported folder."""
    folder, source = resolve_checkpoint(options.model, options.revision)
    if (folder / FILE_NAME).is_file():
        source = Manifest.read(folder).source
        raise BadInput(f"{folder}: is exported already; name the checkpoint that it was exported from, {source.model}")
    return open_checkpoint(options, folder, source)


def show(manifest: Manifest, output: Path, *, as_json: bool) -> None:
    used = manifest.quantization
    assert used is not None
    if as_json:
        print(json.dumps(summary(manifest, output) | {"quantization": asdict(used)}))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(of_tensors(manifest))
    if used.choices:
        console.print(of_choices(used))
    report(manifest, output, as_json=False)


def of_tensors(manifest: Manifest) -> Table:
    """Every stored matrix; errors are relative, root mean square."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    out = Table("matrix", "format", "MB", "weight error", "output error", box=SIMPLE_HEAD)
    for tensor in manifest.tensors:
        products = "" if tensor.output_error is None else f"{tensor.output_error:.2%}"
        out.add_row(tensor.name, tensor.format, f"{tensor.bytes / 1e6:.2f}", f"{tensor.error:.2%}", products)
    return out


def of_choices(used: Quantization) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    out = Table("matrices", "bits", "loss at 4 bits", "MB for 8", "", box=SIMPLE_HEAD, title="mixed precision")
    for choice in used.choices:
        facts = (str(choice.bits), f"{choice.loss:.2g}", f"{choice.extra_bytes / 1e6:.2f}")
        out.add_row("+".join(choice.names), *facts, "protected" if choice.protected else "")
    return out


# Options of exports that an exported folder has values for already
FIXED: dict[str, Callable[[Manifest], object]] = {
    "role": lambda manifest: manifest.role,
    "context_length": lambda manifest: manifest.capacity,
    "draft_vocabulary": lambda manifest: "that of all ids",
    "vocabulary_text": lambda manifest: "that of all ids",
    "features": lambda manifest: text_of(manifest.feature_layers),
    "for_draft": lambda manifest: f"for features {text_of(manifest.feature_layers)}",
    "device": lambda manifest: manifest.device,
    "attention": lambda manifest: manifest.attention,
    "io_dtype": lambda manifest: next(name for name, floats in FLOATS.items() if floats == manifest.recipe.floats),
    "opset": lambda manifest: manifest.opset,
    "static": lambda manifest: bool(manifest.graphs),
    "draft_length": lambda manifest: manifest.draft_length or "any",
}


def requantize_job_from_options(options: argparse.Namespace, folder: Path, order: QuantizationRequest) -> Job:
    """The job that quantizes the float export in `folder`; BadInput for options that would change its graphs."""
    manifest = Manifest.read(folder)
    if options.adapter is not None:
        raise BadInput(
            f"--adapter {options.adapter}: {folder} is exported already; an adapter is merged into the checkpoint that "
            f"it was exported from, {manifest.source.model}"
        )
    for name, value_of in FIXED.items():
        value, fixed = getattr(options, name), value_of(manifest)
        if value not in (None, "auto", fixed):
            raise BadInput(
                f"{option_text(name, value)}: quantizing keeps the graphs of {folder}, where it is "
                f"{str(fixed).lower()}; leave the option out, or name the checkpoint, {manifest.source.model}"
            )
    with needs("export"):
        from pard_onnx.export.float_export import FloatExport
    return requantize_job(
        FloatExport.open(folder),
        options.output or default_output(manifest.source, manifest.device, order.recipe.name),
        order,
        kv_cache=options.kv_cache,
        verify=options.verify,
        accept_loss=options.accept_loss,
        force=options.force,
    )


def option_text(name: str, value: object) -> str:
    """An option and its value as a user writes them."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name.replace('_', '-')} {value}"


def add_report(out: argparse.ArgumentParser) -> None:
    """The options of a report, for a command that has --json already."""
    group = out.add_argument_group("report", "exported folders of one role, compared on a text that they did not see")
    group.add_argument("--report", nargs="+", metavar="DIR", help="folders that were exported or quantized")
    reference = "the unquantized model: its checkpoint, or an exported folder in fp32 or fp16"
    group.add_argument("--reference", metavar="DIR_OR_ID", help=reference)
    group.add_argument("--text", type=Path, metavar="F.txt", help="default: Python's standard library, in part")
    group.add_argument("--tokens", type=int, default=2048, metavar="N", help="of the text (default: 2048)")
    partner = group.add_mutually_exclusive_group()
    partner.add_argument("--draft", metavar="DIR", help="mean accepted length of each target with this draft")
    partner.add_argument(
        "--target",
        metavar="DIR",
        help="mean accepted length of each draft with this target; of --optimize-for, whose draft it is",
    )
    group.add_argument("--plot", type=Path, metavar="F.png", help="quality against size")


def run_report(options: argparse.Namespace) -> None:
    """Measure and show, as `add_report`'s options say. Raises BadInput before anything runs."""
    from rich.console import Console

    from pard_onnx.benchmarks import display
    from pard_onnx.benchmarks.quality.report import ReportRequest, make_report

    wanted = ReportRequest(
        tuple(options.report),
        options.reference,
        options.text,
        options.tokens,
        options.draft,
        options.target,
        adapter=options.adapter,
    )
    if options.plot:
        display.require_plot_path(options.plot)
    with stages() as progress:
        found = make_report(wanted, progress)
    if options.plot:
        display.save_quality_plot(options.plot, found)
    if options.json:
        print(json.dumps(asdict(found)))
    else:
        Console(highlight=False).print(display.quality_table(found), display.steps_table(found))


if __name__ == "__main__":
    sys.exit(main())
