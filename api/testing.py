"""Scripted models for tests of drafters: a target whose text is any function, without a graph and without weights.

A drafter of your own is tried like this:

    from pard_onnx.testing import NoDraft, ScriptedTarget, continuation

    def next_token(tokens):
        return (tokens[-1] + 1) % 7

    plain = continuation(ScriptedTarget(next_token), NoDraft(), [0, 1], 50)
    assert continuation(ScriptedTarget(next_token), MyDrafter(), [0, 1], 50) == plain

Whatever a drafter proposes, the text is the target's own; a drafter can only be faster or slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pard_onnx.runtime.decoding.drafter import (
    NOTHING,
    Drafter,
    DraftMemory,
    DraftModel,
    NoDraft,
    PardDrafter,
    Proposal,
)
from pard_onnx.runtime.decoding.loop import Settings, Step, TargetModel, decode
from pard_onnx.runtime.decoding.pard2 import Pard2Drafter
from pard_onnx.runtime.sessions.session import Rows

__all__ = [
    "MASK",
    "NOTHING",
    "DraftMemory",
    "DraftModel",
    "Drafter",
    "NoDraft",
    "Pard2Drafter",
    "PardDrafter",
    "Proposal",
    "Rows",
    "ScriptedDraft",
    "ScriptedDrafter",
    "ScriptedTarget",
    "Settings",
    "Step",
    "TargetModel",
    "continuation",
    "decode",
]

MASK = -1  # stands in a `ScriptedDraft`'s cache for a mask's row


@dataclass
class ScriptedTarget:
    """A `TargetModel` whose next token is any function of the tokens before it."""

    choose: Callable[[Sequence[int]], int]  # the next token, below `vocabulary`
    cache: list[int] = field(default_factory=list)  # the tokens whose rows it holds
    widths: list[int] = field(default_factory=list)  # of each step so far: its tokens
    kept: list[int] = field(default_factory=list)  # of each step so far: the rows that were asked for
    fail_at: int | None = None  # the step that raises RuntimeError
    vocabulary: int = 7
    # Whether steps give features: of the token t at position p the row [p, t], so that a shift by one shows.
    gives_features: bool = False

    @property
    def length(self) -> int:
        return len(self.cache)

    def step(self, ids: Sequence[int], keep: int) -> Rows:
        """Append ids; each of the last `keep` rows has a logit of 1 for the next token, and 0 for all others."""
        assert 0 < keep <= len(ids)
        if len(self.widths) == self.fail_at:
            raise RuntimeError("the device is gone")
        self.cache += ids
        self.widths.append(len(ids))
        self.kept.append(keep)
        logits = np.zeros((keep, self.vocabulary), np.float32)
        positions = range(len(self.cache) - keep, len(self.cache))
        for row, position in enumerate(positions):
            logits[row, self.choose(self.cache[: position + 1])] = 1
        fed = range(len(self.cache) - len(ids), len(self.cache))
        features = np.array([[position, self.cache[position]] for position in fed], np.float32)
        return Rows(logits, features if self.gives_features else None)

    def rollback(self, length: int) -> None:
        assert 0 <= length <= len(self.cache)
        del self.cache[length:]


@dataclass
class ScriptedDraft:
    """A parallel `DraftModel` for `PardDrafter`. Masks stand in its cache as `MASK` until they are rolled back."""

    guess: Callable[[Sequence[int], int], int]  # from the real tokens and the position among the drafts
    cache: list[int] = field(default_factory=list)
    fed: list[int] = field(default_factory=list)  # of each step so far: its real tokens
    features: list[Any] = field(default_factory=list)  # of each step so far: the features that it was given
    interrupt_at: int | None = None  # the step at whose end KeyboardInterrupt is raised

    @property
    def length(self) -> int:
        return len(self.cache)

    def step(
        self, ids: Sequence[int], draft_length: int, features: Any = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        assert features is None or len(features) == len(ids)
        assert len(ids) > 0 and draft_length > 0
        assert MASK not in self.cache
        self.cache += ids
        self.fed.append(len(ids))
        self.features.append(features)
        drafts = np.array([self.guess(self.cache, i) for i in range(draft_length)], np.int64)
        self.cache += [MASK] * (draft_length - 1)
        if len(self.fed) == self.interrupt_at:
            raise KeyboardInterrupt
        return drafts, np.ones(draft_length, np.float32)

    def rollback(self, length: int) -> None:
        assert 0 <= length <= len(self.cache)
        del self.cache[length:]


class ScriptedDrafter(Drafter):
    """A drafter that proposes what its script says, even more or fewer tokens than asked for.

    With `reads_features` it keeps the features of `saw` in `memory`, as a draft that reads the target's
    hidden states does.
    """

    def __init__(
        self,
        script: Callable[[Sequence[int], int], Sequence[int]],
        *,
        reads_features: bool = False,
        memory: DraftMemory | None = None,
    ) -> None:
        """script: from the conversation so far and the number of tokens wanted; memory: of the sequence."""
        self.script = script
        self.reads_features = reads_features
        self.memory = memory or DraftMemory()
        self.observed: list[tuple[int, int]] = []  # of each round: drafts that were verified, and that matched
        self.seen_tokens: list[int] = []  # all tokens of `saw`, in order
        self._length = 0

    @property
    def length(self) -> int:
        return self._length

    @property
    def seen(self) -> int | None:
        return self.memory.seen if self.reads_features else None

    def propose(self, committed: Sequence[int], k: int) -> Proposal:
        self._length = len(committed)
        ids = tuple(self.script(committed, k))
        return Proposal(ids, (1.0,) * len(ids), "script")

    def saw(self, ids: Sequence[int], features: NDArray[np.float32] | None) -> None:
        self.seen_tokens += ids
        if self.reads_features:
            assert features is not None and len(features) == len(ids)
            self.memory.add(row.copy() for row in features)

    def observe(self, drafted: int, matched: int) -> None:
        self.observed.append((drafted, matched))

    def rollback(self, length: int) -> None:
        self._length = min(length, self._length)
        self.memory.truncate(length)


def continuation(
    target: TargetModel, drafter: Drafter, prompt: Sequence[int], max_new_tokens: int, draft_length: int = 7
) -> list[int]:
    """The tokens that the target writes after the prompt, with the drafter's help."""
    committed = list(prompt)
    settings = Settings(max_new_tokens, draft_length, capacity=len(prompt) + max_new_tokens)
    for _ in decode(target, drafter, committed, settings):
        pass
    return committed[len(prompt) :]
