"""`Sequence`: one conversation as a value. Several may be alive in one engine and take turns step by step."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from pard_onnx.models.checks import common_prefix

from .decoding.drafter import DraftMemory
from .sessions.kv_cache import KvCache


@dataclass(slots=True)
class Sequence:
    """The tokens of a conversation, and what both models have computed of them.

    Each cache holds the rows of consecutive tokens: the target's of tokens[:target.length], the draft's of
    tokens[memory.start : memory.start + draft.length]. `decode` keeps that true however a generation ends.
    """

    target: KvCache  # of the target
    draft: KvCache | None = None  # of the draft; None for a target alone
    tokens: list[int] = field(default_factory=list)  # the conversation so far, prompt included
    memory: DraftMemory = field(default_factory=DraftMemory)  # what a drafter keeps of it beside its KV cache
    chunked: int = 0  # the first tokens whose rows were computed in whole prefill chunks (see `PrefixCache`)

    @property
    def bytes(self) -> int:
        """The memory of the KV rows that were ever written, and of the features that wait for the draft."""
        return self.target.bytes + (self.draft.bytes if self.draft else 0) + self.memory.bytes

    @property
    def can_be_copied(self) -> bool:
        """Whether copying rows takes less time than computing them."""
        return self.target.can_be_copied and (self.draft is None or self.draft.can_be_copied)

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on, and all that was computed of them."""
        # The tokens last: an interruption in between may leave too few rows, never rows of other tokens.
        self.target.rollback(min(length, self.target.length))
        if self.draft:
            if length <= self.memory.start:
                self.draft.rollback(0)  # first, so that an interruption in between finds no row in the wrong place
                self.memory.start = 0
            self.draft.rollback(min(length - self.memory.start, self.draft.length))
        self.memory.truncate(length)
        self.chunked = min(self.chunked, length)
        del self.tokens[length:]

    def continue_with(self, ids: Tokens[int]) -> int:
        """Become a conversation of these tokens; how many of them the target has computed already.

        What was computed of the common beginning is kept, the rest is forgotten.
        """
        self.truncate(common_prefix(self.tokens, ids))
        self.tokens = list(ids)
        return self.target.length

    def fork(self, new_sequence: Callable[[], Sequence], length: int | None = None) -> Sequence:
        """An independent copy, KV rows included; new_sequence: makes an empty one for the same models.

        length: the first so many tokens alone; None for all.
        """
        end = len(self.tokens) if length is None else length
        copy = new_sequence()
        copy.tokens = self.tokens[:end]
        copy.target.copy_rows(self.target, min(self.target.length, end))
        if self.draft and copy.draft and end > self.memory.start:
            copy.draft.copy_rows(self.draft, min(self.draft.length, end - self.memory.start))
            copy.memory = self.memory.copy()
            copy.memory.truncate(end)
        copy.chunked = min(self.chunked, end)
        return copy
