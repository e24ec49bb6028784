"""Replaces the two matmuls of a gated MLP and the operators that join them, silu(x * gate) * (x * up), by one operator.

The activations are quantized once and the threads are started once, and the products stay in the processor's cache.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection

from .nodes import Node

GATED = "GatedMatMulNBits"
PANEL = 16  # outputs of a matmul that the kernels compute together
SHAPE = ("K", "N", "bits", "block_size")
OFFSETS = ("B_offset", "scales_offset", "zero_points_offset", "minimums_offset")
HALF = "scales_half"
FILE = "weights_file"


def gate(nodes: list[Node], domain: str, operator: str, outputs: Collection[str]) -> list[Node]:
    """The nodes, with each group of gate, up, Sigmoid, Mul and Mul replaced by one node in the last one's place.

    domain, operator: of the matmuls. outputs: the names of the graph's outputs, which are not removed.
    """
    users: dict[str, list[Node]] = defaultdict(list)
    makers = {name: node for node in nodes for name in node.outputs}
    for node in nodes:
        for name in node.inputs:
            users[name].append(node)
    replaced: dict[int, Node | None] = {}  # by the id() of a node: its replacement, None for none
    for sigmoid in nodes:
        if (sigmoid.operator, sigmoid.domain) != ("Sigmoid", ""):
            continue
        found = _chain(sigmoid, makers, users)
        if found is None:
            continue
        first, second, inner, last = found
        inside = [*first.outputs, *second.outputs, *sigmoid.outputs, *inner.outputs]
        if _can_be_joined(first, second, domain, operator) and not any(name in outputs for name in inside):
            replaced |= {id(node): None for node in (first, second, sigmoid, inner)}
            replaced[id(last)] = _joined(first, second, last)
    kept = (replaced.get(id(node), node) for node in nodes)
    return [node for node in kept if node is not None]


def _chain(
    sigmoid: Node, makers: dict[str, Node], users: dict[str, list[Node]]
) -> tuple[Node, Node, Node, Node] | None:
    """The gate and up matmuls and the two Muls around `sigmoid`; None if the nodes around it are others."""
    gate_output, activated = sigmoid.inputs[0], sigmoid.outputs[0]
    inner = _only(users[activated])
    if inner is None or Counter(inner.inputs) != Counter([gate_output, activated]) or len(users[gate_output]) != 2:
        return None
    last = _only(users[inner.outputs[0]])
    if last is None or inner.operator != "Mul" or last.operator != "Mul" or len(last.inputs) != 2:
        return None
    up_output = next(iter(set(last.inputs) - set(inner.outputs)), "")
    first, second = makers.get(gate_output), makers.get(up_output)
    if first is None or second is None or first is second or len(users[up_output]) != 1:
        return None
    return first, second, inner, last


def _only(nodes: list[Node]) -> Node | None:
    """The node, if there is exactly one."""
    return nodes[0] if len(nodes) == 1 else None


def _can_be_joined(first: Node, second: Node, domain: str, operator: str) -> bool:
    """Whether the matmuls have the same input and format, no bias, and their weights in the same file."""
    shapes = [[node.attributes.get(name) for name in SHAPE] for node in (first, second)]
    parts = [[name for name in OFFSETS if name in node.attributes] for node in (first, second)]
    return (
        all((node.domain, node.operator, len(node.inputs)) == (domain, operator, 1) for node in (first, second))
        and first.inputs == second.inputs
        and shapes[0] == shapes[1]
        and parts[0] == parts[1]
        and first.attributes.get("N", 1) % PANEL == 0
        and first.texts.get(FILE) == second.texts.get(FILE)
    )


def _joined(first: Node, second: Node, last: Node) -> Node:
    """The node that replaces the group; first, second: the gate and up matmuls; last: the node with its output."""
    node = Node(GATED, first.domain, list(first.inputs), list(last.outputs))
    for name in SHAPE:
        node.set(name, first.attributes[name])
    node.set(FILE, first.texts[FILE])
    for prefix, source in (("gate_", first), ("up_", second)):
        for name in (*OFFSETS, HALF):
            if name in source.attributes:
                node.set(prefix + name, source.attributes[name])
    return node
