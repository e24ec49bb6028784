"""Repetition, presence and frequency penalties, and logit_bias, applied to a row of logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .settings import Sampling

Floats = NDArray[np.float32]
FIRST_SLOTS = 64
LARGEST = float(np.finfo(np.float32).max)


class Penalties:
    """The counts of one generation's tokens, and the penalties that follow from them."""

    def __init__(self, sampling: Sampling, vocabulary: int, prompt_length: int) -> None:
        """vocabulary: tokens with higher ids have no logit and are not counted.

        prompt_length: the number of prompt tokens, which only the repetition penalty counts.
        """
        self._sampling, self._vocabulary, self._prompt = sampling, vocabulary, prompt_length
        repeats = sampling.repetition_penalty != 1
        self._counts = repeats or bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._length = 0 if repeats else prompt_length  # tokens that were counted, or need not be
        self._slots: dict[int, int] = {}  # by id: its index in the next two arrays, in the order of occurrence
        self._ids = np.zeros(FIRST_SLOTS, np.int64)
        self._occurrences = np.zeros(FIRST_SLOTS, np.int64)  # in the output
        self._committed_slots = 0
        pairs = dict(sampling.logit_bias)
        self._biased = np.array(list(pairs), np.int64)
        self._biases = np.array(list(pairs.values()), np.float64)

    def count_committed(self, tokens: Sequence[int]) -> None:
        """Count the new tokens of `tokens`, the prompt and the output so far; takes O(new tokens)."""
        if not self._counts:
            return
        if len(tokens) < self._length:
            raise ValueError(f"{len(tokens)} tokens, but {self._length} were counted; they may only grow")
        for position in range(self._length, len(tokens)):
            self._count(tokens[position], 1 if position >= self._prompt else 0)
        self._length, self._committed_slots = len(tokens), len(self._slots)

    def count_draft(self, token: int) -> None:
        """Count an accepted draft as output, before it is committed; `uncount_drafts` undoes this."""
        if self._counts:
            self._count(token, 1)

    def uncount_drafts(self, tokens: Sequence[int]) -> None:
        """Undo `count_draft` of `tokens`, which are all drafts since the last `count_committed`."""
        if not self._counts:
            return
        for token in tokens:
            self._occurrences[self._slots[token]] -= 1
        while len(self._slots) > self._committed_slots:
            self._slots.popitem()

    def apply(self, logits: Floats, scratch: Floats) -> Floats:
        """The logits [vocabulary] with penalties and bias, in `scratch`; `logits` itself if there are none."""
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
        """The logits of the counted ids after the three penalties, [size]."""
        sampling, occurrences = self._sampling, self._occurrences[:size]
        out = logits[self._ids[:size]].astype(np.float64)
        with np.errstate(over="ignore"):
            out = np.where(out > 0, out / sampling.repetition_penalty, out * sampling.repetition_penalty)
        return out - (sampling.presence_penalty * (occurrences > 0) + sampling.frequency_penalty * occurrences)

    def _count(self, token: int, times: int) -> None:
        """Count a token as seen, and so many occurrences in the output."""
        if not 0 <= token < self._vocabulary:
            return
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == self._ids.size:
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._occurrences = np.concatenate([self._occurrences, np.zeros_like(self._occurrences)])
        self._ids[slot] = token
        self._occurrences[slot] += times


def set_logits(logits: Floats, ids: NDArray[np.int64], values: NDArray[np.float64]) -> None:
    """Set the logits of these ids. Values below float32's range become -inf, values above it its largest number."""
    with np.errstate(over="ignore"):
        logits[ids] = np.minimum(values, LARGEST)
