"""The user's logits processor: a function that changes rows of logits, as a `RowEdit`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pard_onnx.models.checks import ReadOnly
from pard_onnx.models.errors import BadInput, shown

from .edits import Logits

LogitsProcessor = Callable[[Sequence[int], Logits], Logits]
WANTED = "must return the row: an array of numbers"


class Processor:
    """A `RowEdit` that calls the user's function. What the function raises ends the generation."""

    def __init__(self, function: LogitsProcessor) -> None:
        self._function = function
        self._tokens: tuple[Sequence[int], ReadOnly] | None = None  # the list that grows, and the view of it

    def edit(self, row: Logits, tokens: Sequence[int]) -> Logits:
        """See `RowEdit`. Raises BadInput, saying what is wrong, if the function returns no such row."""
        if self._tokens is None or self._tokens[0] is not tokens:
            self._tokens = tokens, ReadOnly(tokens)
        found = self._function(self._tokens[1], row)
        return checked_row(found, len(row))


def checked_row(found: object, size: int) -> Logits:
    """What a logits processor returned, as float32; BadInput for what is no row of `size` numbers with a finite
    maximum."""
    if not isinstance(found, np.ndarray):
        raise BadInput(f"logits_processor {WANTED} of shape ({size},), not {shown(found)}")
    if found.shape != (size,):
        raise BadInput(f"logits_processor {WANTED} of shape ({size},), not of shape {found.shape}")
    if found.dtype.kind not in "fiu":
        raise BadInput(f"logits_processor {WANTED}, not of the type {found.dtype}")
    with np.errstate(over="ignore"):  # a number that float32 lacks becomes infinite, which is refused next
        row: Logits = found.astype(np.float32, copy=False)
    largest = float(row.max())
    if not np.isfinite(largest):
        problem = {np.inf: "has an infinite logit", -np.inf: "forbids every id"}.get(largest, "has a NaN")
        raise BadInput(f"logits_processor returned a row that {problem}; leave at least one id a finite logit")
    return row
