"""Blocks of rows: in order, whole, and no larger than said."""

from itertools import pairwise
from math import prod

from hypothesis import given
from hypothesis import strategies as st

from pard_onnx.models.checkpoints.tensors import BLOCK_VALUES, row_blocks

SHAPES = st.one_of(st.tuples(st.integers(1, 10**7)), st.tuples(st.integers(1, 3000), st.integers(1, 2 * BLOCK_VALUES)))


@given(SHAPES)
def test_row_blocks_cover_the_rows_in_order(shape: tuple[int, ...]) -> None:
    blocks = list(row_blocks(shape))
    assert blocks[0].start == 0 and blocks[-1].stop == shape[0]
    assert all(one.stop == two.start for one, two in pairwise(blocks))
    for block in blocks:
        rows = block.stop - block.start
        assert rows == 1 or (rows > 1 and rows * prod(shape[1:]) <= BLOCK_VALUES)
