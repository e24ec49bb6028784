"""Log probabilities of tokens: of the target's own distribution, before penalties, bias, edits and filters.

They are the log-softmax of a row of logits over the ids that the model may write, computed in float64 for each row by
itself. A row of logits is the same bits whatever was drafted (see exactness in docs/architecture.md), and so are these.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.checks import require_whole
from pard_onnx.models.errors import BadInput, shown

from .edits import Logits
from .sampler import Chooser

MOST_TOP = 20  # as in OpenAI's interface
BLOCK = 256  # ids
LEAST = -9999.0  # what OpenAI's interface has for a probability of 0, which JSON cannot write


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log probability, given all tokens before it."""

    token: int
    text: str  # of this token alone; the replacement character stands where it is a part of a character
    bytes: builtins.bytes  # of this token alone; joined, those of several tokens are the UTF-8 of their text
    logprob: float  # natural logarithm; -inf for an id that the model cannot write
    top: tuple[TokenLogprob, ...] = ()  # the most likely tokens for this position, the most likely one first

    def openai(self) -> dict[str, Any]:
        """The object that OpenAI's `logprobs.content` has for this token."""
        return self._named() | {"top_logprobs": [other._named() for other in self.top]}

    def _named(self) -> dict[str, Any]:
        return {"token": self.text, "logprob": max(self.logprob, LEAST), "bytes": list(self.bytes)}


def checked_top(name: str, value: object) -> int | None:
    """The user's `logprobs` or `prompt_logprobs`; BadInput for what is neither None nor a number of tokens."""
    if value is None:
        return None
    if isinstance(value, bool):
        raise BadInput(f"{name} is the number of most likely tokens to name, 0 to {MOST_TOP}, or None, not {value}")
    try:
        return require_whole(name, value, 0, MOST_TOP)
    except BadInput:
        raise BadInput(f"{name} must be from 0 to {MOST_TOP}, or None, not {shown(value)}") from None


class RowLogprobs:
    """Computes the log probabilities of one generation, row by row. A row costs a few passes over it."""

    def __init__(self, vocabulary: int, top: int, token_bytes: Callable[[int], bytes]) -> None:
        """vocabulary: ids 0..vocabulary-1 can be written; rows may be longer. top: the number of most likely tokens to
        name. token_bytes: of an id."""
        self._vocabulary, self._top, self._token_bytes = vocabulary, top, token_bytes
        self._weights: NDArray[np.float64] = np.empty(vocabulary, np.float64)

    def of(self, row: Logits, token: int) -> TokenLogprob:
        """The token, by the row of logits from which it follows; the row has a finite maximum."""
        row = row[: self._vocabulary]
        largest = float(row.max())
        np.subtract(row, largest, out=self._weights, dtype=np.float64)
        np.exp(self._weights, out=self._weights)
        total = largest + float(np.log(self._weights.sum()))
        best = tuple(self._described(id_, row, total) for id_ in most_likely(row, self._top))
        return self._described(token, row, total, best)

    def _described(self, id_: int, row: Logits, total: float, best: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        raw = self._token_bytes(id_)
        return TokenLogprob(id_, raw.decode(errors="replace"), raw, float(row[id_]) - total, best)


def most_likely(row: Logits, count: int) -> list[int]:
    """The ids of the row's largest logits, the largest first; of equal ones, the lowest id. No id whose logit is -inf.

    Fewer than `count` where the row has no more.
    """
    if count == 0:
        return []
    if count == 1:
        return [int(row.argmax())]
    # The `count` blocks with the largest maxima have so many ids of at least the smallest of these maxima, so that no
    # smaller logit counts. This is ten times as fast as a partition of the row.
    width = max(1, min(BLOCK, len(row) // count))
    maxima = np.maximum.reduceat(row, np.arange(0, len(row), width))
    least = np.sort(maxima)[-min(count, len(maxima))]
    ids = np.flatnonzero(row >= least if least > -np.inf else row > -np.inf)
    order = np.lexsort((ids, -row[ids]))[:count]
    found: list[int] = ids[order].tolist()
    return found


class LogprobChooser:
    """A `Chooser` that also computes the log probabilities of the tokens that another one chooses."""

    def __init__(self, inner: Chooser, rows: RowLogprobs) -> None:
        self._inner, self._rows = inner, rows
        self.found: tuple[TokenLogprob, ...] = ()  # of the tokens of the last round

    def choose(self, rows: Logits, committed: Sequence[int], drafts: Sequence[int]) -> list[int]:
        """See `Chooser`."""
        tokens = self._inner.choose(rows, committed, drafts)
        self.found = tuple(self._rows.of(row, token) for row, token in zip(rows, tokens, strict=False))
        return tokens
