"""A conversation's memory: the KV caches of both models, and the tokens that they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from pard_onnx.runtime.sessions.kv_cache import KvCache


@dataclass(slots=True)
class Caches:
    """tokens: the conversation so far; each cache holds rows of a prefix of it (`loop.decode` sees to that).

    draft_start: the first token that the draft's cache holds (see `PardDrafter`).
    """

    target: KvCache
    draft: KvCache | None
    tokens: list[int] = field(default_factory=list)
    draft_start: int = 0

    def keep(self, ids: Sequence[int]) -> int:
        """Forget what is not the beginning of `ids`; how many of them are kept."""
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.tokens, ids, strict=False)))
        self.target.rollback(min(same, self.target.length))
        if self.draft:
            if same <= self.draft_start:
                self.draft.rollback(0)  # first, so that an interruption in between finds no row in the wrong place
                self.draft_start = 0
            self.draft.rollback(min(same - self.draft_start, self.draft.length))
        self.tokens = list(ids)
        return self.target.length
