"""Pass: remove the view chatter that tracing leaves around attention.

1. A Transpose of a Transpose that undoes it is its input.
2. A Reshape of a Reshape reads the first one's input.
3. A Reshape to its input's own (symbolic) shape is its input.
4. A Reshape whose leading dimensions stay takes a constant shape: 0 copies a dimension, -1 infers one.
5. An Identity (torch's copies) is its input.
6. A Transpose of a norm of a Transpose that undoes it is the norm alone: it works on the last axis, which stays.

What then has no reader (shape arithmetic, mostly) goes with RemoveUnusedNodesPass.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


class LayoutPass(ir.passes.InPlacePass):
    """Numbers refer to the cases above."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        rules = {"Transpose": _transposes, "Reshape": _reshapes, "Identity": _identities}
        modified = False
        for node in model.graph:
            rule = rules.get(node.op_type)
            modified |= rule is not None and rule(model.graph, node)
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _bypass(node: ir.Node, value: ir.Value) -> bool:
    """Let the readers of the node's output read `value`; a graph output keeps its name."""
    node.outputs[0].replace_all_uses_with(value)
    return True


def _transposes(graph: ir.Graph, node: ir.Node) -> bool:
    norm = _producer(node.inputs[0], "Norm")
    before = _producer(node.inputs[0] if norm is None else norm.inputs[0], "Transpose")
    if before is None:
        return False
    first, second = (n.attributes["perm"].as_ints() for n in (before, node))
    if [first[i] for i in second] != list(range(len(first))):
        return False
    source = before.inputs[0]
    if norm is None or source is None:
        return source is not None and _bypass(node, source)  # 1
    if first[-1] != len(first) - 1:
        return False
    moved = ir.node("Norm", [source], dict(norm.attributes), domain=norm.domain)
    moved.outputs[0].type, moved.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    graph.insert_before(node, moved)
    return _bypass(node, moved.outputs[0])  # 6


def _identities(graph: ir.Graph, node: ir.Node) -> bool:
    source = node.inputs[0]
    return source is not None and not node.outputs[0].is_graph_output() and _bypass(node, source)  # 5


def _reshapes(graph: ir.Graph, node: ir.Node) -> bool:
    before = _producer(node.inputs[0], "Reshape")
    if before is not None:
        node.replace_input_with(0, before.inputs[0])  # 2
    source, out = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or out.shape is None:
        return before is not None
    if source.shape == out.shape:
        return _bypass(node, source)  # 3
    shape = _constant_shape(source.shape, out.shape)
    if shape is None:
        return before is not None
    constant = ir.node("Constant", [], {"value_ints": shape})
    graph.insert_before(node, constant)
    node.replace_input_with(1, constant.outputs[0])
    node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
    return True  # 4


def _constant_shape(source: ir.Shape, out: ir.Shape) -> list[int] | None:
    kept = 0
    while kept < min(len(source), len(out)) and source[kept] == out[kept]:
        kept += 1
    rest = [d if isinstance(d, int) else -1 for d in out[kept:]]
    return [0] * kept + rest if rest.count(-1) <= 1 else None
