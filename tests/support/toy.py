"""Toy models that obey the graph contracts of docs/architecture.md: random weights, real kernels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper, save

MS = "com.microsoft"
MOST_ROWS = 4096
INT64, FLOAT, FLOAT16 = TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT16


@dataclass(frozen=True)
class Shape:
    rows: int = 288  # of the vocabulary, padding included
    size: int = 280  # ids that may come out
    hidden: int = 32
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    layers: int = 2
    kv_rows: int = 128 + 64
    mask_id: int = 281
    features: tuple[int, ...] = ()  # layers whose hidden states the target gives, or the draft reads
    bias: bool = False  # of the draft's projection of them


class Graph:
    """Nodes and initializers as they come; every node's output is named after its count."""

    def __init__(self) -> None:
        self.nodes: list[object] = []
        self.initializers: list[TensorProto] = []

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def node(
        self, op: str, *inputs: str, domain: str = "", outputs: list[str] | None = None, **attributes: object
    ) -> str:
        names = outputs or [f"{op}_{len(self.nodes)}"]
        self.nodes.append(helper.make_node(op, list(inputs), names, domain=domain, **attributes))
        return names[0]


def rotary_tables(rows: int, dim: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    angles = np.outer(np.arange(rows), 100.0 ** (-np.arange(dim // 2) * 2 / dim))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def weights(shape: Shape, seed: int) -> dict[str, NDArray[np.float32]]:
    """Drawn so that two shapes that differ in their vocabulary rows alone share all other numbers."""
    rng = np.random.default_rng(seed)
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    vocabulary = rng.normal(size=(2, MOST_ROWS, shape.hidden))[:, : shape.rows]
    out = {"embed": vocabulary[0], "head": vocabulary[1].T}
    for i in range(shape.layers):
        out[f"qkv{i}"] = rng.normal(size=(shape.hidden, q + 2 * kv)) / shape.hidden**0.5
        out[f"o{i}"] = rng.normal(size=(q, shape.hidden)) / 2
    columns = len(shape.features) * shape.hidden + shape.bias
    out["projection"] = rng.normal(size=(columns, shape.hidden)) / (10 * shape.hidden**0.5)
    return {name: array.astype(np.float32) for name, array in out.items()}


def layers(
    g: Graph, shape: Shape, w: dict[str, NDArray[np.float32]], ids: str, total: str, dtype: int, added: str = ""
) -> list[str]:
    """Embedding and attention layers: the hidden rows before each layer and after the last, [1, sequence, hidden].

    total: int64 [1]. added: rows that are added to the embedding's.
    """
    cast = np.float16 if dtype == FLOAT16 else np.float32
    one = g.constant("one32", np.array([1], np.int32))
    total32 = g.node("Cast", total, to=TensorProto.INT32)
    seqlens = g.node("Sub", total32, one)
    scalar = g.node("Squeeze", total32, g.constant("axis0", np.array([0], np.int64)))
    cos, sin = rotary_tables(shape.kv_rows, shape.head_dim)
    g.constant("cos", cos.astype(cast))
    g.constant("sin", sin.astype(cast))
    x = g.node("Gather", g.constant("embed", w["embed"].astype(cast)), ids)
    if added:
        x = g.node("Add", x, added)
    states = [x]
    for i in range(shape.layers):
        qkv = g.node("MatMul", x, g.constant(f"qkv{i}", w[f"qkv{i}"].astype(cast)))
        attention = g.node(
            "GroupQueryAttention",
            qkv,
            "",
            "",
            f"past_key_values.{i}.key",
            f"past_key_values.{i}.value",
            seqlens,
            scalar,
            "cos",
            "sin",
            domain=MS,
            outputs=[f"attention{i}", f"present.{i}.key", f"present.{i}.value"],
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            do_rotary=1,
        )
        x = g.node("Add", x, g.node("MatMul", attention, g.constant(f"o{i}", w[f"o{i}"].astype(cast))))
        states.append(x)
    return states


def head(g: Graph, shape: Shape, w: dict[str, NDArray[np.float32]], x: str, kept: str, output: str) -> str:
    """The last `kept` (int64 [1], 0 = all) rows' logits, -inf for ids that the tokenizer does not have."""
    last = g.node(
        "Slice",
        x,
        g.node("Neg", kept),
        g.constant("end", np.array([2**62], np.int64)),
        g.constant("axis1", np.array([1], np.int64)),
    )
    floats = g.node("Cast", last, to=FLOAT)
    unknown = np.where(np.arange(shape.rows) < shape.size, 0, -np.inf).astype(np.float32)
    logits = g.node("MatMul", floats, g.constant("head", w["head"]))
    return g.node("Add", logits, g.constant("unknown", unknown), outputs=[output])


def value(name: str, dtype: int, *dims: int | str) -> object:
    return helper.make_tensor_value_info(name, dtype, list(dims))


def model(g: Graph, shape: Shape, dtype: int, inputs: list[object], outputs: list[object]) -> ModelProto:
    dims = ("batch", shape.kv_heads, shape.kv_rows, shape.head_dim)
    pasts = [value(f"past_key_values.{i}.{n}", dtype, *dims) for i in range(shape.layers) for n in ("key", "value")]
    presents = [value(f"present.{i}.{n}", dtype, *dims) for i in range(shape.layers) for n in ("key", "value")]
    base = [value("input_ids", INT64, "batch", "sequence"), value("attention_mask", INT64, "batch", "total")]
    graph = helper.make_graph(g.nodes, "toy", base + pasts + inputs, outputs + presents, g.initializers)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)], ir_version=10
    )


def mask_length(g: Graph) -> str:
    return g.node("Shape", "attention_mask", start=1, end=2)


def target(shape: Shape, seed: int, dtype: int = FLOAT) -> ModelProto:
    g, w = Graph(), weights(shape, seed)
    g.constant("logits_to_keep", np.array([0], np.int64))
    states = layers(g, shape, w, "input_ids", mask_length(g), dtype)
    head(g, shape, w, states[-1], "logits_to_keep", "logits")
    keep = value("logits_to_keep", INT64, 1)
    outputs = [value("logits", FLOAT, "batch", "kept", shape.rows)]
    if shape.features:
        wanted = [states[layer] for layer in shape.features]
        hidden_states(g, g.node("Concat", *wanted, axis=2), "logits_to_keep")
        outputs.append(value("hidden_states", dtype, "batch", "kept_features", len(wanted) * shape.hidden))
    inputs = [keep, value("hidden_states_to_keep", INT64, 1)] if shape.features else [keep]
    return model(g, shape, dtype, inputs, outputs)


def hidden_states(g: Graph, rows: str, kept: str) -> None:
    """The last `hidden_states_to_keep` rows (0 = all), or the last `kept` ones, as the output of this name."""
    g.constant("hidden_states_to_keep", np.array([-1], np.int64))
    stated = g.node("LessOrEqual", g.constant("none", np.array([0], np.int64)), "hidden_states_to_keep")
    count = g.node("Where", stated, "hidden_states_to_keep", kept)
    ends = [g.constant("last_row", np.array([2**62], np.int64)), g.constant("axis_of_rows", np.array([1], np.int64))]
    g.node("Slice", rows, g.node("Neg", count), *ends, outputs=["hidden_states"])


def draft(shape: Shape, seed: int, dtype: int = FLOAT) -> ModelProto:
    g, w = Graph(), weights(shape, seed)
    one = g.constant("one", np.array([1], np.int64))
    masks = g.node("Sub", "draft_length", one)
    row = g.constant("row", np.array([[shape.mask_id]], np.int64))
    ids = g.node("Concat", "input_ids", g.node("Expand", row, g.node("Concat", one, masks, axis=0)), axis=1)
    total = g.node("Add", mask_length(g), masks)
    inputs = [value("draft_length", INT64, 1)]
    added = ""
    if shape.features:
        added, feed = projected(g, shape, w, masks, dtype)
        inputs.append(feed)
    logits = head(g, shape, w, layers(g, shape, w, ids, total, dtype, added)[-1], "draft_length", "logits")
    g.node("ArgMax", logits, axis=2, keepdims=0, outputs=["draft_ids"])
    probabilities = g.node("Softmax", logits, axis=2)
    g.node(
        "ReduceMax",
        probabilities,
        g.constant("axis2", np.array([2], np.int64)),
        keepdims=0,
        outputs=["draft_probabilities"],
    )
    outputs = [
        value("draft_ids", INT64, "batch", "drafts"),
        value("draft_probabilities", FLOAT, "batch", "drafts"),
        value("logits", FLOAT, "batch", "drafts", shape.rows),
    ]
    return model(g, shape, dtype, inputs, outputs)


def projected(g: Graph, shape: Shape, w: dict[str, NDArray[np.float32]], masks: str, dtype: int) -> tuple[str, object]:
    """What is added to the rows of a draft's tokens and masks, and the graph's input of features."""
    cast = np.float16 if dtype == FLOAT16 else np.float32
    columns = len(shape.features) * shape.hidden + shape.bias
    zeros = g.constant("target_features", np.zeros((1, 1, columns), cast))
    rows = g.node("MatMul", zeros, g.constant("projection", w["projection"].astype(cast)))
    axis1 = g.constant("axis_rows", np.array([1], np.int64))
    end = g.constant("end_rows", np.array([2**62], np.int64))
    last = g.node("Slice", rows, g.constant("last", np.array([-1], np.int64)), end, axis1)
    sequence = g.node("Shape", "input_ids", start=1, end=2)
    one = g.constant("one_row", np.array([1], np.int64))
    real = g.node("Expand", rows, g.node("Concat", one, sequence, one, axis=0))  # a single row is every token's
    repeated = g.node("Expand", last, g.node("Concat", one, masks, one, axis=0))
    return g.node("Concat", real, repeated, axis=1), value("target_features", dtype, "batch", "fed", columns)


def write(graph: ModelProto, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save(graph, folder / "model.onnx")


def tokenwise(shape: Shape, role: str, width: int | None = None, outputs: bool = True) -> ModelProto:
    """A model of the portable variant without attention, whose KV cache is left as it is: for what sessions do.

    width, outputs: of a static graph, and whether it gives the outputs of its role. A target's features are its
    embedding and the negative of it.
    """
    g, w, sequence = Graph(), weights(shape, 1), width or "sequence"
    x = embedded = g.node("Gather", g.constant("embed", w["embed"]), "input_ids")
    inputs, out = [value("position_ids", INT64, "batch", sequence)], []
    columns = w["projection"].shape[0]
    if role == "draft":
        g.constant("target_features", np.zeros((1, 1, columns), np.float32))
        x = g.node("Add", x, g.node("MatMul", "target_features", g.constant("projection", w["projection"])))
        inputs.append(value("target_features", FLOAT, "batch", "fed", columns))
    if width is None:
        inputs.append(value("logits_to_keep", INT64, 1))
        g.constant("logits_to_keep", np.array([0], np.int64))
    kept = "logits_to_keep" if width is None else g.constant("all", np.array([shape.kv_rows], np.int64))
    rows = value("logits", FLOAT, "batch", "kept", shape.rows)
    if outputs:
        logits = head(g, shape, w, x, kept, "logits")
        out.append(rows)
    if outputs and role == "draft":
        g.node("ArgMax", logits, axis=2, keepdims=0, outputs=["draft_ids"])
        g.node("ReduceMax", logits, g.constant("columns", np.array([2])), keepdims=0, outputs=["draft_probabilities"])
        out += [value("draft_ids", INT64, "batch", "kept"), value("draft_probabilities", FLOAT, "batch", "kept")]
    if role == "target":
        hidden_states(g, g.node("Concat", embedded, g.node("Neg", embedded), axis=2), kept)
        out.append(value("hidden_states", FLOAT, "batch", "kept_features", 2 * shape.hidden))
        inputs.append(value("hidden_states_to_keep", INT64, 1))
    for i in range(shape.layers):
        for part in ("key", "value"):
            g.node("Neg", g.node("Neg", f"past_key_values.{i}.{part}"), outputs=[f"present.{i}.{part}"])
    return model(g, shape, FLOAT, inputs, out)
