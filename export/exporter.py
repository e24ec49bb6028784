"""The verb: a checkpoint folder to an artifact folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from math import isfinite, prod
from pathlib import Path

import onnx_ir as ir
import torch

from pard_onnx.models.checkpoint import Checkpoint
from pard_onnx.models.errors import BadInput, Failure
from pard_onnx.models.families import shapes
from pard_onnx.models.manifest import KV_MARGIN, File, KvCacheFormat, Manifest, Parity, Source, TensorReport
from pard_onnx.models.precision import DEFAULT_PRECISION, Precision, Recipe, recipe
from pard_onnx.quantize.calibration import SHIPPED
from pard_onnx.quantize.calibration import read as read_calibration
from pard_onnx.quantize.imported import imported
from pard_onnx.quantize.pack import pack
from pard_onnx.quantize.prepared import Formats, Prepared
from pard_onnx.quantize.quantizer import Order, Quantized, quantized

from .attention import MICROSOFT, VARIANTS
from .fuse import PackQkvPass, SkipNormPass
from .genai import write_genai_config
from .kv_cache import quantize_cache
from .layout import LayoutPass
from .lower import LowerPass
from .output import COPIED, DATA, GRAPH, place, replacing
from .roles import finish, vocabulary_bias
from .store import WeightStore
from .trace import OPSET, trace

IR_VERSION = 10
DEFAULT_CAPACITY = 4096
FLOAT_AGREEMENT = 0.8  # far below what half precision costs, far above what a wrong graph reaches
TOOLS = ("pard-onnx", "torch", "transformers", "optimum", "onnx-ir", "onnxscript", "onnxruntime")
Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True, slots=True)
class Job:
    """What to export and how. output must not exist, unless `force` allows it to be replaced."""

    checkpoint: Checkpoint
    source: Source
    output: Path
    precision: Precision = DEFAULT_PRECISION
    recipe: Recipe | None = None  # None: the precision's own; a mixed one keeps the precision as its name
    prepared: Prepared | None = None  # of the same checkpoint; the recipe is for what it does not hold
    order: Order | None = None  # quantize by a named recipe instead, of the same precision
    capacity: int | None = None  # tokens; None: the model's own, at most DEFAULT_CAPACITY
    attention: str = "gqa"
    kv_cache: KvCacheFormat = "float"
    verify: bool = True
    force: bool = False

    def resolved_recipe(self) -> Recipe:
        role = self.checkpoint.spec.role
        own = self.recipe or recipe(self.precision, imported=self.checkpoint.quantization is not None)
        used = self.order.named.formats(role) if self.order else own
        used.require(role)
        if self.checkpoint.quantization and self.order:
            raise BadInput(
                f"{self.checkpoint.folder}: is quantized already ({self.checkpoint.quantization.method}); pard-export "
                "takes its integers as they are, and pard-quantize the unquantized checkpoint"
            )
        if self.checkpoint.quantization and used.floats != "float32":
            raise BadInput(
                f"{self.precision}: the checkpoint's integer weights (quantization_config: "
                f"{self.checkpoint.quantization.method}) are taken as they are, beside activations in float32; "
                "choose int4, int8 or fp32 for what it holds in floats"
            )
        return used

    def resolved_prepared(self) -> Prepared | None:
        """What was given, or else the integers of a quantized checkpoint."""
        return self.prepared or imported(self.checkpoint)

    def resolved_capacity(self) -> int:
        limit = self.checkpoint.spec.max_positions
        if self.capacity is None:
            return min(limit, DEFAULT_CAPACITY)
        if not 1 <= self.capacity <= limit:
            raise BadInput(f"context length {self.capacity} is not in 1..{limit}, the model's max_position_embeddings")
        return self.capacity


def export(job: Job, progress: Progress = lambda *_: None) -> Manifest:
    """Write the artifact folder `job.output`, all or nothing.

    Raises BadInput for what cannot be exported, Failure where the disk is too small. The folder is made
    beside its final place and renamed, so that an interrupted export leaves nothing that looks finished.
    """
    capacity = job.resolved_capacity()
    job.resolved_recipe()
    output = place(job.output, job.checkpoint.folder, force=job.force)
    with replacing(output, force=job.force) as folder:
        _require_space(job, folder)
        manifest = _build(job, capacity, folder, progress)
        manifest.write(folder)
    return manifest


def _build(job: Job, capacity: int, folder: Path, progress: Progress) -> Manifest:
    """Everything in `folder` but the manifest, which comes last and is returned."""
    checkpoint, spec = job.checkpoint, job.checkpoint.spec
    rows = capacity + KV_MARGIN
    with _weights(job, folder, progress) as weights:
        tensors = _write_graph(job, weights, rows, folder, progress)
    _quantize_cache(job, folder, progress)
    used, method = weights.recipe, checkpoint.quantization.method if checkpoint.quantization else None
    manifest = Manifest(
        role=spec.role,
        spec=spec,
        precision=job.precision,
        recipe=used,
        opset=OPSET,
        attention=job.attention,
        capacity=capacity,
        kv_rows=rows,
        kv_dtype=used.floats if job.kv_cache == "float" else "int8",
        kv_cache=job.kv_cache,
        files=(),
        source=replace(job.source, quantization=method),
        tools=tuple((name, version(name)) for name in TOOLS),
        tensors=tensors,
        quantization=weights.quantization,
    )
    for name in COPIED:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    if spec.role == "target":
        write_genai_config(manifest, folder)
    parity = _verify(job, folder, progress)
    files = tuple(File.of(path) for path in sorted(folder.iterdir()))
    return replace(manifest, files=files, parity=parity)


def _weights(job: Job, folder: Path, progress: Progress) -> AbstractContextManager[Quantized]:
    if job.order:
        return quantized(job.checkpoint, job.order, folder, progress)
    return nullcontext(Quantized(job.resolved_recipe(), pack, job.resolved_prepared()))


def _write_graph(job: Job, weights: Quantized, rows: int, folder: Path, progress: Progress) -> tuple[TensorReport, ...]:
    """model.onnx and its weights; rows: of KV buffers and rotary tables."""
    checkpoint, spec = job.checkpoint, job.checkpoint.spec
    used, variant = weights.recipe, VARIANTS[job.attention]
    formats = Formats(used, spec.tied, weights.prepared)
    progress("trace", 0, 1)
    traced = trace(checkpoint.folder, spec, variant, rows, getattr(torch, used.floats))
    progress("trace", 1, 1)
    model = traced.model
    total = sum(map(prod, dict(shapes(spec)).values()))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("weights", done, total)

    with (folder / DATA).open("wb") as file:
        store = WeightStore(checkpoint, file, DATA, advance, weights.prepared, weights.round)
        _set_tables(model, {"cos_cache": traced.cos, "sin_cache": traced.sin}, store, used.floats)
        for step in (LayoutPass(), PackQkvPass(formats), SkipNormPass()):
            step(model)
        LowerPass(formats, store, vocabulary_bias(spec))(model)
        finish(model, spec, variant)
    progress("weights", total, total)
    _save(model, folder)
    return tuple(store.reports)


def _quantize_cache(job: Job, folder: Path, progress: Progress) -> None:
    if job.kv_cache == "float":
        return
    progress("kv cache", 0, 1)
    text = (job.order.calibration if job.order else None) or SHIPPED
    quantize_cache(job.checkpoint, folder / GRAPH, job.kv_cache, read_calibration(text))
    progress("kv cache", 1, 1)


def _verify(job: Job, folder: Path, progress: Progress) -> Parity | None:
    if not job.verify:
        return None
    from .parity import check  # an export without the check does not need its imports

    progress("verify", 0, 1)
    parity = check(job.checkpoint, folder)
    progress("verify", 1, 1)
    if not isfinite(parity.max_error):
        raise Failure(
            f"{job.checkpoint.folder}: its logits are not finite, in torch or in the {job.precision} graph; "
            "the checkpoint is damaged or beyond the range of its floats (--no-verify exports it all the same)"
        )
    if job.resolved_recipe().matrices.kind in ("float32", "float16") and not parity.top1_agreement >= FLOAT_AGREEMENT:
        raise Failure(
            f"the exported graph is not the model: it agrees with torch on {parity.top1_agreement:.0%} of tokens, "
            f"mean logit error {parity.mean_error:.2g}; please report this model (--no-verify exports it all the same)"
        )
    return parity


def _set_tables(model: ir.Model, tables: dict[str, torch.Tensor], store: WeightStore, floats: str) -> None:
    """The rotary tables are inputs of the trace and constants of the graph."""
    graph = model.graph
    for value in [v for v in graph.inputs if v.name in tables]:
        array = tables[value.name].numpy().astype(floats)  # type: ignore[index]
        graph.inputs.remove(value)
        constant = store.add(f"rotary.{value.name}", array)
        value.replace_all_uses_with(constant)
        graph.register_initializer(constant)


def _save(model: ir.Model, folder: Path) -> None:
    model.ir_version = IR_VERSION
    model.opset_imports[MICROSOFT] = 1
    model.producer_name, model.producer_version = "pard-onnx", version("pard-onnx")
    model.graph.name = "model"
    model.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()  # stack traces of the machine that exported
    ir.save(model, folder / GRAPH)


def _require_space(job: Job, folder: Path) -> None:
    used = job.resolved_recipe()
    bits = {"float32": 32, "float16": 16, "dynamic": 8}.get(used.matrices.kind, used.matrices.bits + 1)
    values = sum(map(prod, dict(shapes(job.checkpoint.spec)).values()))
    needed, free = values * bits // 8 + (64 << 20), shutil.disk_usage(folder).free
    if free < needed:
        raise Failure(f"{folder.parent}: {free >> 20} MiB free, the export needs about {needed >> 20} MiB")
