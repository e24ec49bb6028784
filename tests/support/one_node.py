"""Models of one node, opened with the package's operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import literal_attention
import literal_matmul
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from pard_onnx.runtime import kernels


def of_one_node(
    node: NodeProto,
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    constants: Mapping[str, NDArray[np.generic]],
) -> ModelProto:
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph([node], "one node", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(node.domain, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def matmul_model(matrix: literal_matmul.Matrix, domain: str, **changes: Any) -> ModelProto:
    """One MatMulNBits; `changes` replace its attributes (None leaves one out)."""
    weights = {"B": matrix.levels, "scales": matrix.scales, "zero_points": matrix.zero_points}
    named = weights | {"g_idx": None, "bias": matrix.bias}
    inputs = ["A", *(name if array is not None else "" for name, array in named.items())]
    attributes = {"K": matrix.k, "N": matrix.n, "bits": matrix.bits, "block_size": matrix.block, "accuracy_level": 4}
    attributes = {name: value for name, value in (attributes | changes).items() if value is not None}
    node = helper.make_node("MatMulNBits", inputs, ["Y"], domain=domain, **attributes)
    return of_one_node(
        node,
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["batch", "rows", None])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["batch", "rows", None])],
        {name: array for name, array in named.items() if array is not None},
    )


def attention_model(step: literal_attention.Step, domain: str, packed: bool = True, **changes: Any) -> ModelProto:
    """One GroupQueryAttention with the step's rotary tables; `changes` replace its attributes (None leaves one out)."""
    new = ["query"] if packed else ["query", "key", "value"]
    caches, lengths = ["past_key", "past_value"], ["seqlens_k", "total"]
    inputs = [*new, *([""] * (3 - len(new))), *caches, *lengths, "cos", "sin"]
    attributes = {"num_heads": step.queries.shape[1], "kv_num_heads": step.keys.shape[1]}
    attributes |= {"scale": step.scale, "do_rotary": 1} | changes
    outputs = ["output", "present_key", "present_value"]
    given = {name: value for name, value in attributes.items() if value is not None}
    node = helper.make_node("GroupQueryAttention", inputs, outputs, domain=domain, **given)
    tensor = helper.make_tensor_value_info
    return of_one_node(
        node,
        [
            *(tensor(name, TensorProto.FLOAT, ["batch", "rows", None]) for name in new),
            *(tensor(name, TensorProto.FLOAT, ["batch", None, None, None]) for name in caches),
            tensor("seqlens_k", TensorProto.INT32, [None]),
            tensor("total", TensorProto.INT32, []),
        ],
        [tensor(name, TensorProto.FLOAT, None) for name in outputs],
        {"cos": step.cosines, "sin": step.sines},
    )


def attention_feeds(step: literal_attention.Step, packed: bool = True, **changes: Any) -> dict[str, Any]:
    """What a session of `attention_model` is given for the step; `changes` replace some of it."""
    flat = {name: getattr(step, name).reshape(1, step.rows, -1) for name in ("queries", "keys", "values")}
    new = dict(zip(("query", "key", "value"), flat.values(), strict=True))
    return (
        ({"query": step.packed()} if packed else new)
        | {"past_key": step.key_cache[None], "past_value": step.value_cache[None]}
        | {
            "seqlens_k": np.array([step.past + step.rows - 1], np.int32),
            "total": np.array(step.past + step.rows, np.int32),
        }
        | changes
    )


def session(graph: ModelProto, threads: int = 2) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(kernels.LIBRARY))
    return ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
