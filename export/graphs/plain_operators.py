"""Passes: norms and Gelu of portable graphs, written in plain ONNX operators.

`pard.Norm` and `pard.SkipNorm` are computed in float32 whatever the activations are, in the form that ONNX Runtime's
providers recognize and fuse where they have a kernel for it.

ONNX has Gelu from opset 20 on. Its tanh approximation x / 2 * (1 + tanh(u)) is x * sigmoid(2 u), with
u = sqrt(2 / pi) * (x + 0.044715 x^3). Where x^3 is beyond float16 the sigmoid is 0 or 1, as it should be. The exact
Gelu stays: no family has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi, sqrt

import numpy as np
import onnx_ir as ir

from pard_onnx.export.store import WeightStore

from .tape import DOMAIN, Tape, register, substitute

FLOAT = ir.DataType.FLOAT


@dataclass
class PlainNormPass(ir.passes.InPlacePass):
    """Every norm becomes plain operators, with its weight as a constant of the graph."""

    store: WeightStore  # which reads the norms' weights
    floats: np.dtype[np.generic]  # of activations
    opset: int

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        nodes = [n for n in graph if n.domain == DOMAIN and n.op_type in ("Norm", "SkipNorm")]
        constants: dict[str, ir.Value] = {}
        for node in nodes:
            tape = Tape(self.opset, constants)
            total = tape.op("Add", *node.inputs) if node.op_type == "SkipNorm" else node.inputs[0]
            assert total is not None
            outputs = [self._norm(tape, node, total), total][: len(node.outputs)]  # the sum is a SkipNorm's
            substitute(graph, node, tape.nodes, outputs)
        register(graph)
        return ir.passes.PassResult(model, bool(nodes))

    def _norm(self, t: Tape, node: ir.Node, x: ir.Value | None) -> ir.Value:
        """x / sqrt(mean(x * x) + epsilon) * weight."""
        name = f"{node.attributes['name'].as_string()}.weight"
        weight = t.constant(name, self.store.norm(name, self.floats))
        epsilon = t.constant("epsilon", np.array(node.attributes["epsilon"].as_float(), np.float32))
        wide = x if self.floats == np.float32 else t.op("Cast", x, to=FLOAT)
        square = t.op("Pow", wide, t.constant("two", np.array(2, np.float32)))
        mean = t.op("Add", t.reduce("ReduceMean", square), epsilon)
        norm = t.op("Div", wide, t.op("Sqrt", mean))
        if wide is not x:
            norm = t.op("Cast", norm, to=ir.DataType.from_numpy(self.floats))
        return t.op("Mul", norm, weight)


CUBIC = 0.044715


@dataclass
class PlainGeluPass(ir.passes.InPlacePass):
    """Every Gelu in its tanh approximation becomes plain operators."""

    opset: int

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        nodes = [node for node in graph if node.op_type == "Gelu" and not node.domain and _by_tanh(node)]
        constants: dict[str, ir.Value] = {}
        for node in nodes:
            tape = Tape(self.opset, constants)
            output = _gelu(tape, node.inputs[0])
            substitute(graph, node, tape.nodes, [output])
        register(graph)
        return ir.passes.PassResult(model, bool(nodes))


def _by_tanh(node: ir.Node) -> bool:
    return "approximate" in node.attributes and node.attributes["approximate"].as_string() == "tanh"


def _gelu(t: Tape, x: ir.Value | None) -> ir.Value:
    assert x is not None and x.dtype is not None
    linear, cubic = 2 * sqrt(2 / pi), 2 * sqrt(2 / pi) * CUBIC
    parts = (t.constant(f"gelu.{n}", np.array(v, x.dtype.numpy())) for n, v in (("linear", linear), ("cubic", cubic)))
    first, third = parts
    steepness = t.op("Add", t.op("Mul", t.op("Mul", x, x), third), first)  # 2 u / x
    return t.op("Mul", x, t.op("Sigmoid", t.op("Mul", x, steepness)))
