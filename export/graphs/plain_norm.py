"""Pass: `pard.Norm` and `pard.SkipNorm` written out in plain ONNX operators, in float32 whatever the activations are.

In the form that ONNX Runtime's providers recognize and fuse where they have a kernel for it.
"""

from __future__ import annotations

from dataclasses import dataclass

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
