"""Building blocks of graphs: domains of operators, nodes of a chosen opset, and small constants that nodes share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pard_onnx.models.devices import Device
from pard_onnx.models.errors import Failure

MICROSOFT = "com.microsoft"
DOMAIN = "pard"  # of abstract operators
FEATURE_ROWS, HIDDEN_STATES = "feature_rows", "hidden_states"  # of a target: an input of its trunk, an output
TARGET_FEATURES = "target_features"  # the input of a draft
ROTARY = "rotary."  # the prefix of the rotary tables' names
AXES_ARE_INPUTS = 18  # of reductions, from this opset on


class Tape:
    """Collects nodes. `constants` are made once by name, however many tapes of a graph share them."""

    def __init__(self, opset: int, constants: dict[str, ir.Value] | None = None) -> None:
        self.constants: dict[str, ir.Value] = {} if constants is None else constants
        self._opset = opset
        self._tape = ir.tape.Tape()

    @property
    def nodes(self) -> list[ir.Node]:
        return list(self._tape.nodes)

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: int | float | Sequence[int]) -> ir.Value:
        return self._tape.op(kind, inputs, attributes)

    def split(self, x: ir.Value | None, *sizes: int) -> Sequence[ir.Value]:
        """Parts of the last axis."""
        return self._tape.op_multi_out("Split", [x, self.ints(*sizes)], {"axis": -1}, num_outputs=len(sizes))

    def reduce(self, kind: str, x: ir.Value | None, *, keepdims: int = 1) -> ir.Value:
        """ReduceMean, ReduceMax over the last axis."""
        if self._opset < AXES_ARE_INPUTS:
            return self.op(kind, x, axes=[-1], keepdims=keepdims)
        return self.op(kind, x, self.ints(-1), keepdims=keepdims)

    def ints(self, *values: int) -> ir.Value:
        return self.constant("ints." + "_".join(map(str, values)), np.array(values, np.int64))

    def constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        name = f"plain.{name}"
        if name not in self.constants:
            self.constants[name] = constant(name, array)
        return self.constants[name]


def constant(name: str, array: NDArray[np.generic]) -> ir.Value:
    """A value of that name, small enough to live in the graph."""
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def substitute(graph: ir.Graph, node: ir.Node, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> None:
    """Put `nodes` in the place of one node, and `outputs` in that of its own."""
    for old, new in zip(node.outputs, outputs, strict=True):
        hand_over(graph, old, new)
    graph.insert_before(node, nodes)
    graph.remove(node, safe=True)


def register(graph: ir.Graph) -> None:
    """Make what nodes read as constants initializers of the graph; equal names are one constant."""
    for node in graph:
        for index, value in enumerate(node.inputs):
            if value is None or value.const_value is None:
                continue
            known = graph.initializers.get(str(value.name))
            if known is None:
                graph.register_initializer(value)
            elif known is not value:
                node.replace_input_with(index, known)


def hand_over(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let `new` stand wherever `old` stood, as an output of the graph too."""
    new.type = old.type
    if old.is_graph_output():
        new.name, new.shape, old.name = old.name, old.shape, None
        graph.outputs[graph.outputs.index(old)] = new
    old.replace_all_uses_with(new)


def operators(model: ir.Model) -> frozenset[str]:
    """The types of a graph's operators, with the domain in front where it is not ONNX's own."""
    return frozenset(f"{node.domain}.{node.op_type}".lstrip(".") for node in model.graph)


def require_operators(model: ir.Model, device: Device) -> None:
    """Failure, by name, if the graph has an operator that is not on the device's list: a bug of this package."""
    strange = sorted(operators(model) - device.operators)
    if strange:
        raise Failure(
            f"the graph has the operator {strange[0]}, which {device.name} is not known to run; please report this "
            "model (--device cpu exports it all the same)"
        )
