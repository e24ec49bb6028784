"""What a target and a draft add to the traced trunk: their public inputs and outputs.

The trunk reads `ids`, `rows_to_keep` and the attention variant's lengths. Here these become graph
nodes over `input_ids`, `attention_mask` and what the role takes besides (docs/architecture.md).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pard_onnx.models.spec import ModelSpec

from .attention import Variant


def finish(model: ir.Model, spec: ModelSpec, variant: Variant) -> None:
    """Rewrite the trunk in place into the graph of the spec's role."""
    graph = model.graph
    trunk = {v.name: v for v in graph.inputs}
    tape = ir.tape.Tape(graph)
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
    _widen_logits(graph, spec)
    if spec.pard is not None:
        _propose(graph)
    _forget_inner_shapes(graph)


def _input(name: str, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT64))


def _append_masks(tape: ir.tape.Tape, ids: ir.Value, length: ir.Value, mask_id: int) -> tuple[ir.Value, ir.Value]:
    """ids with K-1 masks behind them, and K-1 as int64 [1]: the first draft comes from the last real token."""
    one = tape.initializer(ir.tensor([1], name="masks.one"))
    token = tape.initializer(ir.tensor([[mask_id]], name="masks.id"))
    count = tape.op("Sub", [length, one])
    batch = tape.op("Shape", [ids], {"start": 0, "end": 1})
    masks = tape.op("Expand", [token, tape.op("Concat", [batch, count], {"axis": 0})])
    return tape.op("Concat", [ids, masks], {"axis": 1}), count


def _widen_logits(graph: ir.Graph, spec: ModelSpec) -> None:
    """The public logits are float32 whatever the activations are."""
    logits = graph.outputs[0]
    if logits.dtype != ir.DataType.FLOAT:
        cast = ir.node("Cast", [logits], {"to": ir.DataType.FLOAT})
        logits.name, wide = "logits.narrow", cast.outputs[0]
        wide.name, wide.dtype = "logits", ir.DataType.FLOAT
        graph.append(cast)
        graph.outputs[0] = wide
    graph.outputs[0].shape = ir.Shape(["batch", "kept", spec.vocabulary.rows])


def _propose(graph: ir.Graph) -> None:
    """draft_ids and their probabilities, first among the outputs: greedy callers ask for no more."""
    tape = ir.tape.Tape(graph)
    logits = graph.outputs[0]
    ids = tape.op("ArgMax", [logits], {"axis": -1, "keepdims": 0})
    last = tape.initializer(ir.tensor([-1], name="propose.axis"))
    # The greatest of the softmax: 1 % of a draft step, a quarter of what max, exp and sum cost one by one.
    probabilities = tape.op("ReduceMax", [tape.op("Softmax", [logits], {"axis": -1}), last], {"keepdims": 0})
    for value, name, dtype in (
        (ids, "draft_ids", ir.DataType.INT64),
        (probabilities, "draft_probabilities", ir.DataType.FLOAT),
    ):
        value.name, value.dtype, value.shape = name, dtype, ir.Shape(["batch", "kept"])
    graph.outputs[0:0] = [ids, probabilities]


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
