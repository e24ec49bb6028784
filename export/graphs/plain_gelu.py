"""Pass: Gelu, which ONNX has from opset 20 on, written out for portable graphs.

Its tanh approximation x / 2 * (1 + tanh(u)) is x * sigmoid(2 u), with u = sqrt(2 / pi) * (x + 0.044715 x^3). Where x^3
is beyond float16 the sigmoid is 0 or 1, as it should be. The exact Gelu is left alone: no family has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi, sqrt

import numpy as np
import onnx_ir as ir

from .tape import Tape, register, substitute

CUBIC = 0.044715


@dataclass
class PlainGeluPass(ir.passes.InPlacePass):
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
