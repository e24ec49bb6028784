"""A checkpoint's graphs by tracing: abstract trunk, passes over it, the inputs and outputs of its role."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir
import torch

from pard_onnx.models.manifest import GRAPH

from .attention import VARIANTS
from .fuse import PackQkvPass, SkipNormPass
from .job import Job
from .layout import LayoutPass
from .lower import LowerPass
from .plain_attention import PlainAttentionPass
from .plain_gelu import PlainGeluPass
from .plain_norm import PlainNormPass
from .roles import finish, finish_portable
from .store import WeightStore
from .trace import trace


def traced(job: Job, lower: LowerPass, progress: Callable[[str, int, int], None]) -> Iterator[tuple[str, ir.Model]]:
    """The job's graphs by the names of their files; `lower` stores their weights."""
    checkpoint, spec, form = job.checkpoint, job.checkpoint.spec, job.form
    formats, store, rows = lower.formats, lower.store, job.kv_rows()
    progress("trace", 0, 1)
    found = trace(checkpoint.folder, spec, VARIANTS[form.attention], rows, getattr(torch, formats.recipe.floats))
    progress("trace", 1, 1)
    model = found.model
    _set_tables(model, found.tables, store, formats.recipe.floats)
    passes: list[ir.passes.InPlacePass] = [LayoutPass(), PackQkvPass(formats), SkipNormPass()]
    if form.attention == "portable":
        static = bool(job.graphs())
        passes.append(PlainAttentionPass(spec, rows, form.device.write, static, form.opset))
        passes.append(PlainNormPass(store, formats.floats, form.opset))
        passes.append(PlainGeluPass(form.opset))
    for step in (*passes, lower):
        step(model)
    yield from _finished(job, model)


def _finished(job: Job, model: ir.Model) -> Iterator[tuple[str, ir.Model]]:
    """The trunk as the graphs of its role."""
    spec, form = job.checkpoint.spec, job.form
    if form.attention == "gqa":
        finish(model, spec, VARIANTS["gqa"], job.chosen())
        yield GRAPH, model
    elif not job.graphs():
        finish_portable(model, spec, form.opset, job.chosen())
        yield GRAPH, model
    for static in job.graphs():
        own = model.clone()
        finish_portable(own, spec, form.opset, job.chosen(), job.kv_rows(), static)
        yield static.file, own


def _set_tables(model: ir.Model, tables: dict[str, torch.Tensor], store: WeightStore, floats: str) -> None:
    """The rotary tables are inputs of the trace and constants of the graph."""
    graph = model.graph
    for value in [v for v in graph.inputs if v.name in tables]:
        array = tables[value.name].numpy().astype(floats)  # type: ignore[index]
        graph.inputs.remove(value)
        constant = store.add(f"rotary.{value.name}", array)
        value.replace_all_uses_with(constant)
        graph.register_initializer(constant)
