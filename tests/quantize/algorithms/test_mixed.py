"""Which matrices get 8 bits: pure decisions."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadInput
from pard_onnx.models.precision import INT4, INT8, Recipe
from pard_onnx.quantize.algorithms.mixed import (
    PROTECTION,
    Unit,
    budget_bytes,
    choose_bits,
    extra_bytes,
    matrix_bytes,
    with_choices,
)

RECIPE = Recipe(INT4, INT4, INT4)
UNITS = st.lists(
    st.builds(
        Unit, st.sampled_from([("a.self_attn.k_proj",), ("b.mlp.up_proj",)]), st.floats(0, 1), st.integers(1, 99)
    ),
    max_size=12,
)


@given(UNITS, st.integers(0, 500))
def test_the_room_is_kept_and_used(units: list[Unit], room: int) -> None:
    found = choose_bits(units, room)
    used = sum(choice.extra_bytes for choice in found if choice.bits == 8)
    assert used <= room and len(found) == len(units)
    assert all(choice.extra_bytes > room - used for choice in found if choice.bits == 4)


def test_what_loses_most_a_byte_comes_first_and_the_protected_lose_more() -> None:
    kv = Unit(("l.self_attn.k_proj", "l.self_attn.v_proj"), 0.1 + 0.5 / PROTECTION, 10)
    small, large = Unit(("l.self_attn.o_proj",), 0.5, 10), Unit(("l.mlp.down_proj",), 0.9, 30)
    eight = {room: [c.names for c in choose_bits([large, small, kv], room) if c.bits == 8] for room in (10, 20, 40, 50)}
    first = [kv.names, small.names]
    assert eight == {10: first[:1], 20: first, 40: first, 50: [*first, large.names]}


def test_a_mixed_recipe_names_what_was_chosen() -> None:
    units = [
        Unit(("lm_head",), 1.0, 1),
        Unit(("model.layers.0.mlp.down_proj",), 0.5, 1),
        Unit(("model.embed_tokens",), 0, 9),
    ]
    found = with_choices(RECIPE, choose_bits(units, 2))
    assert (found.head, found.embedding) == (INT8, INT4)
    assert found.of("model.layers.0.mlp.down_proj") == INT8 and found.of("model.layers.1.mlp.down_proj") == INT4


@pytest.mark.parametrize("tied", (True, False))
def test_budgets(tmp_path: Path, tiny: Callable[..., Path], tied: bool) -> None:
    checkpoint = Checkpoint.open(tiny(tmp_path / "model", tied=tied))
    most = matrix_bytes(checkpoint, Recipe(INT8, INT8, INT8))
    assert budget_bytes("1", checkpoint, RECIPE) == most
    assert budget_bytes("0.2MB", checkpoint, RECIPE) == budget_bytes(" 0.2 MB", checkpoint, RECIPE) == 200_000
    assert matrix_bytes(checkpoint, RECIPE) + extra_bytes(checkpoint, RECIPE, ["lm_head"]) == matrix_bytes(
        checkpoint, with_choices(RECIPE, choose_bits([Unit(("lm_head",), 1, 1)], 1))
    )
    for text, reason in (("0.1", "4 bits take"), ("0.01MB", "4 bits take"), ("half", "as 0.6"), ("-1", "as 0.6")):
        with pytest.raises(BadInput, match=reason):
            budget_bytes(text, checkpoint, RECIPE)
