"""A float export's graphs made abstract again, so that their weights can be lowered to other formats without a trace.

`AbstractPass` puts abstract operators in the place of the operators that the weights were lowered to:

1. MatMul by a stored matrix, with the Add of its bias, becomes `pard.Linear`; one MatMul by q, k and v becomes three.
2. MatMul by the transposed embedding becomes the `pard.Linear` of the tied head.
3. Gather of the embedding's rows becomes `pard.Embedding`.

All other nodes stay as they are. `ConstantsPass` brings the constants of a graph up to date before it is lowered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from pard_onnx.export.float_export import FloatExport, is_norm, tensor_names
from pard_onnx.export.store import WeightStore
from pard_onnx.models.families import shapes
from pard_onnx.quantize.packing.prepared import EMBEDDING, HEAD, Formats

from .fuse import PackQkvPass
from .lower import PADDING
from .tape import DOMAIN, ROTARY, hand_over, substitute


def abstract_graphs(float_export: FloatExport, formats: Formats) -> list[ir.Model]:
    """The export's graphs in the order of its files, with abstract operators packed as `formats` allow."""
    models = float_export.graphs()
    for model in models:
        AbstractPass(dict(shapes(float_export.checkpoint.spec)))(model)
        PackQkvPass(formats)(model)
    return models


@dataclass
class ConstantsPass(ir.passes.InPlacePass):
    """Constants that a graph has before its abstract operators are lowered.

    1. Norm weights of a float export are read again, since AWQ scales them.
    2. Rotary tables move into the data file, once for all graphs.
    """

    store: WeightStore
    _stored: dict[str, ir.TensorProtocol | None] = field(default_factory=dict)  # tables by name

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        known = dict(shapes(self.store.checkpoint.spec))
        for name, value in model.graph.initializers.items():
            first, *others = tensor_names(name)
            if len(known.get(first, ())) == 1 and not others and value.dtype is not None:
                floats = value.dtype.numpy()
                read = (
                    self.store.norm(first, floats) if is_norm([first], known) else self.store.vectors((first,), floats)
                )
                value.const_value = ir.tensor(read, name=name)  # 1
            elif value.const_value is not None and name.startswith(ROTARY):
                if name not in self._stored:
                    self._stored[name] = self.store.add(name, value.const_value.numpy()).const_value
                value.const_value = self._stored[name]  # 2
        return ir.passes.PassResult(model, modified=True)


@dataclass
class AbstractPass(ir.passes.InPlacePass):
    """Numbers refer to the cases of the module docstring. shapes: of the checkpoint's tensors, by name."""

    shapes: Mapping[str, tuple[int, ...]]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        for node in list(graph):
            if node.op_type == "MatMul":
                self._linear(graph, node)
            elif node.op_type == "Gather" and self._names(node.inputs[0]) == [EMBEDDING]:
                self._embedding(graph, node)  # 3
        # Nodes without readers stay until the graph is lowered: PackQkvPass needs the last q of a prefill graph too
        unread = [name for name, value in graph.initializers.items() if not (value.uses() or value.is_graph_input())]
        for name in unread:
            del graph.initializers[name]
        return ir.passes.PassResult(model, modified=True)

    def _names(self, value: ir.Value | None) -> list[str]:
        """The names of the matrices in a constant, without `.weight`; empty if it holds no matrices."""
        if value is None or not value.is_initializer():
            return []
        names = tensor_names(str(value.name))
        known = all(len(self.shapes.get(name, ())) == 2 for name in names)
        return [name.removesuffix(".weight") for name in names] if known else []

    def _linear(self, graph: ir.Graph, node: ir.Node) -> None:
        weight = node.inputs[1]
        turned = weight.producer() if weight is not None else None
        names = self._names(weight)
        if turned is not None and self._names(turned.inputs[0]) == [EMBEDDING]:
            names = [HEAD]  # 2
        if not names:
            return
        add = _bias_of(node)
        last = add or node
        linears = [self._abstract(node, name, add is not None) for name in names]
        graph.insert_before(node, linears)
        if len(linears) == 1:
            hand_over(graph, last.outputs[0], linears[0].outputs[0])
        else:
            _spread(graph, last.outputs[0], linears)
        done = [last, node] if add else [node]
        graph.remove([*done, turned] if turned and names == [HEAD] else done, safe=True)

    def _abstract(self, node: ir.Node, name: str, biased: bool) -> ir.Node:
        rows = self.shapes.get(f"{name}.weight", self.shapes[f"{EMBEDDING}.weight"])[0]
        biased &= name != HEAD  # the vector added to the logits (PADDING) is not a weight
        linear = ir.node("Linear", [node.inputs[0]], {"name": name, "out": rows, "bias": int(biased)}, domain=DOMAIN)
        linear.outputs[0].type = node.outputs[0].type
        return linear

    def _embedding(self, graph: ir.Graph, node: ir.Node) -> None:
        hidden = self.shapes[f"{EMBEDDING}.weight"][1]
        found = ir.node("Embedding", [node.inputs[1]], {"name": EMBEDDING, "hidden": hidden}, domain=DOMAIN)
        substitute(graph, node, [found], found.outputs)


def _bias_of(node: ir.Node) -> ir.Node | None:
    """The Add of a product and its bias, or of the logits and the vector that excludes padding ids."""
    for reader in node.outputs[0].consumers():
        constants = [value for value in reader.inputs if value is not None and value.is_initializer()]
        if reader.op_type == "Add" and constants:
            name = str(constants[0].name)
            return reader if name == PADDING or name.endswith(".bias") else None
    return None


def _spread(graph: ir.Graph, packed: ir.Value, linears: list[ir.Node]) -> None:
    """Give q, k and v to the reader of the packed product: attention, or a Split, which then goes."""
    (reader,) = packed.consumers()
    parts = [linear.outputs[0] for linear in linears]
    if reader.op_type != "Split":
        for index, part in enumerate(parts):
            reader.replace_input_with(index, part)
        return
    for old, new in zip(reader.outputs, parts, strict=True):
        old.replace_all_uses_with(new)
    graph.remove(reader, safe=True)
