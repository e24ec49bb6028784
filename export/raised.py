"""A float export's graphs once more, with their weights in other formats: no trace, and nothing else changes.

A pass makes abstract operators of what the weights were lowered to:

1. MatMul by a stored matrix, and the sum with its bias: `pard.Linear`; of q, k and v in one, three of them.
2. MatMul by the embedding transposed: the tied head.
3. Gather of the embedding's rows: `pard.Embedding`.

Norms' weights are read anew, since AWQ scales them, and rotary tables move into the new data file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from pard_onnx.models.families import shapes
from pard_onnx.quantize.prepared import EMBEDDING, HEAD

from .exported import FloatExport, is_norm, tensor_names
from .fuse import PackQkvPass
from .lower import PADDING, LowerPass
from .operators import DOMAIN
from .store import WeightStore
from .tape import hand_over, substitute


def raised(exported: FloatExport, lower: LowerPass) -> Iterator[tuple[str, ir.Model]]:
    """The export's graphs by the names of their files; `lower` stores their weights."""
    raise_ = RaisePass(dict(shapes(exported.checkpoint.spec)), lower.store)
    for name, model in exported.graphs():
        for step in (raise_, PackQkvPass(lower.formats), lower, RemoveUnusedNodesPass()):
            step(model)
        yield name, model


@dataclass
class RaisePass(ir.passes.InPlacePass):
    """Numbers refer to the cases above. shapes: of the checkpoint's tensors, by name."""

    shapes: Mapping[str, tuple[int, ...]]
    store: WeightStore
    _moved: dict[str, ir.TensorProtocol | None] = field(default_factory=dict)  # tables that several graphs share

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        for value in list(graph.initializers.values()):
            self._constant(value)
        for node in list(graph):
            if node.op_type == "MatMul":
                self._linear(graph, node)
            elif node.op_type == "Gather" and self._names(node.inputs[0]) == [EMBEDDING]:
                self._embedding(graph, node)  # 3
        # Nodes that nobody reads are left for now: without a prefill graph's last q, its k and v would not be packed
        unread = [name for name, value in graph.initializers.items() if not (value.uses() or value.is_graph_input())]
        for name in unread:
            del graph.initializers[name]
        return ir.passes.PassResult(model, modified=True)

    def _names(self, value: ir.Value | None) -> list[str]:
        """The weights that a constant has, without `.weight`; none of what is no matrix."""
        if value is None or not value.is_initializer():
            return []
        names = tensor_names(str(value.name))
        known = all(len(self.shapes.get(name, ())) == 2 for name in names)
        return [name.removesuffix(".weight") for name in names] if known else []

    def _constant(self, value: ir.Value) -> None:
        name, (first, *others) = str(value.name), tensor_names(str(value.name))
        if len(self.shapes.get(first, ())) == 1 and not others and value.dtype is not None:
            floats = value.dtype.numpy()
            norm = is_norm([first], self.shapes)
            vector = self.store.norm(first, floats) if norm else self.store.vectors((first,), floats)
            value.const_value = ir.tensor(vector, name=name)
        elif first not in self.shapes and isinstance(value.const_value, ir.ExternalTensor):
            if name not in self._moved:
                self._moved[name] = self.store.add(name, value.const_value.numpy()).const_value
            value.const_value = self._moved[name]

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
        biased &= name != HEAD  # what is added to the logits is no weight
        linear = ir.node("Linear", [node.inputs[0]], {"name": name, "out": rows, "bias": int(biased)}, domain=DOMAIN)
        linear.outputs[0].type = node.outputs[0].type
        return linear

    def _embedding(self, graph: ir.Graph, node: ir.Node) -> None:
        hidden = self.shapes[f"{EMBEDDING}.weight"][1]
        found = ir.node("Embedding", [node.inputs[1]], {"name": EMBEDDING, "hidden": hidden}, domain=DOMAIN)
        substitute(graph, node, [found], found.outputs)


def _bias_of(node: ir.Node) -> ir.Node | None:
    """The sum of a product with its bias, or of logits with what keeps padding ids out."""
    for reader in node.outputs[0].consumers():
        constants = [value for value in reader.inputs if value is not None and value.is_initializer()]
        if reader.op_type == "Add" and constants:
            name = str(constants[0].name)
            return reader if name == PADDING or name.endswith(".bias") else None
    return None


def _spread(graph: ir.Graph, packed: ir.Value, linears: list[ir.Node]) -> None:
    """q, k and v to who reads them in one: attention, or a Split."""
    (reader,) = packed.consumers()
    parts = [linear.outputs[0] for linear in linears]
    if reader.op_type != "Split":
        for index, part in enumerate(parts):
            reader.replace_input_with(index, part)
        return
    for old, new in zip(reader.outputs, parts, strict=True):
        old.replace_all_uses_with(new)
    graph.remove(reader, safe=True)
