"""`export`: a checkpoint folder to an artifact folder, in stages.

1. plan      output folder, disk space, the format of every matrix; a recipe that reads calibration text reads it here
2. graphs    abstract graphs: of a trace, or of a float export; weights are only named
3. weights   graphs are lowered to ONNX operators, and the weights that these read are written to one data file
4. cache     the KV cache becomes int8 where the job says so
5. verify    the graphs are compared with torch: their logits, and how well they predict a text
6. manifest  facts, sizes and hashes
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from math import prod
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from pard_onnx.models.chat_template import warn_of_template
from pard_onnx.models.checks import Progress, no_progress
from pard_onnx.models.devices import Form
from pard_onnx.models.errors import Failure, PardWarning
from pard_onnx.models.families import shapes
from pard_onnx.models.manifest import DATA, GRAPH, File, Manifest, TensorReport, write_draft_ids
from pard_onnx.models.system_errors import naming
from pard_onnx.quantize.calibration.text import SHIPPED, read_text_file
from pard_onnx.quantize.packing.imported import imported_matrices
from pard_onnx.quantize.packing.pack import pack
from pard_onnx.quantize.packing.prepared import Formats
from pard_onnx.quantize.quantizer import QuantizedWeights, quantize

from .graphs.lower import LowerPass
from .graphs.plain_operators import PlainNormPass
from .graphs.qdq import QdqPairs
from .graphs.relower import ConstantsPass, abstract_graphs
from .graphs.roles import vocabulary_bias
from .graphs.tape import MICROSOFT, require_operators
from .job import Job
from .kv_cache import quantize_cache
from .output import ELSEWHERE, checked_output_folder, copy_side_files, replacing
from .runtime_configs import write_genai_config, write_vitisai_config
from .store import WeightStore

__all__ = ["Job", "export"]
IR_VERSION = 10
TOOLS = ("pard-onnx", "torch", "transformers", "optimum", "onnx-ir", "onnxscript", "onnxruntime")


def export(job: Job, progress: Progress = no_progress) -> Manifest:
    """Write the artifact folder `job.output`, all or nothing.

    Raises BadInput for what cannot be exported, Failure where the disk is too small. The folder is made
    beside its final place and renamed, so that an interrupted export leaves nothing that looks finished.
    """
    output = checked_output_folder(job.output, job.checkpoint.path, force=job.force)
    job.resolved_capacity()
    job.resolved_recipe()
    if job.checkpoint.spec.role == "target":
        warn_of_template(job.checkpoint.spec.chat_template, job.checkpoint.file or job.checkpoint.tokenizer_folder)
    with replacing(output, force=job.force) as folder:
        require_space(job, folder)
        with planned_weights(job, folder, progress) as weights:
            graphs = build_graphs(job, weights, progress)
            tensors = write_weights(job, weights, graphs, folder, progress)
        save_graphs(job, graphs, folder)
        quantize_kv_cache(job, weights, folder, progress)
        manifest = describe(job, weights, tensors)
        write_side_files(job, weights, manifest, folder)
        manifest = verify(job, folder, manifest, progress)
        files = tuple(File.of(path) for path in sorted(folder.iterdir()))
        manifest = replace(manifest, files=files)
        manifest.write(folder)
    return manifest


# 1. Plan


def require_space(job: Job, folder: Path) -> None:
    """Failure if the disk of `folder` has too little room for the export."""
    matrices = job.resolved_recipe().matrices
    bits = {"float32": 32, "float16": 16, "dynamic": 8}.get(matrices.kind, matrices.bits + 1)
    needed, free = weight_count(job) * bits // 8 + (64 << 20), shutil.disk_usage(folder).free
    if free < needed:
        found = f"{free >> 20} MiB free, the export needs about {needed >> 20} MiB"
        raise Failure(f"{folder.parent}: {found}; free some space or {ELSEWHERE}")


def weight_count(job: Job) -> int:
    return sum(map(prod, dict(shapes(job.checkpoint.spec)).values()))


@contextmanager
def planned_weights(job: Job, folder: Path, progress: Progress) -> Iterator[QuantizedWeights]:
    """How each matrix is stored, by a recipe that the device can run; packed matrices are readable inside only."""
    if job.order is None:
        # The integers of a quantized checkpoint are kept
        yield QuantizedWeights(job.resolved_recipe(), pack, job.prepared or imported_matrices(job.checkpoint))
        return
    with quantize(job.checkpoint, job.order, folder, progress) as weights:
        yield replace(weights, recipe=job.runnable_recipe(weights.recipe))


def formats(job: Job, weights: QuantizedWeights) -> Formats:
    return Formats(weights.recipe, job.checkpoint.spec.tied, weights.prepared)


# 2. Graphs


def build_graphs(job: Job, weights: QuantizedWeights, progress: Progress) -> list[ir.Model]:
    """The abstract graphs: those of a float export, or the one trunk of a trace."""
    if job.float_export:
        return abstract_graphs(job.float_export, formats(job, weights))
    from .graphs.traced import traced_trunk  # torch and transformers take seconds to import

    return [traced_trunk(job, formats(job, weights), progress)]


# 3. Weights


def write_weights(
    job: Job, weights: QuantizedWeights, graphs: list[ir.Model], folder: Path, progress: Progress
) -> tuple[TensorReport, ...]:
    """Write the data file and lower the graphs in place; the stored matrices.

    A matrix is written when the first operator that reads it is lowered, a block of rows at a time.
    """
    total, done = weight_count(job), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("weights", done, total)

    # Around the file: closing it may fail too
    with naming(folder / DATA), (folder / DATA).open("wb") as file:
        floats = weights.recipe.floats
        store = WeightStore(job.checkpoint, file, DATA, advance, weights.prepared, weights.round, floats)
        passes = lowering_passes(job, weights, store)
        for graph in graphs:
            for step in passes:
                step(graph)
    progress("weights", total, total)
    return tuple(store.reports)


def lowering_passes(job: Job, weights: QuantizedWeights, store: WeightStore) -> list[ir.passes.InPlacePass]:
    """What turns an abstract graph into one of ONNX operators whose weights are in the store's file."""
    spec, form, head_ids, known = job.checkpoint.spec, job.form, job.head_ids(), formats(job, weights)
    bias = vocabulary_bias(spec) if head_ids is None else None  # a head of chosen ids has no rows of padding ids
    activations = form.device.bytes if weights.recipe.matrices.activations == 8 else "int16"
    pairs = QdqPairs(weights.scales, activations, form.opset) if weights.scales else None
    passes: list[ir.passes.InPlacePass] = [ConstantsPass(store)]
    if form.attention == "portable":
        passes.append(PlainNormPass(store, known.floats, form.opset))
    return [*passes, LowerPass(known, store, bias, head_ids, pairs)]


def save_graphs(job: Job, graphs: list[ir.Model], folder: Path) -> None:
    """Write the lowered graphs, with the inputs and outputs of their role, to their files."""
    for name, model in finished_graphs(job, graphs):
        save(model, job.form, folder / name)


def finished_graphs(job: Job, graphs: list[ir.Model]) -> Iterator[tuple[str, ir.Model]]:
    """The lowered graphs as they are saved, by the names of their files."""
    if not job.float_export:
        from .graphs.traced import role_graphs

        yield from role_graphs(job, *graphs)
        return
    for name, model in zip(job.graph_files(), graphs, strict=True):  # they have the inputs and outputs of their role
        RemoveUnusedNodesPass()(model)
        yield name, model


def save(model: ir.Model, form: Form, path: Path) -> None:
    """Write one graph, without names of the exporting machine. Failure for an operator not on the device's list."""
    model.ir_version = IR_VERSION
    model.opset_imports[""] = form.opset
    if form.attention == "gqa" or any(node.domain == MICROSOFT for node in model.graph):
        model.opset_imports[MICROSOFT] = 1
    model.producer_name, model.producer_version = "pard-onnx", version("pard-onnx")
    model.graph.name = "model"
    model.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()  # stack traces
    require_operators(model, form.device)
    with naming(path):
        ir.save(model, path)


# 4. Cache


def quantize_kv_cache(job: Job, weights: QuantizedWeights, folder: Path, progress: Progress) -> None:
    """Rewrite the graph to the job's KV cache format, if it has another one."""
    if job.kv_cache == job.kv_cache_before():
        return
    progress("kv cache", 0, 1)
    text = (job.order.calibration if job.order else None) or SHIPPED
    quantize_cache(job.checkpoint, folder / GRAPH, weights.recipe.floats, job.kv_cache, read_text_file(text))
    progress("kv cache", 1, 1)


# 5. Verify


def verify(job: Job, folder: Path, manifest: Manifest, progress: Progress) -> Manifest:
    """The manifest with what the graphs in `folder` lose against torch; unchanged without a check.

    Failure where they are another model, or lose more than is accepted; PardWarning where they lose much.
    """
    if not job.verify:
        return manifest
    from .verify.parity import check  # an export without the check does not need these imports
    from .verify.perplexity import judge, measure
    from .verify.reference import load_reference

    progress("verify", 0, 2)
    reference = load_reference(job.checkpoint)
    parity = check(job.checkpoint, folder, manifest, reference)
    progress("verify", 1, 2)
    quality = measure(job.checkpoint, folder, manifest, reference)
    progress("verify", 2, 2)
    warning = judge(quality, manifest, job.accept_loss)
    if warning:
        warnings.warn(warning, PardWarning, stacklevel=2)
    return replace(manifest, parity=parity, quality=quality)


# 6. Manifest


def describe(job: Job, weights: QuantizedWeights, tensors: tuple[TensorReport, ...]) -> Manifest:
    """The manifest, but for `files` and `parity`."""
    checkpoint, form = job.checkpoint, job.form
    method = checkpoint.quantization.method if checkpoint.quantization else None
    return Manifest(
        role=checkpoint.spec.role,
        spec=checkpoint.spec,
        precision=job.precision,
        recipe=formats(job, weights).stored_recipe(checkpoint.spec),
        opset=form.opset,
        attention=form.attention,
        capacity=job.resolved_capacity(),
        kv_rows=job.kv_rows(),
        kv_dtype=weights.recipe.floats if job.kv_cache == "float" else "int8",
        kv_cache=job.kv_cache,
        feature_layers=job.feature_layers,
        files=(),
        source=replace(job.source, quantization=method, export=job.float_precision()),
        tools=tuple((name, version(name)) for name in TOOLS),
        tensors=tensors,
        device=form.device.name,
        graphs=job.graphs(),
        quantization=weights.quantization,
        draft_vocabulary=job.vocabulary.record if job.vocabulary else None,
    )


def write_side_files(job: Job, weights: QuantizedWeights, manifest: Manifest, folder: Path) -> None:
    """The checkpoint's tokenizer and configs, and what other runtimes read."""
    if job.vocabulary:
        write_draft_ids(folder, job.vocabulary.ids)
    copy_side_files(job.checkpoint, folder)
    if manifest.role == "target" and job.form.attention == "gqa":
        write_genai_config(manifest, folder)
    if job.form.device.name == "npu" and not weights.scales:  # its settings are for graphs in floats
        write_vitisai_config(folder)
