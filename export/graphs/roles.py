"""The public inputs and outputs of a target's and a draft's graph, added to the traced trunk.

The trunk reads `ids`, `rows_to_keep` and the attention variant's own inputs. In a fused graph, nodes compute these
from `input_ids`, `attention_mask` and the role's other inputs; in a portable graph they are the public inputs
themselves (docs/architecture.md).
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

from .features import (
    LIKE_LOGITS,
    finish_target_features,
    make_overridable,
    repeat_for_masks,
    rows_of_features,
    shape_hidden_states,
)
from .tape import FEATURE_ROWS, HIDDEN_STATES, TARGET_FEATURES, Tape, constant, hand_over, register

if TYPE_CHECKING:
    from .attention import Variant  # imports torch, which requantizing does not need


def finish(model: ir.Model, spec: ModelSpec, variant: Variant, head_ids: Ids | None = None) -> None:
    """Rewrite a fused trunk in place into the graph of the spec's role. head_ids: the ids of the logits; None: all."""
    graph = model.graph
    trunk = {v.name: v for v in graph.inputs}
    tape = ir.tape.Tape(graph)
    features, to_keep = trunk.pop(TARGET_FEATURES, None), None
    assert variant.lengths is not None
    mask = _input("attention_mask", ["batch", "total_sequence"])
    if spec.pard is None:
        ids = _input("input_ids", ["batch", "sequence"])
        keep = _input("logits_to_keep", [1])
        keep.const_value = ir.tensor([0], name="logits_to_keep")
        inputs, appended, all_ids = [ids, mask], None, ids
    else:
        ids = _input("input_ids", ["batch", "sequence"])
        keep = _input("draft_length", [1])
        inputs = [ids, mask, keep]
        all_ids, appended = _append_masks(tape, ids, keep, spec.pard.mask_id)
    replaced = {"ids": all_ids, "rows_to_keep": keep, **variant.lengths(tape, mask, appended)}
    if FEATURE_ROWS in trunk:
        to_keep, replaced[FEATURE_ROWS] = rows_of_features(tape, keep)
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
        inputs.append(keep)
    graph.inputs.clear()
    graph.inputs.extend([*inputs[:2], *trunk.values(), *inputs[2:]])
    if to_keep is not None:
        make_overridable(graph, to_keep, np.array([LIKE_LOGITS]))
    if features is not None and appended is not None:
        repeat_for_masks(graph, inputs[0], appended)
        graph.inputs.append(features)
        finish_target_features(graph)
    shape_hidden_states(graph)
    _widen_logits(graph, spec.vocabulary.rows if head_ids is None else len(head_ids))
    if spec.pard is not None:
        _propose(graph, FUSED_OPSET, head_ids)
    _forget_inner_shapes(graph)


def finish_portable(
    model: ir.Model,
    spec: ModelSpec,
    opset: int,
    head_ids: Ids | None = None,
    rows: int | None = None,
    static: StaticGraph | None = None,
) -> None:
    """Rewrite a portable trunk in place into the graph of the spec's role.

    head_ids: see `finish`. rows: of the KV buffers, and static: the graph's width, for fixed shapes only.
    """
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
    if feature_rows := trunk.get(FEATURE_ROWS):
        graph.inputs.remove(feature_rows)
        if static is None:
            _choose_feature_rows(graph, feature_rows, keep)
        else:
            _keep_all(graph, feature_rows)
    finish_target_features(graph, static)
    shape_hidden_states(graph)
    _widen_logits(graph, spec.vocabulary.rows if head_ids is None else len(head_ids))
    if spec.pard is not None:
        _propose(graph, opset, head_ids)
    _forget_inner_shapes(graph)
    if static is not None and rows is not None:
        _fix_shapes(graph, rows, static)
        RemoveUnusedNodesPass()(model)


def _choose_feature_rows(graph: ir.Graph, rows: ir.Value, logits_to_keep: ir.Value) -> None:
    """Let `rows` be what the public inputs say."""
    tape = ir.tape.Tape(graph)
    to_keep, chosen = rows_of_features(tape, logits_to_keep)
    rows.replace_all_uses_with(chosen)
    nodes = list(tape.nodes)
    graph.remove(nodes)  # the tape appended them: they belong in front
    graph.insert_before(next(iter(graph)), nodes)
    make_overridable(graph, to_keep, np.array([LIKE_LOGITS]))


def _keep_all(graph: ir.Graph, keep: ir.Value) -> None:
    """Remove the slices that keep the last rows."""
    for negated in list(keep.consumers()):
        for cut in list(negated.outputs[0].consumers()):
            source = cut.inputs[0]
            assert source is not None
            if cut.outputs[0].is_graph_output():
                hand_over(graph, cut.outputs[0], source)
            else:
                cut.outputs[0].replace_all_uses_with(source)
            graph.remove(cut, safe=True)
        graph.remove(negated, safe=True)


def _fix_shapes(graph: ir.Graph, rows: int, static: StaticGraph) -> None:
    """Make every dimension of inputs and outputs a number; a graph without logits loses its role's outputs."""
    sizes = {"batch": 1, "rows": rows, "kept": static.width, "kept_features": static.width}
    if not static.logits:
        kept = ("present.", HIDDEN_STATES)
        graph.outputs[:] = [value for value in graph.outputs if str(value.name).startswith(kept)]
    for value in (*graph.inputs, *graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape([d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape])


def _input(name: str, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT64))


def _append_masks(tape: ir.tape.Tape, ids: ir.Value, length: ir.Value, mask_id: int) -> tuple[ir.Value, ir.Value]:
    """ids followed by K-1 masks, and K-1 as int64 [1]; the last real token gives the first of the K drafts."""
    one = tape.initializer(ir.tensor([1], name="masks.one"))
    token = tape.initializer(ir.tensor([[mask_id]], name="masks.id"))
    count = tape.op("Sub", [length, one])
    batch = tape.op("Shape", [ids], {"start": 0, "end": 1})
    masks = tape.op("Expand", [token, tape.op("Concat", [batch, count], {"axis": 0})])
    return tape.op("Concat", [ids, masks], {"axis": 1}), count


def _widen_logits(graph: ir.Graph, columns: int) -> None:
    """Make the public logits float32, whatever the type of activations."""
    logits = graph.outputs[0]
    if logits.dtype != ir.DataType.FLOAT:
        cast = ir.node("Cast", [logits], {"to": ir.DataType.FLOAT})
        logits.name, wide = "logits.narrow", cast.outputs[0]
        wide.name, wide.dtype = "logits", ir.DataType.FLOAT
        graph.append(cast)
        graph.outputs[0] = wide
    graph.outputs[0].shape = ir.Shape(["batch", "kept", columns])


def _propose(graph: ir.Graph, opset: int, head_ids: Ids | None) -> None:
    """Add draft_ids and their probabilities as the first outputs; greedy decoding reads no other output.

    head_ids: the id of each column of the logits; None: the columns are the ids.
    """
    tape, logits = Tape(opset), graph.outputs[0]
    ids = tape.op("ArgMax", logits, axis=-1, keepdims=0)
    if head_ids is not None:
        ids = tape.op("Gather", constant("propose.ids", head_ids), ids, axis=0)
    # The maximum of Softmax takes 1 % of a draft step, a quarter of the time of separate max, exp and sum
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
    """Remove inner shapes: the trace's dimension names are no longer right, and ONNX Runtime infers shapes itself."""
    outside = {id(v) for v in (*graph.inputs, *graph.outputs)}
    for node in graph:
        for value in node.outputs:
            if id(value) not in outside:
                value.shape = None


def vocabulary_bias(spec: ModelSpec) -> np.ndarray | None:
    """A vector for the logits: 0 for ids of the tokenizer, -inf for padding rows; None without padding rows."""
    if spec.vocabulary.rows == spec.vocabulary.size:
        return None
    bias = np.zeros(spec.vocabulary.rows, dtype=np.float32)
    bias[spec.vocabulary.size :] = -np.inf
    return bias
