"""PARD's training sequence: K segments of mask tokens packed behind the real tokens.

An autoregressive draft becomes a parallel one by learning, after every prefix of real tokens, what
K-1 mask tokens in a row should predict (arXiv 2504.18583, section 3). For a real sequence x[0..n):

- segment 0 holds the real tokens: the token at position i predicts x[i+1];
- segment j (1 <= j < K) holds masks: the one of *base* b stands at position b + j and predicts
  x[b+j+1], as if x[0..b] were all that is known.

A mask of base b sees x[0..b] and the masks of its own base in segments 1..j: just what the draft
sees at run time. COnditional Drop-token (COD) keeps a shrinking random part of each segment. The parts are
nested, so that the masks that a kept mask attends to are kept as well.

Several samples fit in one sequence: the positions of each begin at 0, and none of them sees another one.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        return [length, *(int(np.ceil(share * usable)) for share in self._shares())]

    def bases(
        self, length: int, rng: np.random.Generator, wanted: NDArray[np.bool_] | None = None
    ) -> list[NDArray[np.int64]]:
        """The bases that each segment keeps, sorted; each is a subset of the one before.

        wanted: the bases that masks may have, [length]; None: all. The shares are of these.
        """
        usable = np.arange(self._usable(length))
        usable = usable if wanted is None else usable[wanted[: len(usable)]]
        order = rng.permutation(usable)
        shares = self._shares()
        return [np.arange(length), *(np.sort(order[: int(np.ceil(share * len(usable)))]) for share in shares)]

    def _shares(self) -> list[float]:
        """What each segment after the first keeps."""
        return [max(self.ratio**j, self.floor) for j in range(1, self.segments)]

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
    samples: NDArray[np.int64]  # which of the packed samples the token belongs to

    def mask(self) -> NDArray[np.bool_]:
        """Which tokens each token attends to, [S, S]: entry (i, j) is whether token i sees token j."""
        return self.visible(slice(None), np.arange(len(self.ids)))

    def visible(self, queries: slice, keys: NDArray[np.int64], window: int | None = None) -> NDArray[np.bool_]:
        """The rows `queries` and the columns `keys` of the mask. window: positions that a token sees, with its own."""
        position, base, segment = (one[queries, None] for one in (self.positions, self.bases, self.segments))
        prefix = (self.segments[keys] == 0) & (self.positions[keys] <= base)
        # The chain of a base begins at its real token, which the prefix has too.
        chain = (self.bases[keys] == base) & (self.segments[keys] <= segment)
        visible: NDArray[np.bool_] = (prefix | chain) & (self.samples[keys] == self.samples[queries, None])
        return visible if window is None else visible & (position - self.positions[keys] < window)


def pack(
    tokens: NDArray[np.int64],
    mask_id: int,
    drop: Drop,
    rng: np.random.Generator,
    replies: NDArray[np.bool_] | None = None,
) -> PackedSequence:
    """Pack the real tokens [n] and their mask segments into one sequence.

    replies: the tokens that are learned, [n]; None: all. Masks then follow the bases from which a reply goes on.
    """
    length = len(tokens)
    kept = drop.bases(length, rng, None if replies is None else np.append(replies[1:], False))
    bases = np.concatenate(kept)
    segments = np.repeat(np.arange(len(kept)), [len(k) for k in kept])
    positions = bases + segments
    ids = np.where(segments == 0, tokens[bases], mask_id)
    following = np.minimum(positions + 1, length - 1)
    learned = positions + 1 < length
    learned = learned if replies is None else learned & replies[following]
    labels = np.where(learned, tokens[following], IGNORE)
    return PackedSequence(ids, positions, labels, segments, bases, np.zeros_like(bases))


def pack_samples(
    samples: Sequence[tuple[NDArray[np.int64], NDArray[np.bool_]]], mask_id: int, drop: Drop, rng: np.random.Generator
) -> PackedSequence:
    """Pack the samples (tokens [n] and replies [n] of each) one after the other.

    Each sample's real tokens come first and then its masks, base by base: what a token sees is near to it.
    """
    parts = []
    for number, (tokens, replies) in enumerate(samples):
        one = pack(tokens, mask_id, drop, rng, replies)
        order = np.lexsort((one.segments, np.where(one.segments == 0, -1, one.bases), one.segments > 0))
        parts.append([one.ids[order], one.positions[order], one.labels[order], one.segments[order], one.bases[order]])
        parts[-1].append(np.full(len(order), number))
    return PackedSequence(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
