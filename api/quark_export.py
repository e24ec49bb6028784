"""`pard-export --device npu-oga`: a checkpoint in the layout of AMD Quark instead of graphs."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pard_onnx.cli import stages
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.devices import NPU_OGA
from pard_onnx.models.errors import BadInput
from pard_onnx.models.extras import needs
from pard_onnx.quantize.quantizer import QuantizationRequest
from pard_onnx.quantize.recipes import NamedRecipe, Quality, named_recipe

if TYPE_CHECKING:
    from pard_onnx.export.quark import QuarkExport, QuarkJob
    from pard_onnx.models.manifest import Source

# AMD's own flow is AWQ
RECIPES: dict[Quality, str] = {"fast": "int4-rtn-asym", "good": "int4-awq-asym", "best": "int4-gptq-asym"}
# Options that say something of graphs, or of how they are checked, with the values that they have if nobody sets them
OF_GRAPHS: dict[str, object] = {
    "attention": None,
    "io_dtype": None,
    "opset": None,
    "static": None,
    "draft_length": None,
    "context_length": None,
    "kv_cache": None,
    "draft_vocabulary": None,
    "vocabulary_text": None,
    "features": None,
    "for_draft": None,
    "accept_loss": False,
    "verify": True,
}
SPELLED = {("verify", False): "--no-verify", ("accept_loss", True): "--accept-loss", ("static", True): "--static"}


def require_options(options: argparse.Namespace) -> None:
    """BadInput for an option that a checkpoint in this layout has no use for."""
    for name, unset in OF_GRAPHS.items():
        value = getattr(options, name)
        if value != unset:
            option = SPELLED.get((name, value), f"--{name.replace('_', '-')} {value}")
            raise BadInput(f"{option} with --device {NPU_OGA}: it writes a checkpoint, not graphs; leave it out")
    if options.precision not in (None, "int4"):
        raise BadInput(f"--precision {options.precision} with --device {NPU_OGA}: it has int4 only; leave it out")


def recipe_of(options: argparse.Namespace, checkpoint: Checkpoint) -> NamedRecipe:
    """The recipe that the options name. BadInput for one of another format than the layout's."""
    from pard_onnx.export.quark import holds

    if options.recipe is not None and options.quality is not None:
        raise BadInput(f"--quality {options.quality} beside --recipe {options.recipe}: leave one of them out")
    recipe = named_recipe(options.recipe or RECIPES[options.quality or "good"], options.block_size)
    if not holds(recipe, checkpoint.spec):
        known = ", ".join(RECIPES.values())
        raise BadInput(
            f"recipe {recipe.name} with --device {NPU_OGA}: its layout is 4 bits with zero points in blocks of 128; "
            f"use {known}"
        )
    return recipe


def job_of(options: argparse.Namespace, checkpoint: Checkpoint, source: Source, output: Path) -> QuarkJob:
    """The export that the options ask for; integers of a quantized checkpoint are kept, but those of GGUF files."""
    from pard_onnx.export.quark import QuarkJob

    checkpoint = checkpoint.in_floats()
    order = None
    if checkpoint.quantization is None:
        order = QuantizationRequest(recipe_of(options, checkpoint), options.calibration, options.budget)
    else:
        named = ("quality", "recipe", "block_size", "calibration", "budget")
        given = next((name for name in named if getattr(options, name) is not None), None)
        if given:
            raise BadInput(
                f"--{given.replace('_', '-')} {getattr(options, given)}: the weights of {checkpoint.path.name} are "
                "quantized already; leave it out"
            )
    return QuarkJob(checkpoint, source, output, order, options.force)


def run_quark(options: argparse.Namespace, checkpoint: Checkpoint, source: Source, output: Path) -> None:
    """Write the checkpoint that the options ask for, and say what it is."""
    with needs("export"):
        from pard_onnx.export.quark import export_quark

        job = job_of(options, checkpoint, source, output)
    with stages() as progress:
        done = export_quark(job, progress)
    print(json.dumps(summary(done, output)) if options.json else line_of(done, output))


def summary(done: QuarkExport, output: Path) -> dict[str, object]:
    return {
        "output": str(output),
        "device": NPU_OGA,
        "role": done.spec.role,
        "family": done.spec.family,
        "precision": "int4",
        "dtype": done.dtype,
        "matrices": done.matrices,
        "bytes": done.bytes,
        "weight_error": done.error,
        "source": asdict(done.source),
        "recipe": done.quantization.recipe if done.quantization else None,
    }


def line_of(done: QuarkExport, output: Path) -> str:
    how = f"rounded by {done.quantization.recipe}, weight error {done.error:.1%}" if done.quantization else "kept"
    return (
        f"{output}: checkpoint in AMD Quark's layout, {done.matrices} matrices in uint4 in groups of 128, {how}, "
        f"{done.bytes / 1e6:.1f} MB; make an NPU's model of it with AMD's model_generate"
    )
