"""Pass: `pard.Attention` written out in plain ONNX operators.

What layers share is computed once, in front of the graph: which rows each token sees (for each window that layers
have), its rows of the rotary tables (for each rotary rule), where its keys and values go. Queries of one
KV head stand together, [batch, kv_heads, group * sequence, head_dim], so that keys and values are never repeated.

The KV rows are written before they are read, and nothing else reads the past: present and past may be one buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from pard_onnx.models.devices import Write
from pard_onnx.models.spec import ModelSpec

from .tape import DOMAIN, Tape, register, substitute

FAR = 2**30  # a row that no position reaches
UNSEEN = -1e30  # added to scores: vanishes in every softmax, and is finite, so that no row becomes NaN
INT32, INT64, BOOL, FLOAT = ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.FLOAT


Turn = tuple[ir.Value, ir.Value]  # cos and sin, [batch, 1, sequence, head_dim]


@dataclass(frozen=True, slots=True)
class Shared:
    """row: int32 [batch, 1, 1, keys], which row a key is, FAR if it is masked. token: int32 [batch, 1, sequence, 1],
    the positions. place: what `write` needs. keys: int64 [1]; None: all rows are read.

    Made once each, when a layer asks for them: biases by window, [batch, 1, group * sequence, keys], float32; turns
    and, for queries, scaled turns by the names of the tables."""

    row: ir.Value
    token: ir.Value
    place: tuple[ir.Value, ...]
    keys: ir.Value | None
    biases: dict[int, ir.Value] = field(default_factory=dict)
    turns: dict[str, Turn] = field(default_factory=dict)
    scaled: dict[tuple[str, float], Turn] = field(default_factory=dict)


@dataclass
class PlainAttentionPass(ir.passes.InPlacePass):
    """rows: of the KV buffers. static: all of them are read, so that no shape depends on the context."""

    spec: ModelSpec
    rows: int
    write: Write
    static: bool
    opset: int

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        nodes = [n for n in graph if n.domain == DOMAIN and n.op_type == "Attention"]
        tape = Tape(self.opset)
        shared = self._shared(tape, nodes[0])
        for node in nodes:
            self._share(tape, node, shared)
        graph.insert_before(next(iter(graph)), tape.nodes)
        for node in nodes:
            own = Tape(self.opset, tape.constants)
            outputs = self._attention(own, node, shared)
            substitute(graph, node, own.nodes, outputs)
        register(graph)
        return ir.passes.PassResult(model, bool(nodes))

    @property
    def group(self) -> int:
        return self.spec.heads // self.spec.kv_heads

    def _shared(self, t: Tape, node: ir.Node) -> Shared:
        query, positions, mask = node.inputs[0], node.inputs[5], node.inputs[6]
        assert query is not None and query.dtype is not None
        rows = t.constant("rows", np.arange(self.rows, dtype=np.int32))
        keys = None if self.static else t.op("Shape", mask, start=1, end=2)
        row = rows if keys is None else t.op("Slice", rows, t.ints(0), keys, t.ints(0))
        # One comparison says both that the mask allows the row and that it does not lie ahead.
        row = t.op("Where", t.op("Cast", mask, to=BOOL), row, t.constant("far", np.array(FAR, np.int32)))
        row = t.op("Unsqueeze", row, t.ints(1, 2))
        # In 32 bits: GPUs take 64 as indices at most.
        token = t.op("Unsqueeze", t.op("Cast", positions, to=INT32), t.ints(1, 3))
        return Shared(row, token, WRITES[self.write].place(t, self, token, query.dtype), keys)

    def _share(self, t: Tape, node: ir.Node, shared: Shared) -> None:
        """What the node needs and no node before it did."""
        query, positions = node.inputs[0], node.inputs[5]
        assert query is not None and query.dtype is not None
        window, scale = node.attributes["window"].as_int(), node.attributes["scale"].as_float()
        if window not in shared.biases:
            shared.biases[window] = self._bias(t, shared, window)
        tables = _tables(node)
        if not tables:
            return
        name = str(tables[0].name)
        if name not in shared.turns:
            cos, sin = (t.op("Unsqueeze", t.op("Gather", table, positions, axis=0), t.ints(1)) for table in tables)
            shared.turns[name] = cos, sin
        if (name, scale) not in shared.scaled:
            cos, sin = (t.op("Mul", x, _scale(t, scale, query.dtype)) for x in shared.turns[name])
            shared.scaled[name, scale] = cos, sin

    def _bias(self, t: Tape, shared: Shared, window: int) -> ir.Value:
        seen, unseen = (t.constant(n, np.array(v, np.float32)) for n, v in (("seen", 0), ("unseen", UNSEEN)))
        bias = t.op("Where", t.op("LessOrEqual", shared.row, shared.token), seen, unseen)
        if window:  # of the tokens that a token sees, itself included: row > token - window
            end = t.op("Add", shared.row, t.constant(f"window.{window}", np.array(window, np.int32)))
            bias = t.op("Where", t.op("LessOrEqual", end, shared.token), unseen, bias)
        return t.op("Concat", *[bias] * self.group, axis=2) if self.group > 1 else bias

    def _attention(self, t: Tape, node: ir.Node, shared: Shared) -> list[ir.Value]:
        query, key, value, past_key, past_value = node.inputs[:5]
        heads, kv_heads, dim = self.spec.heads, self.spec.kv_heads, self.spec.head_dim
        scale, tables = node.attributes["scale"].as_float(), _tables(node)
        if tables:
            name = str(tables[0].name)
            key, queries = self._turned(t, key, shared.turns[name]), self._turned(t, query, shared.scaled[name, scale])
        else:
            assert query is not None and query.dtype is not None
            queries = t.op("Mul", query, _scale(t, scale, query.dtype))
        put = WRITES[self.write].put
        presents = [
            put(t, past_key, key, shared.place),
            put(t, past_value, value, shared.place),
        ]
        keys, values = presents
        if shared.keys is not None:
            keys, values = (t.op("Slice", x, t.ints(0), shared.keys, t.ints(2)) for x in presents)
        if self.group > 1:
            queries = t.op("Reshape", queries, t.ints(0, kv_heads, -1, dim))
        scores = t.op("MatMul", queries, t.op("Transpose", keys, perm=[0, 1, 3, 2]))
        narrow = None if query is None or query.dtype == FLOAT else query.dtype
        if narrow:
            scores = t.op("Cast", scores, to=FLOAT)
        weights = t.op("Softmax", t.op("Add", scores, shared.biases[node.attributes["window"].as_int()]), axis=-1)
        if narrow:
            weights = t.op("Cast", weights, to=narrow)
        mixed = t.op("MatMul", weights, values)
        if self.group > 1:
            mixed = t.op("Reshape", mixed, t.ints(0, heads, -1, dim))
        return [t.op("Transpose", mixed, perm=[0, 2, 1, 3]), *presents]

    def _turned(self, t: Tape, x: ir.Value | None, turn: Turn) -> ir.Value:
        """Rotary embedding of [batch, heads, sequence, head_dim]."""
        half = self.spec.head_dim // 2
        first, second = t.split(x, half, half)
        swapped = t.op("Concat", second, first, axis=-1)
        return t.op("Add", t.op("Mul", x, turn[0]), t.op("Mul", swapped, turn[1]))


def _tables(node: ir.Node) -> list[ir.Value]:
    """cos and sin; none where nothing is turned."""
    return [table for table in node.inputs[7:] if table is not None]


def _scale(t: Tape, scale: float, floats: ir.DataType) -> ir.Value:
    return t.constant(f"scale.{scale:g}", np.array(scale, floats.numpy()))


@dataclass(frozen=True, slots=True)
class _Write:
    """place: from the tokens' positions [batch, 1, sequence, 1], once a graph. put: new rows [batch, kv_heads,
    sequence, head_dim] into the past, as the present."""

    place: Callable[[Tape, PlainAttentionPass, ir.Value, ir.DataType], tuple[ir.Value, ...]]
    put: Callable[[Tape, ir.Value | None, ir.Value | None, tuple[ir.Value, ...]], ir.Value]


def _indices(t: Tape, job: PlainAttentionPass, token: ir.Value, _: ir.DataType) -> tuple[ir.Value, ...]:
    """[batch, kv_heads, sequence, 3]: batch, head, row. Sums spread them, as shapes need not be known for that."""
    heads = np.arange(job.spec.kv_heads, dtype=np.int32).reshape(1, -1, 1, 1)
    row = t.op("Add", token, t.constant("spread", np.zeros_like(heads)))
    none = t.op("Sub", row, row)
    head = t.op("Add", none, t.constant("heads", heads))
    batch = none
    if not job.static:
        size = t.op("Shape", token, start=0, end=1)
        rows = t.constant("rows", np.arange(job.rows, dtype=np.int32))
        numbers = t.op("Slice", rows, t.ints(0), size, t.ints(0))
        batch = t.op("Add", none, t.op("Reshape", numbers, t.ints(-1, 1, 1, 1)))
    return (t.op("Cast", t.op("Concat", batch, head, row, axis=3), to=INT64),)


def _scatter(t: Tape, past: ir.Value | None, new: ir.Value | None, place: tuple[ir.Value, ...]) -> ir.Value:
    return t.op("ScatterND", past, place[0], new)


def _one_hot(t: Tape, job: PlainAttentionPass, token: ir.Value, floats: ir.DataType) -> tuple[ir.Value, ...]:
    """Which token goes to which row, [batch, 1, rows, sequence], and which rows stay, [batch, 1, rows, 1]."""
    rows = t.constant("rows_down", np.arange(job.rows, dtype=np.int32).reshape(1, 1, -1, 1))
    goes = t.op("Cast", t.op("Equal", rows, t.op("Transpose", token, perm=[0, 1, 3, 2])), to=floats)
    one = t.constant("one", np.array(1, floats.numpy()))
    return goes, t.op("Sub", one, t.reduce("ReduceMax", goes))


def _blend(t: Tape, past: ir.Value | None, new: ir.Value | None, place: tuple[ir.Value, ...]) -> ir.Value:
    """Exact: each row is one of the two times 1, plus zeros."""
    return t.op("Add", t.op("Mul", past, place[1]), t.op("MatMul", place[0], new))


WRITES: dict[Write, _Write] = {"scatter": _Write(_indices, _scatter), "one-hot": _Write(_one_hot, _blend)}
