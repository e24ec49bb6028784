"""Attention nodes that the kernels have: ONNX Runtime's own gives a single row other bits than several."""

from __future__ import annotations

from collections.abc import Mapping

from .nodes import Node, Value

OPERATOR = "GroupQueryAttention"
PAST_KEY, PAST_VALUE = 3, 4
INPUTS = {0: 7, 1: 9}  # by do_rotary: the rotary tables come last
ATTRIBUTES = {
    "num_heads",
    "kv_num_heads",
    "scale",
    "do_rotary",
    "local_window_size",
}  # others ask for what the kernels do not have
FLOAT = 1
RANK, LANES = 4, 16  # of a cache; a head's numbers are a multiple of LANES


def attends(node: Node, domain: str, inputs: Mapping[str, Value]) -> bool:
    """Whether the kernels can be this node. inputs: the graph's, among which they look for the caches."""
    if (node.domain, node.operator) != (domain, OPERATOR):
        return False
    heads, kv_heads = node.attributes.get("num_heads", 0), node.attributes.get("kv_num_heads", 0)
    return (
        INPUTS.get(node.attributes.get("do_rotary", 0)) == len(node.inputs)
        and node.named <= ATTRIBUTES
        and kv_heads > 0
        and heads % kv_heads == 0
        and all(_cache(inputs.get(node.inputs[i])) for i in (PAST_KEY, PAST_VALUE))
    )


def _cache(value: Value | None) -> bool:
    """float32 [batch, kv_heads, rows, head_dim], of which the last is known."""
    if value is None or value.type != FLOAT or len(value.shape) != RANK:
        return False
    return value.shape[-1] > 0 and value.shape[-1] % LANES == 0
