"""Dataclasses to JSON and back; what does not fit is refused by its path."""

import json
from dataclasses import dataclass, replace
from typing import Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pard_onnx.models.errors import BadArtifact, BadInput
from pard_onnx.models.records import from_json, to_json


@dataclass(frozen=True, slots=True)
class Leaf:
    theta: float
    count: int = 3
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Tree:
    leaf: Leaf
    kind: Literal["oak", "fir"]
    leaves: tuple[Leaf, ...] = ()
    pair: tuple[str, int] = ("a", 1)
    other: Optional[Leaf] = None  # noqa: UP045  both spellings are read
    alive: bool = True
    grade: Literal[1, 2] = 1


LEAF = {"theta": 1.5, "count": 2, "name": "né"}
TREE = {"leaf": LEAF, "kind": "fir", "leaves": [LEAF, {"theta": 1}], "pair": ["b", 2], "other": LEAF, "alive": False}

WHOLE = st.integers(-(1 << 63), (1 << 63) - 1)
leaves = st.builds(Leaf, st.floats(allow_nan=False, allow_infinity=False), WHOLE, st.none() | st.text())


@given(st.builds(Tree, leaves, st.sampled_from(["oak", "fir"]), st.lists(leaves).map(tuple), other=st.none() | leaves))
def test_round_trip(tree):
    assert tree == from_json(Tree, json.loads(json.dumps(to_json(tree))))


def test_reads_values_and_defaults():
    leaf = Leaf(1.5, 2, "né")
    assert Tree(leaf, "fir", (leaf, Leaf(1.0)), ("b", 2), leaf, False) == from_json(Tree, TREE)
    assert Tree(Leaf(2.0), "oak") == from_json(Tree, {"leaf": {"theta": 2}, "kind": "oak"})
    assert isinstance(from_json(Leaf, {"theta": 2}).theta, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leaf": LEAF | {"thetta": 1}}, "leaf: unknown key 'thetta'; the nearest known one is 'theta'"),
        ({"qqq": 1}, "unknown key 'qqq'; the nearest known one is "),
        ({"leaf": {"count": 1}}, "leaf.theta: is missing"),
        ({"leaf": LEAF | {"theta": "1"}}, "leaf.theta: must be a number, not '1'"),
        ({"leaf": LEAF | {"theta": True}}, "leaf.theta: must be a number, not True"),
        ({"leaf": LEAF | {"count": 1.0}}, "leaf.count: must be a whole number, not 1.0"),
        ({"leaf": LEAF | {"count": None}}, "leaf.count: must be a whole number, not null"),
        ({"leaf": LEAF | {"name": 5}}, "leaf.name: must be text, not 5"),
        ({"leaf": [1]}, "leaf: must be an object, not a list"),
        ({"kind": "elm"}, "kind: must be one of 'oak', 'fir', not 'elm'"),
        ({"leaves": LEAF}, "leaves: must be a list, not an object"),
        ({"leaves": [LEAF, {}]}, "leaves[1].theta: is missing"),
        ({"pair": ["a"]}, "pair: must have 2 items, not 1"),
        ({"pair": ["a", "b"]}, "pair[1]: must be a whole number, not 'b'"),
        ({"grade": True}, "grade: must be one of 1, 2, not True"),
        ({"alive": 1}, "alive: must be true or false, not 1"),
    ],
)
def test_refuses_by_path(change, message):
    with pytest.raises(BadArtifact) as caught:
        from_json(Tree, TREE | change, error=BadArtifact, context="file: ")
    assert str(caught.value).startswith(f"file: {message}")
    assert "\n" not in str(caught.value)


def test_top_level_must_be_an_object():
    with pytest.raises(BadInput, match=r"^must be an object, not null$"):
        from_json(Tree, None)


def test_only_records_have_a_json_form():
    with pytest.raises(TypeError, match="set has no JSON form"):
        to_json(replace(from_json(Tree, TREE), pair={1}))
