"""What the tokens so far, and logit_bias, do to a row of logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .settings import Sampling

Floats = NDArray[np.float32]
FIRST_SLOTS = 64
LARGEST = float(np.finfo(np.float32).max)


class Penalties:
    """Counts of one generation's tokens, brought up to date as they come.

    vocabulary: ids from there on have no logit and are passed over. prompt_length: the first tokens, which the
    repetition penalty alone sees.
    """

    def __init__(self, sampling: Sampling, vocabulary: int, prompt_length: int) -> None:
        self._sampling, self._vocabulary, self._prompt = sampling, vocabulary, prompt_length
        repeats = sampling.repetition_penalty != 1
        self._counts = repeats or bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._length = 0 if repeats else prompt_length  # tokens counted, or passed over
        self._slots: dict[int, int] = {}  # id to its place in the next two, in order of coming
        self._ids = np.zeros(FIRST_SLOTS, np.int64)
        self._said = np.zeros(FIRST_SLOTS, np.int64)  # times in the output
        self._certain = 0  # slots of committed tokens
        pairs = dict(sampling.logit_bias)
        self._biased = np.array(list(pairs), np.int64)
        self._biases = np.array(list(pairs.values()), np.float64)

    def follow(self, tokens: Sequence[int]) -> None:
        """Count what `tokens` (the prompt and the output so far) has beyond what was counted: O(new tokens)."""
        if not self._counts:
            return
        if len(tokens) < self._length:
            raise ValueError(f"{len(tokens)} tokens, but {self._length} were counted; they may only grow")
        for at in range(self._length, len(tokens)):
            self._count(tokens[at], 1 if at >= self._prompt else 0)
        self._length, self._certain = len(tokens), len(self._slots)

    def lead(self, token: int) -> None:
        """Count a token that is not committed yet, as one of the output; `back` forgets it."""
        if self._counts:
            self._count(token, 1)

    def back(self, tokens: Sequence[int]) -> None:
        """Forget `tokens`, all that `lead` was told since the last `follow`."""
        if not self._counts:
            return
        for token in tokens:
            self._said[self._slots[token]] -= 1
        while len(self._slots) > self._certain:
            self._slots.popitem()

    def apply(self, logits: Floats, scratch: Floats) -> Floats:
        """The logits [vocabulary] with penalties and bias: themselves if there are none, else in scratch."""
        size = len(self._slots)
        if not size and not self._biased.size:
            return logits
        np.copyto(scratch, logits)
        if size:
            set_logits(scratch, self._ids[:size], self._penalized(logits, size))
        if self._biased.size:
            set_logits(scratch, self._biased, scratch[self._biased] + self._biases)
        return scratch

    def _penalized(self, logits: Floats, size: int) -> NDArray[np.float64]:
        """The counted ids' logits after the three penalties, [size]."""
        sampling, said = self._sampling, self._said[:size]
        out = logits[self._ids[:size]].astype(np.float64)
        with np.errstate(over="ignore"):
            out = np.where(out > 0, out / sampling.repetition_penalty, out * sampling.repetition_penalty)
        return out - (sampling.presence_penalty * (said > 0) + sampling.frequency_penalty * said)

    def _count(self, token: int, times: int) -> None:
        if not 0 <= token < self._vocabulary:
            return
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == self._ids.size:
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._said = np.concatenate([self._said, np.zeros_like(self._said)])
        self._ids[slot] = token
        self._said[slot] += times


def set_logits(logits: Floats, ids: NDArray[np.int64], values: NDArray[np.float64]) -> None:
    """Write float64 values as float32: too small ones become -inf, too large ones stay finite."""
    with np.errstate(over="ignore"):
        logits[ids] = np.minimum(values, LARGEST)
