"""PARD's training sequence: K segments of mask tokens packed behind the real tokens.

An autoregressive draft becomes a parallel one by learning, after every prefix of real tokens, what
K-1 mask tokens in a row should predict (arXiv 2504.18583, section 3). For a real sequence x[0..n):

- segment 0 holds the real tokens: the token at position i predicts x[i+1];
- segment j (1 <= j < K) holds masks: the one of *base* b stands at position b + j and predicts
  x[b+j+1], as if x[0..b] were all that is known.

A mask of base b sees x[0..b] and the masks of its own base in segments 1..j: just what the draft
sees at run time. COnditional Drop-token (COD) keeps a shrinking random part of each segment. The parts are
nested, so that the masks that a kept mask attends to are kept as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORE = -100  # the label that the cross-entropy skips


@dataclass(frozen=True, slots=True)
class Drop:
    """COnditional Drop-token: segment j keeps a share max(ratio**j, floor) of the bases."""

    segments: int = 8  # K
    ratio: float = 0.7
    floor: float = 0.2

    def __post_init__(self) -> None:
        if self.segments < 1:
            raise ValueError(f"segments is {self.segments}; a parallel draft has at least 1")
        if not (0.0 < self.ratio <= 1.0 and 0.0 < self.floor <= 1.0):
            raise ValueError(f"ratio {self.ratio} and floor {self.floor} must lie in (0, 1]")

    def counts(self, length: int) -> list[int]:
        """The number of bases that each segment keeps of `length` real tokens; segment 0 keeps all."""
        usable = self._usable(length)
        shares = [max(self.ratio**j, self.floor) for j in range(1, self.segments)]
        return [length, *(int(np.ceil(share * usable)) for share in shares)]

    def bases(self, length: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        """The bases that each segment keeps, sorted; each is a subset of the one before."""
        order = rng.permutation(self._usable(length))
        return [np.arange(length), *(np.sort(order[:count]) for count in self.counts(length)[1:])]

    def _usable(self, length: int) -> int:
        """Bases whose every mask has a label: segment K-1 of base b predicts x[b+K]."""
        return max(0, length - self.segments)


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """Real tokens and their mask segments in one sequence of S tokens; every array is [S]."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    labels: NDArray[np.int64]  # the id to predict, or IGNORE
    segments: NDArray[np.int64]  # 0 for real tokens
    bases: NDArray[np.int64]  # the last real position that the token may see

    def mask(self) -> NDArray[np.bool_]:
        """Which tokens each token attends to, [S, S]: entry (i, j) is whether token i sees token j."""
        real = self.segments[None, :] == 0
        prefix = real & (self.positions[None, :] <= self.bases[:, None])
        # The chain of a base begins at its real token, which the prefix has too.
        chain = (self.bases[None, :] == self.bases[:, None]) & (self.segments[None, :] <= self.segments[:, None])
        visible: NDArray[np.bool_] = prefix | chain
        return visible


def pack(tokens: NDArray[np.int64], mask_id: int, drop: Drop, rng: np.random.Generator) -> PackedSequence:
    """Pack the real tokens [n] and their mask segments into one sequence."""
    length = len(tokens)
    kept = drop.bases(length, rng)
    bases = np.concatenate(kept)
    segments = np.repeat(np.arange(len(kept)), [len(k) for k in kept])
    positions = bases + segments
    ids = np.where(segments == 0, tokens[bases], mask_id)
    following = np.minimum(positions + 1, length - 1)
    labels = np.where(positions + 1 < length, tokens[following], IGNORE)
    return PackedSequence(ids, positions, labels, segments, bases)
