"""`pard-export`: a checkpoint to a folder that ONNX Runtime runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pard_onnx.cli import Parser, exit_code, export_job
from pard_onnx.export.job import Job
from pard_onnx.features_option import add_features, feature_layers_from_options
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checks import DRAFT_LENGTH
from pard_onnx.models.devices import (
    ATTENTIONS,
    DEFAULT_FORM,
    DEVICES,
    NPU_OGA,
    OPSETS,
    Device,
    Form,
    device_named,
    form_for,
    require_precision,
)
from pard_onnx.models.errors import BadInput
from pard_onnx.models.hub import resolve_adapter, resolve_checkpoint
from pard_onnx.models.manifest import KV_CACHE_FORMATS, AdapterSource, Manifest, Source
from pard_onnx.models.precision import DEFAULT_PRECISION, FLOATS, PRECISIONS, Precision, default_precision
from pard_onnx.models.spec import Role
from pard_onnx.quantize.draft_vocabulary import SelectedVocabulary, select_vocabulary
from pard_onnx.quantize.quantizer import BUDGET
from pard_onnx.quantize.recipes import (
    BLOCKS,
    DEFAULT_QUALITY,
    QUALITIES,
    RECIPES,
    NamedRecipe,
    Quality,
    named_recipe,
    recipe_of_quality,
)

if TYPE_CHECKING:
    from pard_onnx.quantize.quantizer import QuantizationRequest


def parser() -> argparse.ArgumentParser:
    out = Parser(prog="pard-export", description="Export a checkpoint for ONNX Runtime.")
    shipped = "demo-target, demo-draft, demo-pard2-draft or demo-ar-draft"
    add_model(out, f"a hub id, a checkpoint folder, a GGUF file (on the hub: org/name/file.gguf), {shipped}")
    out.add_argument("--output", type=Path, metavar="DIR", help="default: NAME-PRECISION in the current folder")
    own = f"the device's ({DEFAULT_PRECISION} on cpu)"
    precision = f"default: {own}, or what a quantized checkpoint has, whose integers are kept"
    out.add_argument("--precision", choices=PRECISIONS, help=precision)
    add_quantization(out)
    add_export_options(out)
    return out


def add_model(out: argparse.ArgumentParser, help_text: str) -> None:
    """The model, as an argument or as --model: `model_of` reads it."""
    out.add_argument("model", nargs="?", metavar="MODEL", help=help_text)
    out.add_argument("--model", dest="named_model", metavar="MODEL", help="the same")


def model_of(options: argparse.Namespace) -> str | None:
    """The model that the options name, None for none. Raises BadInput for two."""
    first, second = options.model, options.named_model
    if first is not None and second is not None:
        raise BadInput(f"{first} and --model {second}: two models; name one")
    found: str | None = first if second is None else second
    return found


def add_quantization(out: argparse.ArgumentParser) -> None:
    """How weights are rounded to fewer bits."""
    group = out.add_argument_group("quantization")
    quality = (
        "of int4 and int8. fast: rounded to nearest. good: by the importance of inputs, which a short pass over text "
        "measures. best: GPTQ over all of the text, minutes to hours "
        f"(default: {DEFAULT_QUALITY}; a draft keeps the format with the fastest steps)"
    )
    group.add_argument("--quality", choices=tuple(QUALITIES), help=quality)
    group.add_argument("--recipe", metavar="NAME", help=f"instead of a quality: {', '.join(RECIPES)}")
    sizes = f"weights that share a scale: {', '.join(map(str, BLOCKS))}; default: the recipe's"
    group.add_argument("--block-size", type=int, metavar="N", help=sizes)
    text = ".txt or .jsonl; default: a small set that ships"
    group.add_argument("--calibration", type=Path, metavar="F", help=text)
    budget = f"of int4-mixed: a share of the size at 8 bits, or a size as 600MB (default: {BUDGET})"
    group.add_argument("--budget", metavar="SIZE", help=budget)
    group.add_argument(
        "--accept-loss", action="store_true", help="export a target whose perplexity rises by more than a quarter, too"
    )


# What only a recipe that rounds weights has; in floats there is nothing that these could change
QUANTIZATION_OPTIONS = ("quality", "recipe", "block_size", "calibration", "budget")


def recipe_from_options(
    options: argparse.Namespace, precision: Precision, role: Role, default: Quality = DEFAULT_QUALITY
) -> NamedRecipe:
    """The recipe that --recipe names, or that --quality has for the precision and the role; default: a quality."""
    if options.recipe is not None and options.quality is not None:
        raise BadInput(f"--quality {options.quality} beside --recipe {options.recipe}: leave one of them out")
    name = options.recipe or recipe_of_quality(options.quality or default, precision, role).name
    return named_recipe(name, options.block_size)


def request_from_options(
    options: argparse.Namespace, checkpoint: Checkpoint, precision: Precision, device: Device
) -> QuantizationRequest | None:
    """How to quantize; None: the weights are stored in floats, or are quantized already.

    Without a quality or a recipe that is the default quality, where the device has the 8 bits that it needs. Raises
    BadInput for options that exclude one another.
    """
    from pard_onnx.quantize.quantizer import QuantizationRequest

    pard = checkpoint.spec.pard
    named = [name for name in QUANTIZATION_OPTIONS if getattr(options, name) is not None]
    if options.recipe is None and (checkpoint.quantization or precision not in ("int4", "int8")):
        if named:
            value, option = getattr(options, named[0]), named[0].replace("_", "-")
            held = f"the weights of {checkpoint.path.name} are quantized already" if checkpoint.quantization else None
            raise BadInput(
                f"--{option} {value}: {held or f'{precision} rounds no weights to fewer bits'}; leave it out"
            )
        return None
    # Text shows nothing of the hidden states that such a draft reads beside it
    joined = pard is not None and pard.features is not None and pard.features.join == "concat"
    default: Quality = DEFAULT_QUALITY if "int8" in device.precisions and not joined else "fast"
    recipe = recipe_from_options(options, precision, checkpoint.spec.role, default)
    if options.precision not in (None, recipe.precision):
        raise BadInput(f"--precision {options.precision} beside --recipe {recipe.name}, which is {recipe.precision}")
    return QuantizationRequest(recipe, options.calibration, options.budget)


def add_export_options(out: argparse.ArgumentParser) -> None:
    """The options that every export has."""
    out.add_argument(
        "--role",
        choices=("auto", "draft", "target"),
        default="auto",
        help="default: draft if the checkpoint has a mask token",
    )
    adapter = "a LoRA adapter, merged into the model: a folder that peft saved, or its hub id"
    out.add_argument("--adapter", metavar="DIR_OR_ID", help=adapter)
    out.add_argument("--context-length", type=int, metavar="N", help="tokens; default: the model's, at most 4096")
    cache = "int8: a quarter of float32's memory, slower verification; one scale a channel or (int8-tensor) a layer"
    out.add_argument("--kv-cache", choices=KV_CACHE_FORMATS, help=f"default: float; {cache}")
    reduced = "a draft proposes the N most frequent ids only: its steps are faster, and the text is the same"
    out.add_argument("--draft-vocabulary", type=int, metavar="N", help=reduced)
    frequent = ".txt or .jsonl in which ids are counted; default: the calibration text that ships"
    out.add_argument("--vocabulary-text", type=Path, metavar="F", help=frequent)
    add_features(out)
    add_device(out)
    out.add_argument("--revision", help="branch, tag or commit of a hub id")
    out.add_argument("--force", action="store_true", help="replace the output folder")
    out.add_argument("--no-verify", dest="verify", action="store_false", help="skip the check against torch")
    out.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_device(out: argparse.ArgumentParser) -> None:
    """The device to export for, and what to change in the graphs that are best for it."""
    group = out.add_argument_group("device")
    names = (
        f"one of {', '.join(DEVICES)}; default: cpu; pard-export also takes {NPU_OGA}, a checkpoint for AMD's own tools"
    )
    group.add_argument("--device", metavar="NAME", help=names)
    group.add_argument("--attention", choices=ATTENTIONS, help="gqa: one fused operator; portable: plain ones")
    group.add_argument(
        "--io-dtype", choices=tuple(FLOATS), help="of activations and KV cache, with int4 or int8 weights"
    )
    group.add_argument("--opset", type=int, metavar="N", help=f"of portable graphs, {OPSETS[0]} to {OPSETS[-1]}")
    group.add_argument(
        "--static",
        action=argparse.BooleanOptionalAction,
        help="graphs of a few fixed widths over one weight file; default: if the device needs them",
    )
    group.add_argument(
        "--draft-length",
        type=int,
        metavar="K",
        help=f"of static graphs: drafts a round, which set the graphs' widths; default: {DRAFT_LENGTH}",
    )


def form_from_options(options: argparse.Namespace) -> Form:
    """The form of graphs that the options of `add_device` ask for; BadInput for options that contradict one another."""
    return form_for(
        device_named(options.device or DEFAULT_FORM.device.name),
        attention=options.attention,
        floats=FLOATS.get(options.io_dtype),
        opset=options.opset,
        static=options.static,
        draft_length=options.draft_length,
    )


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    model = model_of(options)
    if model is None:
        raise BadInput("name the model to export: a hub id, a checkpoint folder, or demo-target")
    if options.device == NPU_OGA:
        export_for_oga(options, model)
        return
    job = job_of_model(options, model)
    report(export_job(job), job.output, as_json=options.json)


def export_for_oga(options: argparse.Namespace, model: str) -> None:
    """Write a checkpoint for AMD's own tools, which then make the graphs."""
    from pard_onnx.quark_export import require_options, run_quark

    require_options(options)
    folder, source = resolve_checkpoint(model, options.revision)
    checkpoint, source = open_checkpoint(options, folder, source)
    run_quark(options, checkpoint, source, options.output or default_output(source, NPU_OGA, "int4"))


def job_of_model(options: argparse.Namespace, model: str) -> Job:
    """The export of a model, a hub id or a local one, that the options ask for; the hub's is fetched now."""
    folder, source = resolve_checkpoint(model, options.revision)
    checkpoint, source = open_checkpoint(options, folder, source)
    bits, device = checkpoint.bits, form_from_options(options).device
    own = default_precision(bits) if bits else device.precision(checkpoint.spec.role)
    if options.recipe is not None:
        own = named_recipe(options.recipe, options.block_size).precision
    precision = options.precision or own
    order = request_from_options(options, checkpoint, precision, device)
    return job_from_options(options, checkpoint, source, precision, order)


def open_checkpoint(options: argparse.Namespace, folder: Path, source: Source) -> tuple[Checkpoint, Source]:
    """The checkpoint in `folder` in the role that the options ask for, with the adapter of --adapter; its source."""
    if options.adapter is None:
        checkpoint = Checkpoint.open(folder).as_role(options.role)
        return checkpoint if keeps_integers(options, checkpoint) else checkpoint.in_floats(), source
    adapter_folder, adapter_source = resolve_adapter(options.adapter)
    checkpoint = Checkpoint.open(folder, adapter_folder).as_role(options.role)
    assert checkpoint.adapter is not None
    merged = AdapterSource(adapter_source.model, checkpoint.adapter.sha256(), adapter_source.revision)
    return checkpoint, replace(source, adapter=merged)


def keeps_integers(options: argparse.Namespace, checkpoint: Checkpoint) -> bool:
    """Whether the integers of a quantized checkpoint are kept: unless the options ask for other ones, or for floats.

    Only those of GGUF files can be read as floats; for other checkpoints such options are refused later.
    """
    rounded = any(getattr(options, name, None) is not None for name in (*QUANTIZATION_OPTIONS, "optimize_for"))
    precision = getattr(options, "precision", None)
    return not rounded and precision in (None, default_precision(checkpoint.bits))


def job_from_options(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    source: Source,
    precision: Precision,
    order: QuantizationRequest | None = None,
) -> Job:
    """The export that the options of `add_export_options` ask for; order: by a named recipe of this precision.

    Without --output the folder's name is made of the model, the device, and the recipe, if one is named, or precision.
    """
    form = form_from_options(options)
    require_precision(form, precision)
    vocabulary = vocabulary_from_options(options, checkpoint)
    feature_layers = feature_layers_from_options(options, checkpoint)
    name = order.recipe.name if order and options.recipe is not None else precision
    name += f"-v{vocabulary.record.size}" if vocabulary else ""
    return Job(
        checkpoint,
        source,
        options.output or default_output(source, form.device.name, name),
        precision,
        order=order,
        capacity=options.context_length,
        form=form,
        feature_layers=feature_layers,
        kv_cache=options.kv_cache or "float",
        vocabulary=vocabulary,
        verify=options.verify,
        accept_loss=options.accept_loss,
        force=options.force,
    )


def vocabulary_from_options(options: argparse.Namespace, checkpoint: Checkpoint) -> SelectedVocabulary | None:
    """The ids that a draft can propose, None for all; BadInput for options that cannot be met."""
    size, text = options.draft_vocabulary, options.vocabulary_text
    if size is None and text is not None:
        raise BadInput(f"--vocabulary-text {text}: of how many ids? add --draft-vocabulary N, or leave it out")
    return None if size is None else select_vocabulary(checkpoint, size, text)


def default_output(source: Source, device: str, name: str) -> Path:
    suffix = name if device == DEFAULT_FORM.device.name else f"{device}-{name}"
    models = [source.model] if source.adapter is None else [source.model, source.adapter.name]
    return Path("-".join([*(model.rsplit("/", 1)[-1] for model in models), suffix]))


def summary(manifest: Manifest, output: Path) -> dict[str, Any]:
    return {
        "output": str(output),
        "role": manifest.role,
        "family": manifest.spec.family,
        "precision": manifest.precision,
        "device": manifest.device,
        "attention": manifest.attention,
        "opset": manifest.opset,
        "io_dtype": manifest.kv_dtype,
        "graphs": [asdict(graph) for graph in manifest.graphs],
        "context_length": manifest.capacity,
        "kv_cache": manifest.kv_cache,
        "feature_layers": list(manifest.feature_layers),
        "draft_vocabulary": asdict(manifest.draft_vocabulary) if manifest.draft_vocabulary else None,
        "bytes": manifest.bytes,
        "source": asdict(manifest.source),
        "parity": asdict(manifest.parity) if manifest.parity else None,
        "quality": asdict(manifest.quality) if manifest.quality else None,
        "recipe": manifest.quantization.recipe if manifest.quantization else None,
        "tensors": [asdict(tensor) for tensor in manifest.tensors],
    }


def report(manifest: Manifest, output: Path, *, as_json: bool) -> None:
    facts = summary(manifest, output)
    if as_json:
        print(json.dumps(facts))
        return
    parity, quality = manifest.parity, manifest.quality
    checked = (
        "not checked against torch"
        if parity is None
        else (f"against torch: mean logit error {parity.mean_error:.2g}, top-1 agreement {parity.top1_agreement:.0%}")
    )
    if quality is not None:
        checked += f", perplexity {quality.perplexity:.4g} ({quality.loss:+.1%})"
    method = manifest.source.quantization
    recipe = f" ({manifest.quantization.recipe})" if manifest.quantization else ""
    kind = f"{manifest.role}, {manifest.precision}{recipe}"
    if method:
        kept = sum(tensor.error == 0 for tensor in manifest.tensors)
        kind += f", integers of its {method} checkpoint in {kept} of {len(manifest.tensors)} matrices"
    if manifest.device != DEFAULT_FORM.device.name:
        kind += f", for {manifest.device}"
    if manifest.source.adapter:
        kind += f", with adapter {manifest.source.adapter.name}"
    reduced = manifest.draft_vocabulary
    if reduced:
        kind += f", {reduced.size} ids ({reduced.coverage:.1%} of {reduced.text}'s tokens)"
    print(f"{output}: {kind}, {facts['bytes'] / 1e6:.1f} MB; {checked}")


if __name__ == "__main__":
    sys.exit(main())
