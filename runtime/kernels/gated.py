"""Two matmuls and what joins them, silu(x * gate) * (x * up), as one operator.

One pass over the activations and one over the threads instead of four, and the products never leave the cache.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection

from .nodes import Node

GATED = "GatedMatMulNBits"
PANEL = 16  # outputs that the kernels compute together
SHAPE = ("K", "N", "bits", "block_size")
OFFSETS = ("B_offset", "scales_offset", "zero_points_offset")
FILE = "weights_file"


def gate(nodes: list[Node], domain: str, operator: str, outputs: Collection[str]) -> list[Node]:
    """The nodes with each gate, up, Sigmoid, Mul, Mul replaced where the last of them was.

    domain, operator: of the matmuls. outputs: the graph's, which must stay.
    """
    users: dict[str, list[Node]] = defaultdict(list)
    makers = {name: node for node in nodes for name in node.outputs}
    for node in nodes:
        for name in node.inputs:
            users[name].append(node)
    gone: dict[int, Node | None] = {}  # by id: what stands there instead
    for sigmoid in nodes:
        if (sigmoid.operator, sigmoid.domain) != ("Sigmoid", ""):
            continue
        found = _chain(sigmoid, makers, users)
        if found is None:
            continue
        first, second, inner, last = found
        inside = [*first.outputs, *second.outputs, *sigmoid.outputs, *inner.outputs]
        if _fit(first, second, domain, operator) and not any(name in outputs for name in inside):
            gone |= {id(node): None for node in (first, second, sigmoid, inner)}
            gone[id(last)] = _joined(first, second, last)
    kept = (gone.get(id(node), node) for node in nodes)
    return [node for node in kept if node is not None]


def _chain(
    sigmoid: Node, makers: dict[str, Node], users: dict[str, list[Node]]
) -> tuple[Node, Node, Node, Node] | None:
    """gate, up, and the two Muls around `sigmoid`; None where its surroundings are other."""
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
    return nodes[0] if len(nodes) == 1 else None


def _fit(first: Node, second: Node, domain: str, operator: str) -> bool:
    """Two matmuls of the same input and format, without bias, whose weights lie in the same file."""
    shapes = [[node.attributes.get(name) for name in SHAPE] for node in (first, second)]
    zeros = [OFFSETS[2] in node.attributes for node in (first, second)]
    return (
        all((node.domain, node.operator, len(node.inputs)) == (domain, operator, 1) for node in (first, second))
        and first.inputs == second.inputs
        and shapes[0] == shapes[1]
        and zeros[0] == zeros[1]
        and first.attributes.get("N", 1) % PANEL == 0
        and first.texts.get(FILE) == second.texts.get(FILE)
    )


def _joined(first: Node, second: Node, last: Node) -> Node:
    node = Node(GATED, first.domain, list(first.inputs), list(last.outputs))
    for name in SHAPE:
        node.set(name, first.attributes[name])
    node.set(FILE, first.texts[FILE])
    for prefix, source in (("gate_", first), ("up_", second)):
        for name in OFFSETS:
            if name in source.attributes:
                node.set(prefix + name, source.attributes[name])
    return node
