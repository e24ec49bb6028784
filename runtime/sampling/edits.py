"""`RowEdit`: what changes a row of logits before a token is chosen from it, such as a grammar, a budget or a hook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


class RowEdit(Protocol):
    """Changes the rows of one generation, from which its tokens are then chosen.

    The result must depend on the arguments alone: then the text of speculative decoding is that of plain decoding.
    An edit may keep a state that only moves forward: of two calls, the later one has the tokens of the earlier one, and
    more. It is called once for each row that a token is chosen from, and for no row after the first draft that differs.
    """

    def edit(self, row: Logits, tokens: Sequence[int]) -> Logits:
        """The row to choose from: `row` itself, changed or not, or another array of its shape and type.

        row: [vocabulary], after penalties and logit_bias; a copy of the target's row. -inf forbids an id.
        tokens: all ids before this row, those of the prompt and accepted drafts of this round included; do not change
        or keep the list, which grows.
        """
        ...
