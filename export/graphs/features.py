"""Hidden states of a target in the graphs of a target and of the draft that reads them (PARD-2, P-EAGLE).

A target's output `hidden_states` [batch, rows, columns] has the hidden states of some layers side by side, of as many
last rows of the step as there are logits, or as the overridable input `hidden_states_to_keep` [1] says: a prompt's
tokens all have features that a draft reads, while only the last one's logits are wanted. A negative number, its
default, is the number of logits' rows; 0 is all rows.

A draft's input `target_features` [batch, rows, columns] is an overridable initializer of zeros, so that the graph is an
ordinary PARD draft's where it is left out. Zeros add exactly 0 to the embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pard_onnx.models.manifest import StaticGraph
from pard_onnx.models.spec import FEATURE_NORM, MASK_FEATURE, TargetFeatures

from .tape import DOMAIN, HIDDEN_STATES, TARGET_FEATURES, constant, register

TO_KEEP = "hidden_states_to_keep"
SUM = "target_features.sum"  # the name of the node whose last input has a row of features for each token
LIKE_LOGITS = -1


@dataclass
class FeaturesPass(ir.passes.InPlacePass):
    """Adds scale * projection(target_features) to the embeddings: `pard.Projection(x) {scale, width, bias}`.

    Runs after SkipNormPass: the sum has other shapes where one row of zeros stands for all rows.
    """

    features: TargetFeatures

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, features = model.graph, self.features
        node = next(n for n in graph if (n.domain, n.op_type) == (DOMAIN, "Embedding"))
        embeddings, readers = node.outputs[0], list(node.outputs[0].uses())
        shape = ir.Shape(["feature_batch", "feature_rows", features.columns])
        given = ir.Value(name=TARGET_FEATURES, shape=shape, type=embeddings.type)
        attributes = {"scale": features.scale, "width": features.width, "bias": int(features.bias)}
        projected = ir.node("Projection", [given], attributes, domain=DOMAIN)
        total = ir.node("Add", [embeddings, projected.outputs[0]], name=SUM)
        for value in (projected.outputs[0], total.outputs[0]):
            value.type = embeddings.type
        total.outputs[0].shape = embeddings.shape
        for reader in readers:
            reader.node.replace_input_with(reader.idx, total.outputs[0])
        graph.insert_after(node, [projected, total])
        graph.inputs.append(given)
        return ir.passes.PassResult(model, modified=True)


@dataclass
class JoinedFeaturesPass(ir.passes.InPlacePass):
    """Lets projected features stand beside the embeddings in the first layer (P-EAGLE). Runs after SkipNormPass.

    1. A mask's row of `target_features` is the learned `mask_feature`, whatever was fed.
    2. The first layer's q, k and v read [norm(embedding), norm(projection)].
    3. Its residual sum takes the projection in the embedding's place, after its norm with `norm_before_residual`.
    """

    features: TargetFeatures
    mask_id: int
    mask_feature: NDArray[np.float32]  # [columns]
    epsilon: float

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, features = model.graph, self.features
        node = next(n for n in graph if (n.domain, n.op_type) == (DOMAIN, "Embedding"))
        embeddings, ids = node.outputs[0], node.inputs[0]
        norm = next(n for n in embeddings.consumers() if (n.domain, n.op_type) == (DOMAIN, "Norm"))
        residual = [use for use in embeddings.uses() if use.node is not norm]
        attention = list(norm.outputs[0].uses())
        assert embeddings.dtype is not None
        shape = ir.Shape(["feature_batch", "feature_rows", features.columns])
        given = ir.Value(name=TARGET_FEATURES, shape=shape, type=embeddings.type)
        mask = constant(MASK_FEATURE, self.mask_feature.astype(embeddings.dtype.numpy()))
        # Devices have no Equal: an id is the mask's where the square of their difference is at most 0
        apart = ir.node("Sub", [ids, constant(f"{SUM}.mask", np.array(self.mask_id))])
        square = ir.node("Mul", [apart.outputs[0], apart.outputs[0]])
        masked = ir.node("LessOrEqual", [square.outputs[0], constant(f"{SUM}.zero", np.array(0))])
        column = ir.node("Unsqueeze", [masked.outputs[0], constant(f"{SUM}.column", np.array([-1]))])
        rows = ir.node("Where", [column.outputs[0], mask, given], name=SUM)  # 1
        attributes = {"scale": features.scale, "width": features.width, "bias": int(features.bias)}
        projected = ir.node("Projection", [rows.outputs[0]], attributes, domain=DOMAIN)
        normed = ir.node("Norm", projected.outputs, {"name": FEATURE_NORM, "epsilon": self.epsilon}, domain=DOMAIN)
        joined = ir.node("Concat", [norm.outputs[0], normed.outputs[0]], {"axis": -1})
        for value in (rows.outputs[0], projected.outputs[0], normed.outputs[0], joined.outputs[0]):
            value.type = embeddings.type
        for use in attention:  # 2
            use.node.replace_input_with(use.idx, joined.outputs[0])
        for use in residual:  # 3
            use.node.replace_input_with(use.idx, (normed if features.norm_before_residual else projected).outputs[0])
        graph.insert_after(node, [apart, square, masked, column, rows, projected, normed])
        graph.insert_after(norm, joined)
        graph.inputs.append(given)
        return ir.passes.PassResult(model, modified=True)


def repeat_for_masks(graph: ir.Graph, ids: ir.Value, masks: ir.Value) -> None:
    """Give each token of a step its projected feature, and masks that of the last token.

    ids: of the tokens; masks: how many masks follow them, int64 [1]. One row stands for all rows.
    """
    tape = ir.tape.Tape()
    total = next(node for node in graph if node.name == SUM)
    place = len(total.inputs) - 1  # the features are the last input of either node
    rows = total.inputs[place]
    one, last, end, axis = (
        constant(f"{SUM}.{name}", np.array([number]))
        for name, number in (("one", 1), ("last", -1), ("end", 2**62), ("axis", 1))
    )
    tokens = tape.op("Expand", [rows, tape.op("Concat", [tape.op("Shape", [ids]), one], {"axis": 0})])
    repeated = tape.op("Expand", [
        tape.op("Slice", [rows, last, end, axis]), tape.op("Concat", [one, masks, one], {"axis": 0})
    ])  # fmt: skip
    total.replace_input_with(place, tape.op("Concat", [tokens, repeated], {"axis": 1}))
    graph.insert_before(total, tape.nodes)
    register(graph)


def make_overridable(graph: ir.Graph, value: ir.Value, default: np.ndarray) -> None:
    """Let an input of the graph be left out; it comes last, and has this value then."""
    if value in graph.inputs:
        graph.inputs.remove(value)
    value.const_value = ir.tensor(default, name=value.name)
    graph.initializers[str(value.name)] = value
    graph.inputs.append(value)


def finish_target_features(graph: ir.Graph, static: StaticGraph | None = None) -> None:
    """Make a draft's input `target_features` overridable, and its shape a fixed one in a graph of fixed shapes."""
    given = next((value for value in graph.inputs if value.name == TARGET_FEATURES), None)
    if given is None:
        return
    assert given.shape is not None and given.dtype is not None
    columns, rows = int(given.shape[-1]), 1  # type: ignore[arg-type]
    if static is not None:
        rows = static.width
        given.shape = ir.Shape([1, rows, columns])
    make_overridable(graph, given, np.zeros((1, rows, columns), given.dtype.numpy()))


def rows_of_features(tape: ir.tape.Tape, logits_to_keep: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The input `hidden_states_to_keep`, and how many rows `hidden_states` has."""
    given = ir.Value(name=TO_KEEP, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    zero = tape.initializer(ir.tensor([0], name=f"{TO_KEEP}.zero"))
    stated = tape.op("LessOrEqual", [zero, given])
    return given, tape.op("Where", [stated, given, logits_to_keep])


def shape_hidden_states(graph: ir.Graph) -> None:
    """Name the dimensions of the output `hidden_states`, if the graph has it."""
    for value in graph.outputs:
        if value.name == HIDDEN_STATES:
            assert value.shape is not None
            value.shape = ir.Shape(["batch", "kept_features", value.shape[-1]])
