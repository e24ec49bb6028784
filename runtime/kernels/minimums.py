"""Joins the product of a matrix that has minimums into one operator.

weight = scale * level + minimum is stored as a MatMulNBits, whose weights are scale * (level - 8), and a product that
is added to it: that of the activations' sums over blocks with scale * 8 + minimum. The kernels make one operator of
these eight nodes. Nodes that something else reads stay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from .nodes import Node

SCALES, MINIMUMS = 2, 6  # numbers of inputs; a joined node has MINIMUMS in addition
MIDDLE = 8  # among the levels of 4 bits


@dataclass(frozen=True, slots=True)
class Constants:
    """What is known of a graph's initializers, by name."""

    widened: Mapping[str, str]  # those in float16 in a data file, by the names of the Casts that make them float32
    sizes: Mapping[str, int]  # the number of values of those in float16
    numbers: Mapping[str, tuple[float, ...]]  # the values of those in int64 or float32 that the graph itself holds


def join_minimums(
    nodes: list[Node], is_supported: Callable[[Node], bool], constants: Constants, outputs: Collection[str]
) -> list[Node]:
    """The nodes, in which each matmul that can be joined gives the sum and has its minimums as input MINIMUMS.

    is_supported: whether a node is a matmul of the kernels whose tensors are all in one data file, with scales in
    float16. outputs: the names of the graph's outputs.
    """
    users: dict[str, list[Node]] = defaultdict(list)
    makers = {name: node for node in nodes for name in node.outputs}
    for node in nodes:
        for name in node.inputs:
            users[name].append(node)
    joined: set[int] = set()  # id() of the Adds that are gone
    for add in nodes:
        if (add.operator, add.domain, len(add.inputs)) != ("Add", "", 2):
            continue
        for product_name, offset_name in (add.inputs, add.inputs[::-1]):
            product, offset = makers.get(product_name), makers.get(offset_name)
            if product is None or offset is None or not is_supported(product):
                continue
            minimums = _minimums(product, offset, makers, constants)
            if minimums is None or len(users[product_name]) != 1 or product_name in outputs:
                continue
            product.inputs += [""] * (MINIMUMS - len(product.inputs)) + [minimums]
            product.outputs = list(add.outputs)
            joined.add(id(add))
            break
    return _with_readers([node for node in nodes if id(node) not in joined], outputs) if joined else nodes


def _minimums(product: Node, offset: Node, makers: Mapping[str, Node], constants: Constants) -> str | None:
    """The initializer with the minimums, if `offset` is the product of the sums of the blocks of product's input with
    them; None for any other node."""
    if (offset.operator, offset.domain) != ("MatMul", ""):
        return None
    sums, turned = (makers.get(name) for name in offset.inputs)
    if sums is None or turned is None or (sums.operator, turned.operator) != ("ReduceSum", "Transpose"):
        return None
    blocks = makers.get(sums.inputs[0])
    if blocks is None or blocks.operator != "Reshape" or blocks.inputs[0] != product.inputs[0]:
        return None
    block, numbers = product.attributes["block_size"], constants.numbers
    shape = (0, 0, product.attributes["K"] // block, block)
    by_block = numbers.get(blocks.inputs[1]) == shape and sums.attributes.get("keepdims", 1) == 0
    if not by_block or numbers.get(sums.inputs[-1]) != (-1,):
        return None
    weights = makers.get(turned.inputs[0])
    scaled = makers.get(weights.inputs[0]) if weights and weights.operator == "Add" else None
    if weights is None or scaled is None or scaled.operator != "Mul":
        return None
    if scaled.inputs[0] != product.inputs[SCALES] or numbers.get(scaled.inputs[1]) != (MIDDLE,):
        return None
    scales, minimums = (constants.widened.get(name) for name in (scaled.inputs[0], weights.inputs[1]))
    sizes = [constants.sizes[name] for name in (scales, minimums) if name is not None]
    return minimums if len(sizes) == 2 and sizes[0] == sizes[1] else None


def _with_readers(nodes: list[Node], outputs: Collection[str]) -> list[Node]:
    """The nodes of which an output is read, by a node that stays or as the graph's."""
    read = set(outputs)
    kept = []
    for node in reversed(nodes):  # readers come after what they read
        if read.intersection(node.outputs):
            read.update(node.inputs)
            kept.append(node)
    return kept[::-1]
