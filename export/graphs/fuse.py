"""Passes over the abstract graph: one matmul for QKV, residual sums inside the norms."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import onnx_ir as ir

from pard_onnx.quantize.packing.prepared import Formats

from .tape import DOMAIN

QKV = ("q_proj", "k_proj", "v_proj")


@dataclass
class PackQkvPass(ir.passes.InPlacePass):
    """Three Linears that read the same value become one, its rows in the order q, k, v.

    1. If attention reads all three directly, it takes the packed value.
    2. Otherwise (norms on q and k stand between) a Split hands the parts on.
    Left alone where the three have different formats, or read the value's columns in different orders.
    """

    formats: Formats

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        groups: defaultdict[ir.Value, dict[str, ir.Node]] = defaultdict(dict)
        for node in model.graph:
            if node.domain == DOMAIN and node.op_type == "Linear" and node.inputs[0] is not None:
                groups[node.inputs[0]][node.attributes["name"].as_string().rsplit(".", 1)[-1]] = node
        packed = [_pack(model.graph, [g[k] for k in QKV], self.formats) for g in groups.values() if set(QKV) <= set(g)]
        return ir.passes.PassResult(model, any(packed))


def _pack(graph: ir.Graph, nodes: list[ir.Node], formats: Formats) -> bool:
    names = [n.attributes["name"].as_string() for n in nodes]
    if not formats.joinable(names):
        return False
    widths = [n.attributes["out"].as_int() for n in nodes]
    bias = nodes[0].attributes["bias"].as_int()
    linear = ir.node("Linear", [nodes[0].inputs[0]], {"names": names, "out": sum(widths), "bias": bias}, domain=DOMAIN)
    packed = linear.outputs[0]
    packed.type = nodes[0].outputs[0].type
    first = min(nodes, key=list(graph).index)
    graph.insert_before(first, linear)
    readers = [n.outputs[0].consumers() for n in nodes]
    attention = readers[1][0]  # of keys, which are stored in any case
    if all(len(r) == 1 and r[0] is attention for r in readers) and attention.op_type == "GroupQueryAttention":
        attention.replace_input_with(0, packed)  # 1
        attention.replace_input_with(1, None)
        attention.replace_input_with(2, None)
    else:
        split = ir.node("Split", [packed, _ints(graph, linear, widths)], {"axis": -1}, num_outputs=3)  # 2
        graph.insert_after(linear, split)
        for node, part in zip(nodes, split.outputs, strict=True):
            part.type = node.outputs[0].type
            node.outputs[0].replace_all_uses_with(part)
    graph.remove(nodes, safe=True)
    return True


def _ints(graph: ir.Graph, before: ir.Node, values: list[int]) -> ir.Value:
    constant = ir.node("Constant", [], {"value_ints": values})
    graph.insert_before(before, constant)
    return constant.outputs[0]


class SkipNormPass(ir.passes.InPlacePass):
    """Add followed by Norm becomes one operator with two outputs, the norm and the sum.

    Left alone where the two summands have not the same shape, which the operator asks for. A norm that comes before a
    sum (Gemma's, of what attention and MLP give) is no such pair, and stays.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            add = node.inputs[0].producer() if node.op_type == "Norm" and node.inputs[0] is not None else None
            if node.domain != DOMAIN or add is None or add.op_type != "Add" or not _alike(add):
                continue
            fused = ir.node("SkipNorm", add.inputs, dict(node.attributes), domain=DOMAIN, num_outputs=2)
            for old, new in zip((node.outputs[0], add.outputs[0]), fused.outputs, strict=True):
                new.type, new.shape = old.type, old.shape
            model.graph.insert_before(add, fused)
            node.outputs[0].replace_all_uses_with(fused.outputs[0])
            add.outputs[0].replace_all_uses_with(fused.outputs[1])
            model.graph.remove([node, add], safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def _alike(add: ir.Node) -> bool:
    """Whether it sums two tensors of one shape, none of them a constant."""
    one, other = add.inputs
    known = one is not None and other is not None and one.shape is not None and one.shape == other.shape
    return known and not any(value is not None and value.is_initializer() for value in add.inputs)
