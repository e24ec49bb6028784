"""Pass: abstract operators become ONNX operators, each Linear in its recipe's format.

One function a format (LINEARS, EMBEDDINGS); weights come from the store, which packs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pard_onnx.export.store import Matrix, RowSelection, WeightStore
from pard_onnx.models.precision import Format
from pard_onnx.models.spec import PROJECTION
from pard_onnx.quantize.packing.prepared import EMBEDDING, HEAD, Formats

from .qdq import QdqPairs
from .tape import DOMAIN, MICROSOFT, constant, register, substitute

PADDING = "lm_head.padding"  # added to the logits


@dataclass(frozen=True, slots=True)
class Linear:
    """The product of x and the matrices `names`, one above the other."""

    x: ir.Value | None
    names: tuple[str, ...]
    format: Format
    bias: ir.Value | None
    shared: bool  # the matrix is the embedding as well
    name: str  # of the product, by which its activations' scales are found
    selection: RowSelection | None = None  # the rows that are multiplied; None: all
    pairs: QdqPairs | None = None  # of formats whose activations are rounded


@dataclass
class LowerPass(ir.passes.InPlacePass):
    """Every node of the domain `pard` is replaced by nodes of ONNX operators."""

    formats: Formats
    store: WeightStore
    head_bias: NDArray[np.float32] | None  # added to the logits, [vocabulary rows]
    head_rows: NDArray[np.int64] | None = None  # the ids that the head gives logits of, rising; None: all
    pairs: QdqPairs | None = None  # of a recipe with calibrated activations
    _gathered: dict[tuple[ir.Value, bytes], ir.Value] = field(default_factory=dict)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        nodes = [n for n in graph if n.domain == DOMAIN]
        for node in nodes:
            tape = ir.tape.Tape()
            outputs = _RULES[node.op_type](self, tape, node)
            substitute(graph, node, tape.nodes, outputs)
        register(graph)
        model.opset_imports.pop(DOMAIN, None)
        return ir.passes.PassResult(model, bool(nodes))

    @property
    def floats(self) -> np.dtype[np.generic]:
        return self.formats.floats

    def norm_weight(self, node: ir.Node) -> ir.Value:
        name = f"{node.attributes['name'].as_string()}.weight"
        return constant(name, self.store.norm(name, self.floats))

    def linear(self, tape: ir.tape.Tape, node: ir.Node) -> list[ir.Value]:
        attributes = node.attributes
        names = tuple(attributes["names"].as_strings() if "names" in attributes else [attributes["name"].as_string()])
        bias = None
        if attributes["bias"].as_int():
            parts = tuple(f"{n}.bias" for n in names)
            bias = constant("+".join(parts), self.store.vectors(parts, self.floats))
        is_head = names == (HEAD,)
        selection = RowSelection(HEAD, self.head_rows) if is_head and self.head_rows is not None else None
        tied = is_head and self.formats.tied
        if is_head and self.head_bias is not None:
            bias = constant(PADDING, self.head_bias.astype(self.floats))
        fmt = self.formats.of(names[0])
        x = self.ordered(tape, node.inputs[0], names[0])
        # A head of some rows is stored as a copy, since the embedding keeps all rows
        shared, stored = tied and selection is None, (EMBEDDING,) if tied else names
        job = Linear(x, stored, fmt, bias, shared, names[0], selection, self.pairs)
        return [LINEARS[fmt.kind](self.store, tape, job)]

    def ordered(self, tape: ir.tape.Tape, x: ir.Value | None, name: str) -> ir.Value | None:
        """x with its columns in the order of the matrix `name`; matrices of the same order share the result."""
        order = self.formats.order(name)
        if order is None or x is None:
            return x
        key = (x, order.tobytes())
        if key not in self._gathered:
            self._gathered[key] = tape.op("Gather", [x, constant(f"{name}.order", order)], {"axis": -1})
        return self._gathered[key]

    def embedding(self, tape: ir.tape.Tape, node: ir.Node) -> list[ir.Value]:
        name = node.attributes["name"].as_string()
        fmt = self.formats.of(name)
        rows = EMBEDDINGS[fmt.kind](self.store, tape, node.inputs[0], self.store.matrix((name,), fmt))
        scale = node.attributes["scale"].as_float() if "scale" in node.attributes else 1.0
        if scale != 1:
            rows = tape.op("Mul", [rows, constant(f"{name}.factor", np.array(scale, self.floats))])
        return [rows]

    def projection(self, tape: ir.tape.Tape, node: ir.Node) -> list[ir.Value]:
        """scale * (W x + b): a bias is multiplied by x's last column, so that x = 0 adds nothing."""
        attributes, x = node.attributes, node.inputs[0]
        flag = None
        if attributes["bias"].as_int():
            widths = constant(f"{PROJECTION}.widths", np.array([attributes["width"].as_int(), 1]))
            x, flag = tape.op_multi_out("Split", [x, widths], {"axis": -1}, num_outputs=2)
        fmt = self.formats.of(PROJECTION)
        product = LINEARS[fmt.kind](self.store, tape, Linear(x, (PROJECTION,), fmt, None, False, PROJECTION))
        if flag is not None:
            bias = constant(f"{PROJECTION}.bias", self.store.vectors((f"{PROJECTION}.bias",), self.floats))
            product = tape.op("Add", [product, tape.op("Mul", [flag, bias])])
        scale = constant(f"{PROJECTION}.factor", np.array(attributes["scale"].as_float(), self.floats))
        return [tape.op("Mul", [product, scale])]

    def norm(self, tape: ir.tape.Tape, node: ir.Node) -> list[ir.Value]:
        attributes = {"epsilon": node.attributes["epsilon"].as_float(), "axis": -1}
        return [tape.op("SimplifiedLayerNormalization", [node.inputs[0], self.norm_weight(node)], attributes)]

    def skip_norm(self, tape: ir.tape.Tape, node: ir.Node) -> list[ir.Value]:
        outputs = tape.op_multi_out(
            "SkipSimplifiedLayerNormalization",
            [*node.inputs, self.norm_weight(node)],
            {"epsilon": node.attributes["epsilon"].as_float()},
            domain=MICROSOFT,
            num_outputs=4,  # output, mean and inverse deviation (unused), the sum
        )
        outputs[1].name = outputs[2].name = ""
        return [outputs[0], outputs[3]]

    def last_rows(self, tape: ir.tape.Tape, node: ir.Node) -> list[ir.Value]:
        """The last n rows of axis 1; n = 0 keeps all, as -0 is the first row."""
        start = tape.op("Neg", [node.inputs[1]])
        end, axis = (constant(f"last_rows.{n}", np.array([v])) for n, v in (("end", 2**62), ("axis", 1)))
        return [tape.op("Slice", [node.inputs[0], start, end, axis])]


_RULES: dict[str, Callable[[LowerPass, ir.tape.Tape, ir.Node], list[ir.Value]]] = {
    "Linear": LowerPass.linear,
    "Embedding": LowerPass.embedding,
    "Norm": LowerPass.norm,
    "SkipNorm": LowerPass.skip_norm,
    "LastRows": LowerPass.last_rows,
    "Projection": LowerPass.projection,
}


def _float_linear(store: WeightStore, tape: ir.tape.Tape, job: Linear) -> ir.Value:
    weight = store.matrix(job.names, job.format, not job.shared, job.selection).parts["weight"]
    if job.shared:  # ONNX Runtime folds the transposition into the matmul or the constant
        weight = tape.op("Transpose", [weight], {"perm": [1, 0]})
    product = tape.op("MatMul", [job.x, weight])
    return product if job.bias is None else tape.op("Add", [product, job.bias])


def _nbits_linear(store: WeightStore, tape: ir.tape.Tape, job: Linear) -> ir.Value:
    matrix = store.matrix(job.names, job.format, selection=job.selection)
    parts = matrix.parts
    attributes = {
        "K": matrix.width,
        "N": matrix.rows,
        "bits": matrix.format.bits,
        "block_size": matrix.format.block,
        "accuracy_level": 4,  # int8 activations; at 8 bits the other levels are a hundred times slower
    }
    scales = _widened(store, tape, matrix, "scale")
    inputs = [job.x, parts["weight"], scales, parts.get("zero_point"), None, job.bias]
    product = tape.op("MatMulNBits", _trimmed(inputs), attributes, domain=MICROSOFT)
    if not matrix.format.minimums:
        return product
    return tape.op("Add", [product, _middle_product(store, tape, job.x, matrix, scales)])


def _middle_product(
    store: WeightStore, tape: ir.tape.Tape, x: ir.Value | None, matrix: Matrix, scales: ir.Value
) -> ir.Value:
    """What the product of a matrix with minimums has more than MatMulNBits, whose weights are scale * (level - middle):
    the sums of x over blocks, multiplied by the weights that the middle level stands for, scale * middle + minimum.

    Zero points of 0 would take the middle out of this product, but multiply the rounding errors of activations.
    """
    blocks = tape.op("Reshape", [x, _block_shape(matrix)])
    sums = tape.op("ReduceSum", [blocks, constant("last_axis", np.array([-1]))], {"keepdims": 0})
    weights = _middle_weights(store, tape, scales, _widened(store, tape, matrix, "minimum"), matrix.format)
    return tape.op("MatMul", [sums, tape.op("Transpose", [weights], {"perm": [1, 0]})])


def _middle_weights(
    store: WeightStore, tape: ir.tape.Tape, scales: ir.Value, minimums: ir.Value, fmt: Format
) -> ir.Value:
    middle = 1 << (fmt.bits - 1)
    factor = constant(f"middle.{middle}", np.array(middle, store.scales))
    return tape.op("Add", [tape.op("Mul", [scales, factor]), minimums])


def _block_shape(matrix: Matrix) -> ir.Value:
    """The shape [batch, rows, blocks, block] of activations [batch, rows, in]."""
    blocks, block = matrix.width // matrix.format.block, matrix.format.block
    return constant(f"blocks.{blocks}x{block}", np.array([0, 0, blocks, block]))


def _widened(store: WeightStore, tape: ir.tape.Tape, matrix: Matrix, part: str) -> ir.Value:
    """Scales or minimums in the type of activations, which the operators ask for. In float16 they take half the room in
    the file; ONNX Runtime widens them once, when it opens the graph."""
    stored = matrix.parts[part]
    floats = ir.DataType.from_numpy(np.dtype(store.scales))
    return stored if stored.dtype == floats else tape.op("Cast", [stored], {"to": floats})


def _dynamic_linear(store: WeightStore, tape: ir.tape.Tape, job: Linear) -> ir.Value:
    parts = store.matrix(job.names, job.format, True, job.selection).parts
    inputs = [job.x, parts["weight"], parts["scale"], None, job.bias]
    return tape.op("DynamicQuantizeMatMul", _trimmed(inputs), domain=MICROSOFT)


def _qdq_linear(store: WeightStore, tape: ir.tape.Tape, job: Linear) -> ir.Value:
    """Outputs are rows of a shared matrix, which the graph transposes, and columns of any other, stored transposed."""
    assert job.pairs is not None  # a recipe of this format has calibrated activations
    matrix = store.matrix(job.names, job.format, not job.shared, job.selection)
    weight = job.pairs.dequantize_weight(tape, matrix, axis=0 if job.shared else 1)
    if job.shared:
        weight = tape.op("Transpose", [weight], {"perm": [1, 0]})
    product = tape.op("MatMul", [job.pairs.quantize_input(tape, job.x, job.name), weight])
    product = job.pairs.quantize_output(tape, product, job.name)
    return product if job.bias is None else tape.op("Add", [product, job.bias])


def _trimmed(inputs: list[ir.Value | None]) -> list[ir.Value | None]:
    while inputs[-1] is None:
        inputs.pop()
    return inputs


LINEARS = {
    "float32": _float_linear,
    "float16": _float_linear,
    "nbits": _nbits_linear,
    "dynamic": _dynamic_linear,
    "qdq": _qdq_linear,
}


def _float_embedding(store: WeightStore, tape: ir.tape.Tape, ids: ir.Value | None, matrix: Matrix) -> ir.Value:
    return tape.op("Gather", [matrix.parts["weight"], ids], {"axis": 0})


def _nbits_embedding(store: WeightStore, tape: ir.tape.Tape, ids: ir.Value | None, matrix: Matrix) -> ir.Value:
    """GatherBlockQuantized over the bytes of MatMulNBits, seen as [rows, in * bits / 8]."""
    weight = matrix.parts["weight"]
    stored = weight.const_value
    assert isinstance(stored, ir.ExternalTensor) and stored.offset is not None
    flat = (matrix.rows, matrix.width * matrix.format.bits // 8)
    data = store.alias(f"{matrix.name}.rows", stored.offset, flat, stored.dtype)
    attributes = {"bits": matrix.format.bits, "block_size": matrix.format.block, "gather_axis": 0, "quantize_axis": 1}
    inputs = [data, ids, _widened(store, tape, matrix, "scale"), matrix.parts.get("zero_point")]
    rows = tape.op("GatherBlockQuantized", _trimmed(inputs), attributes, domain=MICROSOFT)
    if not matrix.format.minimums:
        return rows
    # The rows of scales and minimums are looked up before they are widened
    floats = ir.DataType.from_numpy(np.dtype(store.scales))
    parts = (tape.op("Gather", [matrix.parts[part], ids], {"axis": 0}) for part in ("scale", "minimum"))
    scales, minimums = (part if part.dtype == floats else tape.op("Cast", [part], {"to": floats}) for part in parts)
    weights = _middle_weights(store, tape, scales, minimums, matrix.format)
    blocks = tape.op("Reshape", [rows, _block_shape(matrix)])
    whole = tape.op("Add", [blocks, tape.op("Unsqueeze", [weights, constant("last_axis", np.array([-1]))])])
    return tape.op("Reshape", [whole, constant(f"rows.{matrix.width}", np.array([0, 0, matrix.width]))])


def _qdq_embedding(store: WeightStore, tape: ir.tape.Tape, ids: ir.Value | None, matrix: Matrix) -> ir.Value:
    """Looks up rows and their scales, so that only the rows of the step's tokens become floats."""
    stored = matrix.parts["scale"].const_value
    assert isinstance(stored, ir.ExternalTensor) and stored.offset is not None
    scales = store.alias(f"{matrix.name}.scale.rows", stored.offset, (matrix.rows, 1), stored.dtype)
    rows = tape.op("Gather", [matrix.parts["weight"], ids], {"axis": 0})
    wide = tape.op("Cast", [rows], {"to": stored.dtype})
    return tape.op("Mul", [wide, tape.op("Gather", [scales, ids], {"axis": 0})])


EMBEDDINGS = {
    "float32": _float_embedding,
    "float16": _float_embedding,
    "nbits": _nbits_embedding,
    "qdq": _qdq_embedding,
}
