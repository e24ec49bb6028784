"""The verb: a checkpoint folder to an artifact folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from math import isfinite, prod
from pathlib import Path

import onnx_ir as ir

from pard_onnx.export.graphs.lower import LowerPass
from pard_onnx.export.graphs.operators import MICROSOFT, require_operators
from pard_onnx.export.graphs.qdq import Pairs
from pard_onnx.export.graphs.relower import raised
from pard_onnx.export.graphs.roles import vocabulary_bias
from pard_onnx.models.devices import Form
from pard_onnx.models.draft_vocabulary import write_ids
from pard_onnx.models.errors import Failure
from pard_onnx.models.families import shapes
from pard_onnx.models.manifest import DATA, GRAPH, File, Manifest, Parity, TensorReport
from pard_onnx.models.precision import Floats
from pard_onnx.quantize.calibration.text import SHIPPED, read_text_file
from pard_onnx.quantize.packing.pack import pack
from pard_onnx.quantize.packing.prepared import Formats
from pard_onnx.quantize.quantizer import QuantizedWeights, quantize

from .job import Job
from .kv_cache import quantize_cache
from .output import COPIED, place, replacing
from .runtime_configs import write_genai_config, write_vitisai_config
from .store import WeightStore

__all__ = ["Job", "export"]
IR_VERSION = 10
FLOAT_AGREEMENT = 0.8  # far below what half precision costs, far above what a wrong graph reaches
TOOLS = ("pard-onnx", "torch", "transformers", "optimum", "onnx-ir", "onnxscript", "onnxruntime")
Progress = Callable[[str, int, int], None]  # stage, done, total


def export(job: Job, progress: Progress = lambda *_: None) -> Manifest:
    """Write the artifact folder `job.output`, all or nothing.

    Raises BadInput for what cannot be exported, Failure where the disk is too small. The folder is made
    beside its final place and renamed, so that an interrupted export leaves nothing that looks finished.
    """
    job.resolved_capacity()
    job.resolved_recipe()
    output = place(job.output, job.checkpoint.folder, force=job.force)
    with replacing(output, force=job.force) as folder:
        _require_space(job, folder)
        manifest = _build(job, folder, progress)
        manifest.write(folder)
    return manifest


def _build(job: Job, folder: Path, progress: Progress) -> Manifest:
    """Everything in `folder` but the manifest, which comes last and is returned."""
    checkpoint, spec = job.checkpoint, job.checkpoint.spec
    form = job.form
    with _weights(job, folder, progress) as found:
        weights = replace(found, recipe=job.fitted(found.recipe))
        tensors = _write_graphs(job, weights, folder, progress)
    _quantize_cache(job, weights.recipe.floats, folder, progress)
    used, method = weights.recipe, checkpoint.quantization.method if checkpoint.quantization else None
    manifest = Manifest(
        role=spec.role,
        spec=spec,
        precision=job.precision,
        recipe=used,
        opset=form.opset,
        attention=form.attention,
        capacity=job.resolved_capacity(),
        kv_rows=job.kv_rows(),
        kv_dtype=used.floats if job.kv_cache == "float" else "int8",
        kv_cache=job.kv_cache,
        files=(),
        source=replace(job.source, quantization=method, export=job.exported_in()),
        tools=tuple((name, version(name)) for name in TOOLS),
        tensors=tensors,
        device=form.device.name,
        graphs=job.graphs(),
        quantization=weights.quantization,
        draft_vocabulary=job.vocabulary.record if job.vocabulary else None,
    )
    if job.vocabulary:
        write_ids(folder, job.vocabulary.ids)
    for name in COPIED:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    if spec.role == "target" and form.attention == "gqa":
        write_genai_config(manifest, folder)
    if form.device.name == "npu" and not weights.scales:  # what it tells is for floats
        write_vitisai_config(folder)
    parity = _verify(job, folder, manifest, progress)
    files = tuple(File.of(path) for path in sorted(folder.iterdir()))
    return replace(manifest, files=files, parity=parity)


def _weights(job: Job, folder: Path, progress: Progress) -> AbstractContextManager[QuantizedWeights]:
    if job.order:
        return quantize(job.checkpoint, job.order, folder, progress)
    return nullcontext(QuantizedWeights(job.resolved_recipe(), pack, job.resolved_prepared()))


def _write_graphs(job: Job, weights: QuantizedWeights, folder: Path, progress: Progress) -> tuple[TensorReport, ...]:
    """The graphs, one or several, and their weights."""
    spec, used = job.checkpoint.spec, weights.recipe
    formats = Formats(used, spec.tied, weights.prepared)
    total = sum(map(prod, dict(shapes(spec)).values()))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("weights", done, total)

    with (folder / DATA).open("wb") as file:
        store = WeightStore(job.checkpoint, file, DATA, advance, weights.prepared, weights.round, used.floats)
        chosen = job.chosen()
        bias = vocabulary_bias(spec) if chosen is None else None  # of ids that are there alone, none is padding
        kind = job.form.device.bytes if used.matrices.activations == 8 else "int16"
        pairs = Pairs(weights.scales, kind, job.form.opset) if weights.scales else None
        lower = LowerPass(formats, store, bias, chosen, pairs)
        for name, graph in _graphs(job, lower, progress):
            _save(graph, job.form, folder / name)
    progress("weights", total, total)
    return tuple(store.reports)


def _graphs(job: Job, lower: LowerPass, progress: Progress) -> Iterator[tuple[str, ir.Model]]:
    """The finished graphs by the names of their files."""
    if job.exported:
        return raised(job.exported, lower)
    from pard_onnx.export.graphs.traced import traced  # torch and transformers take seconds to import

    return traced(job, lower, progress)


def _quantize_cache(job: Job, floats: Floats, folder: Path, progress: Progress) -> None:
    if job.kv_cache == (job.exported.manifest.kv_cache if job.exported else "float"):
        return
    progress("kv cache", 0, 1)
    text = (job.order.calibration if job.order else None) or SHIPPED
    quantize_cache(job.checkpoint, folder / GRAPH, floats, job.kv_cache, read_text_file(text))
    progress("kv cache", 1, 1)


def _verify(job: Job, folder: Path, manifest: Manifest, progress: Progress) -> Parity | None:
    if not job.verify:
        return None
    from pard_onnx.export.verify.parity import check  # an export without the check does not need its imports

    progress("verify", 0, 1)
    parity = check(job.checkpoint, folder, manifest)
    progress("verify", 1, 1)
    if not isfinite(parity.max_error):
        raise Failure(
            f"{job.checkpoint.folder}: its logits are not finite, in torch or in the {job.precision} graph; "
            "the checkpoint is damaged or beyond the range of its floats (--no-verify exports it all the same)"
        )
    if job.resolved_recipe().matrices.plain and not parity.top1_agreement >= FLOAT_AGREEMENT:
        raise Failure(
            f"the exported graph is not the model: it agrees with torch on {parity.top1_agreement:.0%} of tokens, "
            f"mean logit error {parity.mean_error:.2g}; please report this model (--no-verify exports it all the same)"
        )
    return parity


def _save(model: ir.Model, form: Form, path: Path) -> None:
    model.ir_version = IR_VERSION
    model.opset_imports[""] = form.opset
    if form.attention == "gqa" or any(node.domain == MICROSOFT for node in model.graph):
        model.opset_imports[MICROSOFT] = 1
    model.producer_name, model.producer_version = "pard-onnx", version("pard-onnx")
    model.graph.name = "model"
    model.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()  # stack traces of the machine that exported
    require_operators(model, form.device)
    ir.save(model, path)


def _require_space(job: Job, folder: Path) -> None:
    used = job.resolved_recipe()
    bits = {"float32": 32, "float16": 16, "dynamic": 8}.get(used.matrices.kind, used.matrices.bits + 1)
    values = sum(map(prod, dict(shapes(job.checkpoint.spec)).values()))
    needed, free = values * bits // 8 + (64 << 20), shutil.disk_usage(folder).free
    if free < needed:
        raise Failure(f"{folder.parent}: {free >> 20} MiB free, the export needs about {needed >> 20} MiB")
