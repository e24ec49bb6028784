"""The abstract trunk of a traced checkpoint, and the graphs of its role that are made of the lowered trunk."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
import torch

from pard_onnx.export.job import Job
from pard_onnx.models.checkpoints.tensors import read_tensor
from pard_onnx.models.checks import Progress
from pard_onnx.models.manifest import GRAPH
from pard_onnx.models.spec import MASK_FEATURE, Pard, TargetFeatures
from pard_onnx.quantize.packing.prepared import Formats

from .attention import VARIANTS
from .features import FeaturesPass, JoinedFeaturesPass
from .fuse import PackQkvPass, SkipNormPass
from .layout import LayoutPass
from .plain_attention import PlainAttentionPass
from .plain_operators import PlainGeluPass
from .roles import finish, finish_portable
from .tape import ROTARY, constant
from .trace import trace


def traced_trunk(job: Job, formats: Formats, progress: Progress) -> ir.Model:
    """The abstract graph that all graphs of the job are made of; its rotary tables are in memory."""
    spec, form, rows = job.checkpoint.spec, job.form, job.kv_rows()
    floats = formats.recipe.floats
    progress("trace", 0, 1)
    trace_ = trace(
        job.checkpoint.folder, spec, VARIANTS[form.attention], rows, getattr(torch, floats), job.feature_layers
    )
    progress("trace", 1, 1)
    _set_tables(trace_.model.graph, trace_.tables, floats)
    passes: list[ir.passes.InPlacePass] = [LayoutPass(), PackQkvPass(formats), SkipNormPass()]
    if spec.pard and spec.pard.features:
        passes.append(features_pass(job, spec.pard, spec.pard.features))
    if form.attention == "portable":
        passes.append(PlainAttentionPass(spec, rows, form.device.write, bool(job.graphs()), form.opset))
        passes.append(PlainGeluPass(form.opset))
    for step in passes:
        step(trace_.model)
    return trace_.model


def features_pass(job: Job, pard: Pard, features: TargetFeatures) -> ir.passes.InPlacePass:
    """The pass that lets a draft read features, by how they are joined with its embeddings."""
    if features.join == "add":
        return FeaturesPass(features)
    mask = read_tensor(job.checkpoint.tensors[MASK_FEATURE])
    return JoinedFeaturesPass(features, pard.mask_id, mask, job.checkpoint.spec.norm_eps)


def role_graphs(job: Job, trunk: ir.Model) -> Iterator[tuple[str, ir.Model]]:
    """The lowered trunk with the inputs and outputs of its role, by the names of the graphs' files."""
    spec, form, ids = job.checkpoint.spec, job.form, job.head_ids()
    if form.attention == "gqa":
        finish(trunk, spec, VARIANTS["gqa"], ids)
        yield GRAPH, trunk
    elif not job.graphs():
        finish_portable(trunk, spec, form.opset, ids)
        yield GRAPH, trunk
    for static in job.graphs():
        model = trunk.clone()
        finish_portable(model, spec, form.opset, ids, job.kv_rows(), static)
        yield static.file, model


def _set_tables(graph: ir.Graph, tables: dict[str, torch.Tensor], floats: str) -> None:
    """The rotary tables are inputs of the trace and constants of the graph."""
    for value in [value for value in graph.inputs if value.name in tables]:
        table = constant(f"{ROTARY}{value.name}", tables[value.name].numpy().astype(floats))  # type: ignore[index]
        graph.inputs.remove(value)
        value.replace_all_uses_with(table)
        graph.register_initializer(table)
