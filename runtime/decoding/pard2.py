"""PARD-2 (arXiv 2605.08632, AMD-AGI/PARD) in target-dependent mode: a parallel draft that reads its target's features.

The draft's row of a token needs the target's features of the token before it, so the target runs first and the draft
follows. Off by one, drafts are accepted far less often, and nothing else shows it: `Pard2Drafter._step` is the one
place that pairs tokens with features.

A token's features take as much memory as a few layers of its KV rows (64 KB for four layers of an 8B model in
float32). So they are kept until the draft has read them, and a few tokens longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pard_onnx.models.spec import TargetFeatures
from pard_onnx.runtime.sessions.session import do_nothing
from pard_onnx.runtime.tuning.steps import PREFILL_CHUNK

from .drafter import DraftMemory, DraftModel, PardDrafter
from .shared_ids import SharedIds

READERS = {"add": "pard2", "concat": "p-eagle"}  # in `Stats.sources`, by how the draft joins features and embeddings
# Of the tokens that the draft has read, so many have their features kept: a conversation is often cut a few tokens
# before its end, where the text of a reply tokenizes to other ids than were generated.
KEPT_BEHIND = 16
# Of features that wait for the draft: 2,048 tokens of an 8B model. Time to the first token is plain decoding's for a
# prompt of so many tokens; of a longer one the draft reads the beginning before that token. While other drafts are
# verified, twice as many may wait before the oldest are dropped.
WAITING_BYTES = 128 << 20
RECOMPUTED = 16  # the most tokens that the target computes again for their features alone


class Pard2Drafter(PardDrafter):
    """A `PardDrafter` whose model reads, beside each token, the target's features of the token before it.

    The conversation's first token has none before it, and zeros in their place. A token whose features nobody knows
    (they were computed for another drafter, or by a generation without drafts) is read as in target-independent mode.
    """

    def __init__(
        self,
        model: DraftModel,
        features: TargetFeatures,
        chunk: int = PREFILL_CHUNK,
        memory: DraftMemory | None = None,
        shared: SharedIds | None = None,
        between_chunks: Callable[[], None] = do_nothing,
        recomputed: int = RECOMPUTED,
        waiting_bytes: int = WAITING_BYTES,
    ) -> None:
        """features: what the draft reads; the rest as of `PardDrafter`.

        recomputed: the most tokens that the target computes again where their features are not known; 0 where a step of
        other tokens would leave other rows, so that the text would depend on it. waiting_bytes: of the features that
        wait for the draft.
        """
        super().__init__(model, chunk, memory, shared, between_chunks, READERS[features.join])
        self._features = features
        self._recomputed = recomputed
        self._most_waiting = max(chunk, waiting_bytes // (4 * features.width))  # tokens

    @property
    def seen(self) -> int:
        return self._memory.seen

    def begin(self, computed: int) -> None:
        """See `Drafter.begin`. A few tokens are computed again, more are read without their features."""
        memory = self._memory
        first = max(0, self.length - 1)  # the next token to read is that of position `length`
        unknown = next((token for token in range(first, computed) if memory.feature(token) is None), computed)
        if computed - unknown <= self._recomputed:
            memory.truncate(min(unknown, memory.seen))
        else:
            memory.add([None] * (computed - memory.seen))

    def saw(self, ids: Sequence[int], features: Any) -> None:
        """See `Drafter.saw`. If the draft is not used for long, the oldest features are dropped."""
        self._memory.add(row.copy() for row in features)
        if len(self._memory.features) > 2 * self._most_waiting:
            self._memory.drop_before(self._memory.seen - self._most_waiting)

    def keep_up(self, committed: Sequence[int]) -> None:
        """See `Drafter.keep_up`: the draft reads the oldest tokens where the features of too many wait."""
        while len(self._memory.features) > self._most_waiting and self.length + self._chunk <= self.seen:
            self._read(committed, self.length + 1)

    def rollback(self, length: int) -> None:
        super().rollback(length)
        self._memory.truncate(length)

    def _step(self, ids: Sequence[int], k: int) -> tuple[Any, Any]:
        first = self.length
        drafts = self._model.step(ids, k, self._rows(first - 1, len(ids)))
        if not self.start:  # a cache that begins with a window may be filled from the first token on later
            self._memory.drop_before(min(self._memory.seen, first + len(ids) - 1 - KEPT_BEHIND))
        return drafts

    def _rows(self, first: int, count: int) -> Any:
        """The features of so many tokens from `first` on, which is -1 before the conversation, [count, columns].

        With a bias, the last column is 1, except where the features are not known.
        """
        width, bias = self._features.width, self._features.bias
        rows = np.zeros((count, width + bias), np.float32)
        for row, token in zip(rows, range(first, first + count), strict=True):
            known = self._memory.feature(token)
            if known is not None:
                row[:width] = known
            if bias and (known is not None or token < 0):
                row[width] = 1
        return rows
