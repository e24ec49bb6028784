"""`--optimize-for throughput`: export a draft in the format with which its target is fastest."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pard_onnx.cli import export_job, stages
from pard_onnx.export.output import checked_output_folder, replacing
from pard_onnx.export_command import default_output, form_from_options, job_from_options, report, summary
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.devices import DEFAULT_FORM
from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import Manifest, Source, Throughput
from pard_onnx.quantize.calibration.text import SHIPPED as SHIPPED_TEXT
from pard_onnx.quantize.calibration.text import read_text_file
from pard_onnx.quantize.quantizer import QuantizationRequest
from pard_onnx.quantize.recipes import DRAFT_FORMATS, named_recipe

if TYPE_CHECKING:
    from rich.table import Table

    from pard_onnx.runtime.model import Artifact

NAME = "throughput"
# Options of other tasks, or of a format that the user names
EXCLUDED = ("report", "recipe", "quality", "block_size", "budget", "draft", "reference", "text", "plot")


def add_choice(out: argparse.ArgumentParser) -> None:
    group = out.add_argument_group("choice", "a draft in the format that is fastest on this machine, with its --target")
    group.add_argument("--optimize-for", choices=(NAME,), help=f"tries {', '.join(DRAFT_FORMATS)}, and keeps the best")
    prompts = "JSON lines as of pard-bench, on which acceptance is measured; default: those that ship"
    group.add_argument("--prompts", type=Path, metavar="F", help=prompts)


def require_choice(options: argparse.Namespace) -> None:
    """BadInput for options that exclude one another."""
    option = f"--optimize-for {options.optimize_for}"
    if options.model is None:
        raise BadInput(f"{option}: of which draft? pard-quantize DRAFT {option} --target DIR")
    if options.target is None:
        raise BadInput(f"{option}: for which target? add --target DIR, a folder that pard-export has written")
    for name in EXCLUDED:
        if getattr(options, name) is not None:
            raise BadInput(
                f"--{name.replace('_', '-')} beside {option}, which chooses the format itself; leave one out"
            )
    if form_from_options(options) != DEFAULT_FORM:
        raise BadInput(f"{option} measures on the CPU, in the graphs for it; leave --device and its options out")


def run_choice(options: argparse.Namespace, checkpoint: Checkpoint, source: Source) -> None:
    """Export the draft in every format, measure each with the target, and keep the fastest.

    All options are checked before the first export. The folders of the formats are temporary.
    """
    from pard_onnx.benchmarks.measures.draft_choice import compare_drafts
    from pard_onnx.benchmarks.trial import SHIPPED, read_prompts

    target = target_of(options, checkpoint)
    prompts = read_prompts(options.prompts or SHIPPED).prompts
    options = copy(options)
    options.output = options.output or default_output(source, DEFAULT_FORM.device.name, NAME)
    output = checked_output_folder(options.output, checkpoint.path, force=options.force)
    with replacing(output, force=options.force) as work:
        made = {name: export_candidate(options, checkpoint, source, name, work / name) for name in DRAFT_FORMATS}
        with stages() as progress:
            found = compare_drafts(target, made, prompts, progress)
        manifest = keep(made, found, work)
    show(manifest, options.output, found, as_json=options.json)


def target_of(options: argparse.Namespace, checkpoint: Checkpoint) -> Artifact:
    """The opened target; BadInput for a draft or target that cannot be measured together."""
    from pard_onnx.runtime.model import open_artifact, shared_ids

    option = f"--optimize-for {NAME}"
    if checkpoint.spec.pard is None:
        raise BadInput(
            f"{option}: {checkpoint.path} is a target, whose format is a matter of its quality: choose a --recipe, "
            "and see with --report what it loses"
        )
    if checkpoint.quantization:
        method = checkpoint.quantization.method
        raise BadInput(
            f"{option}: {checkpoint.path} is quantized already ({method}); pard-export takes its integers as they are"
        )
    read_text_file(options.calibration or SHIPPED_TEXT)
    target = open_artifact(options.target, "target")
    shared_ids(target, str(checkpoint.path), checkpoint.tokenizer_folder, checkpoint.spec)
    return target


def export_candidate(
    options: argparse.Namespace, checkpoint: Checkpoint, source: Source, name: str, output: Path
) -> Path:
    """Export the draft in one format."""
    print(f"trying {name}", file=sys.stderr)
    recipe = named_recipe(name)
    order = QuantizationRequest(recipe, options.calibration if recipe.needs_text else None)
    export_job(replace(job_from_options(options, checkpoint, source, recipe.precision, order), output=output))
    return output


def keep(made: dict[str, Path], found: Throughput, work: Path) -> Manifest:
    """Move the files of the fastest format to `work`, with the measurements in the manifest; remove all folders."""
    from pard_onnx.benchmarks.measures.draft_choice import best_draft

    fastest = made[best_draft(found.tried).recipe]
    manifest = Manifest.read(fastest)
    assert manifest.quantization is not None
    manifest = replace(manifest, quantization=replace(manifest.quantization, throughput=found))
    for path in fastest.iterdir():
        path.rename(work / path.name)
    for folder in made.values():
        shutil.rmtree(folder)
    manifest.write(work)
    return manifest


def show(manifest: Manifest, output: Path, found: Throughput, *, as_json: bool) -> None:
    if as_json:
        assert manifest.quantization is not None
        print(json.dumps(summary(manifest, output) | {"quantization": asdict(manifest.quantization)}))
        return
    from rich.console import Console

    Console(highlight=False).print(table(found))
    report(manifest, output, as_json=False)


def table(found: Throughput) -> Table:
    plain = f"with {Path(found.target).name}, {found.precision}, which has {found.plain:.1f} tok/s without a draft"
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from pard_onnx.benchmarks.measures.draft_choice import best_draft

    columns: Sequence[str] = ("format", "MB", "K", "draft step ms", "accepted", "tok/s", "")
    out = Table(*columns, box=SIMPLE_HEAD, title="predicted from step costs and acceptance", caption=plain)
    fastest = best_draft(found.tried)
    for one in found.tried:
        size, step = f"{one.bytes / 1e6:.1f}", f"{1000 * one.step_seconds:.2f}"
        rate = f"{one.tokens_per_second:.1f}"
        mark = "chosen" if one is fastest else ""
        out.add_row(one.recipe, size, str(one.draft_length), step, f"{one.accepted:.2f}", rate, mark)
    return out
