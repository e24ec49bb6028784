"""Which samples each step of a training reads: a pure function of the step's number, so that a resumed run is exact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .packing import PackedSequence, pack_samples
from .samples import Sample
from .settings import Settings

OPEN = 32  # sequences that are filled at once


class TrainingOrder:
    """Samples in the order in which they are learned, packed in sequences of at most `sequence_tokens` real tokens."""

    def __init__(self, samples: Sequence[Sample], settings: Settings, mask_id: int, sequences: int) -> None:
        """sequences: of a step, in all processes together."""
        self._samples, self._settings, self._mask_id = samples, settings, mask_id
        self._sequences = sequences
        self._lengths = np.array([len(sample.ids) for sample in samples])
        self._epochs: list[list[NDArray[np.int64]]] = []
        self._ends: list[int] = [0]  # sequences up to the end of each epoch

    @property
    def steps(self) -> int:
        """The steps of the whole training."""
        if self._settings.steps is not None:
            return self._settings.steps
        whole, part = divmod(self._settings.epochs, 1)
        total = self._end(int(whole)) + round(part * (self._end(int(whole) + 1) - self._end(int(whole))))
        return max(1, -(-total // self._sequences))

    def groups(self, step: int) -> list[NDArray[np.int64]]:
        """The numbers of the samples in each sequence of a step."""
        first = step * self._sequences
        return [self._group(number) for number in range(first, first + self._sequences)]

    def packed(self, step: int, sequence: int) -> PackedSequence:
        """A sequence of a step."""
        group = self.groups(step)[sequence]
        rng = np.random.default_rng((self._settings.seed, step, sequence))
        samples = [self._samples[int(number)] for number in group]
        return pack_samples([(one.ids, one.replies) for one in samples], self._mask_id, self._settings.drop, rng)

    def first(self, tokens: int) -> Iterator[PackedSequence]:
        """Sequences from the first one on, until they have so many real tokens, or all samples were there once."""
        last = self._end(1)
        for number in range(last):
            packed = self.packed(*divmod(number, self._sequences))
            yield packed
            tokens -= int(np.count_nonzero(packed.segments == 0))
            if tokens <= 0:
                return

    def _group(self, number: int) -> NDArray[np.int64]:
        while number >= self._ends[-1]:
            self._end(len(self._epochs) + 1)
        epoch = int(np.searchsorted(self._ends, number, side="right")) - 1
        return self._epochs[epoch][number - self._ends[epoch]]

    def _end(self, epochs: int) -> int:
        """The sequences of so many epochs."""
        while len(self._epochs) < epochs:
            rng = np.random.default_rng((self._settings.seed, len(self._epochs)))
            order = rng.permutation(len(self._lengths))
            groups = filled(order, self._lengths[order], self._settings.sequence_tokens)
            self._epochs.append(groups)
            self._ends.append(self._ends[-1] + len(groups))
        return self._ends[epochs]


def filled(numbers: NDArray[np.int64], lengths: NDArray[np.int64], room: int) -> list[NDArray[np.int64]]:
    """The numbers in groups of at most `room` tokens (more, where one has more): first fit among some open groups."""
    out: list[list[int]] = []
    left: list[list[int]] = []  # [room, group] of the open ones, oldest first
    for number, length in zip(numbers.tolist(), lengths.tolist(), strict=True):
        found = next((one for one in left if one[0] >= length), None)
        if found is None:
            found = [room, len(out)]
            out.append([])
            left = [*left, found][-OPEN:]
        found[0] -= length
        out[found[1]].append(number)
    return [np.array(group) for group in out]
