"""What a target and a draft add to the traced trunk: their public inputs and outputs.

The trunk reads `ids`, `rows_to_keep` and the attention variant's own inputs. Here these become graph
nodes over `input_ids`, `attention_mask` and what the role takes besides, or for the portable variant
the public inputs themselves (docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from pard_onnx.models.devices import FUSED_OPSET
from pard_onnx.models.manifest import Ids, StaticGraph
from pard_onnx.models.spec import ModelSpec

from .tape import Tape, constant, register

if TYPE_CHECKING:
    from .attention import Variant  # with torch, which graphs that are finished do without


def finish(model: ir.Model, spec: ModelSpec, variant: Variant, chosen: Ids | None = None) -> None:
    """Rewrite the trunk in place into the graph of the spec's role; chosen: the ids of the logits, None for all."""
    graph = model.graph
    trunk = {v.name: v for v in graph.inputs}
    tape = ir.tape.Tape(graph)
    assert variant.lengths is not None
    mask = _input("attention_mask", ["batch", "total_sequence"])
    if spec.pard is None:
        ids = _input("input_ids", ["batch", "sequence"])
        keep = _input("logits_to_keep", [1])
        keep.const_value = ir.tensor([0], name="logits_to_keep")
        given, appended, all_ids = [ids, mask], None, ids
    else:
        ids = _input("input_ids", ["batch", "sequence"])
        keep = _input("draft_length", [1])
        given = [ids, mask, keep]
        all_ids, appended = _append_masks(tape, ids, keep, spec.pard.mask_id)
    replaced = {"ids": all_ids, "rows_to_keep": keep, **variant.lengths(tape, mask, appended)}
    prologue = list(tape.nodes)
    for name, value in replaced.items():
        trunk.pop(name).replace_all_uses_with(value)
    # The tape appended its nodes at the end: they belong in front.
    graph.remove(prologue)
    first = next(iter(graph))
    graph.insert_before(first, prologue)
    if spec.pard is None:
        # Overridable: an initializer that is a graph input too. Callers who do not know it get all rows.
        graph.initializers["logits_to_keep"] = keep
        given.append(keep)
    graph.inputs.clear()
    graph.inputs.extend([*given[:2], *trunk.values(), *given[2:]])
    _widen_logits(graph, spec.vocabulary.rows if chosen is None else len(chosen))
    if spec.pard is not None:
        _propose(graph, FUSED_OPSET, chosen)
    _forget_inner_shapes(graph)


def finish_portable(
    model: ir.Model,
    spec: ModelSpec,
    opset: int,
    chosen: Ids | None = None,
    rows: int | None = None,
    static: StaticGraph | None = None,
) -> None:
    """Rewrite a portable trunk in place into the graph of the spec's role; chosen: see `finish`; rows, static: of one
    with fixed shapes."""
    graph = model.graph
    trunk = {v.name: v for v in graph.inputs}
    step = ("batch", "sequence") if static is None else (1, static.width)
    for name, public, shape in (
        ("ids", "input_ids", step),
        ("attention_mask", "attention_mask", ("batch", "keys") if rows is None else (1, rows)),
        ("position_ids", "position_ids", step),
    ):
        trunk[name].name, trunk[name].shape = public, ir.Shape(shape)
    keep = trunk["rows_to_keep"]
    graph.inputs.remove(keep)
    if static is None:
        keep.name, keep.const_value = "logits_to_keep", ir.tensor([0], name="logits_to_keep")
        graph.initializers["logits_to_keep"] = keep
        graph.inputs.append(keep)
    else:
        _keep_all(graph, keep)
    _widen_logits(graph, spec.vocabulary.rows if chosen is None else len(chosen))
    if spec.pard is not None:
        _propose(graph, opset, chosen)
    _forget_inner_shapes(graph)
    if static is not None and rows is not None:
        _fix_shapes(graph, rows, static)
        RemoveUnusedNodesPass()(model)


def _keep_all(graph: ir.Graph, keep: ir.Value) -> None:
    """Without the slice that keeps the last rows."""
    (negated,) = keep.consumers()
    (cut,) = negated.outputs[0].consumers()
    source = cut.inputs[0]
    assert source is not None
    cut.outputs[0].replace_all_uses_with(source)
    graph.remove([cut, negated], safe=True)


def _fix_shapes(graph: ir.Graph, rows: int, static: StaticGraph) -> None:
    """Every dimension of inputs and outputs a number; a graph without logits has none of its role's outputs."""
    sizes = {"batch": 1, "rows": rows, "kept": static.width}
    if not static.logits:
        graph.outputs[:] = [value for value in graph.outputs if str(value.name).startswith("present.")]
    for value in (*graph.inputs, *graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape([d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape])


def _input(name: str, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT64))


def _append_masks(tape: ir.tape.Tape, ids: ir.Value, length: ir.Value, mask_id: int) -> tuple[ir.Value, ir.Value]:
    """ids with K-1 masks behind them, and K-1 as int64 [1]: the first draft comes from the last real token."""
    one = tape.initializer(ir.tensor([1], name="masks.one"))
    token = tape.initializer(ir.tensor([[mask_id]], name="masks.id"))
    count = tape.op("Sub", [length, one])
    batch = tape.op("Shape", [ids], {"start": 0, "end": 1})
    masks = tape.op("Expand", [token, tape.op("Concat", [batch, count], {"axis": 0})])
    return tape.op("Concat", [ids, masks], {"axis": 1}), count


def _widen_logits(graph: ir.Graph, columns: int) -> None:
    """The public logits are float32 whatever the activations are."""
    logits = graph.outputs[0]
    if logits.dtype != ir.DataType.FLOAT:
        cast = ir.node("Cast", [logits], {"to": ir.DataType.FLOAT})
        logits.name, wide = "logits.narrow", cast.outputs[0]
        wide.name, wide.dtype = "logits", ir.DataType.FLOAT
        graph.append(cast)
        graph.outputs[0] = wide
    graph.outputs[0].shape = ir.Shape(["batch", "kept", columns])


def _propose(graph: ir.Graph, opset: int, chosen: Ids | None) -> None:
    """draft_ids and their probabilities, first among the outputs: greedy callers ask for no more.

    chosen: the id of each column of the logits, None where the columns are the ids.
    """
    tape, logits = Tape(opset), graph.outputs[0]
    ids = tape.op("ArgMax", logits, axis=-1, keepdims=0)
    if chosen is not None:
        ids = tape.op("Gather", constant("propose.ids", chosen), ids, axis=0)
    # The greatest of the softmax: 1 % of a draft step, a quarter of what max, exp and sum cost one by one.
    greatest = tape.reduce("ReduceMax", tape.op("Softmax", logits, axis=-1), keepdims=0)
    graph.extend(tape.nodes)
    register(graph)
    for value, name, dtype in (
        (ids, "draft_ids", ir.DataType.INT64),
        (greatest, "draft_probabilities", ir.DataType.FLOAT),
    ):
        value.name, value.dtype, value.shape = name, dtype, ir.Shape(["batch", "kept"])
    graph.outputs[0:0] = [ids, greatest]


def _forget_inner_shapes(graph: ir.Graph) -> None:
    """The trace's dimension names no longer hold inside; ONNX Runtime infers its own."""
    outside = {id(v) for v in (*graph.inputs, *graph.outputs)}
    for node in graph:
        for value in node.outputs:
            if id(value) not in outside:
                value.shape = None


def vocabulary_bias(spec: ModelSpec) -> np.ndarray | None:
    """Added to the logits: 0 for ids the tokenizer has, -inf for padding rows; None if there are none."""
    if spec.vocabulary.rows == spec.vocabulary.size:
        return None
    bias = np.zeros(spec.vocabulary.rows, dtype=np.float32)
    bias[spec.vocabulary.size :] = -np.inf
    return bias
