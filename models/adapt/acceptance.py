"""How much of what a draft proposes is accepted, on held-out samples and without a runtime.

Greedy: a sample's text is taken as what the target says. A round begins at a token of the sample, its draft of K tokens
is accepted up to the first one that is not the text's, and the next round begins behind the token that corrects it.

Expected: where the target is there, a proposal at a position is accepted with the probability sum(min(p, q)) of the
target's and the draft's distributions after the text, as when tokens are sampled at temperature 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from .objective import Pard
from .packing import IGNORE, Drop, PackedSequence, pack
from .samples import Sample

BASES = 256  # of a pass: each has K - 1 masks


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What was measured on held-out samples."""

    by_position: tuple[float, ...]  # [K]: the share of proposals that is accepted, of those whose place is reached
    mean_accepted: float  # tokens of a round, the target's own token included
    rounds: int
    expected_by_position: tuple[float, ...] | None = None  # [K]: the mean of sum(min(p, q))
    expected_accepted: float | None = None  # tokens of a round, where tokens are sampled


@torch.no_grad()
def measure(
    net: nn.Module,
    objective: Pard,
    samples: Sequence[Sample],
    mask_id: int,
    target: PreTrainedModel | None = None,
) -> Acceptance:
    """Measure a draft. target: for the expected acceptance. The network is in its training mode again afterwards."""
    length = objective.settings.draft_length
    reached, accepted = np.zeros(length), np.zeros(length)
    rounds, tokens, shares = 0, 0, []
    net.eval()
    for sample in samples:
        right, overlaps = _proposals(net, objective, sample, mask_id, target)
        found = list(walk(right, sample.replies))
        rounds, tokens = rounds + len(found), tokens + sum(found)
        for row in right[right[:, 0] >= 0]:
            hits = _accepted(row)
            accepted[:hits] += 1
            reached[: hits + (hits < length and row[hits] == 0)] += 1
        shares.append(overlaps[~np.isnan(overlaps).any(axis=1)])
    net.train()
    by_position = tuple((accepted / np.maximum(reached, 1)).tolist())
    greedy = Acceptance(by_position, tokens / max(1, rounds), rounds)
    overlap = np.concatenate(shares) if shares else np.zeros((0, length))
    if target is None or not len(overlap):
        return greedy
    mean = float(1 + np.cumprod(overlap, axis=1).sum(axis=1).mean())
    return replace(greedy, expected_by_position=tuple(overlap.mean(axis=0).tolist()), expected_accepted=mean)


def walk(right: NDArray[np.int64], replies: NDArray[np.bool_]) -> Iterator[int]:
    """The tokens that each round brings, over all replies of a sample: the accepted drafts and the target's own token.

    right: [n, K], whether the draft of a base is the text's token at each position: 1, 0, or -1 where there is none.
    """
    base = 0
    while base + 1 < len(replies):
        if not replies[base + 1]:  # no round begins within a prompt
            base += 1
            continue
        count = _accepted(right[base])
        yield count + _goes_on(base + count + 1, replies)
        base += count + 1


def _accepted(row: NDArray[np.int64]) -> int:
    """The drafts before the first one that is not the text's token; row: of `right` in `walk`."""
    misses = np.flatnonzero(row != 1)
    return int(misses[0]) if len(misses) else len(row)


def _goes_on(place: int, replies: NDArray[np.bool_]) -> bool:
    """Whether the text has another token of the reply there, which the round's last token can be."""
    return place < len(replies) and bool(replies[place])


def _proposals(
    net: nn.Module, objective: Pard, sample: Sample, mask_id: int, target: PreTrainedModel | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """What the draft of each base has right, [n, K] as in `walk`, and its overlap with the target (NaN: not known)."""
    length = objective.settings.draft_length
    right = np.full((len(sample.ids), length), -1)
    overlaps = np.full((len(sample.ids), length), np.nan)
    wanted = _distributions(target, sample, objective.device)
    for packed in _passes(sample, mask_id, length):
        kept = np.flatnonzero(packed.labels != IGNORE)
        if not len(kept):
            continue
        logits, _ = objective.logits(net, packed, torch.from_numpy(kept).to(objective.device), False)
        places = (packed.bases[kept], packed.segments[kept])
        right[places] = logits.argmax(-1).cpu().numpy() == packed.labels[kept]
        if wanted is not None:
            overlaps[places] = _overlap(logits, wanted[torch.from_numpy(packed.positions[kept]).to(wanted.device)])
    return right, overlaps


def _passes(sample: Sample, mask_id: int, length: int) -> Iterator[PackedSequence]:
    """All masks of a sample, behind some of its bases at a time. Each pass has the real tokens up to its last mask."""
    bases = np.flatnonzero(np.append(sample.replies[1:], False))
    for first in range(0, len(bases), BASES):
        chosen = bases[first : first + BASES]
        yield _with_all_masks(sample, chosen, mask_id, length)


def _with_all_masks(sample: Sample, bases: NDArray[np.int64], mask_id: int, length: int) -> PackedSequence:
    """The real tokens up to the last base, and the masks of these bases that have a label."""
    count = int(bases[-1]) + 1
    real = pack(sample.ids[:count], mask_id, Drop(1), np.random.default_rng(0))
    chains = np.repeat(bases, length - 1)
    segments = np.tile(np.arange(1, length), len(bases))
    kept = chains + segments + 1 < len(sample.ids)
    chains, segments = chains[kept], segments[kept]
    all_bases, all_segments = np.append(real.bases, chains), np.append(real.segments, segments)
    positions = all_bases + all_segments
    following = np.minimum(positions + 1, len(sample.ids) - 1)
    learned = (positions + 1 < len(sample.ids)) & sample.replies[following] & np.isin(all_bases, bases)
    labels = np.where(learned, sample.ids[following], IGNORE)
    ids = np.append(real.ids, np.full(len(chains), mask_id))
    return PackedSequence(ids, positions, labels, all_segments, all_bases, np.zeros_like(ids))


def _distributions(target: PreTrainedModel | None, sample: Sample, device: torch.device) -> Tensor | None:
    """The target's probabilities of the token after each token, [n, vocabulary]."""
    if target is None:
        return None
    found = target(input_ids=torch.from_numpy(sample.ids)[None].to(device), use_cache=False).logits[0]
    probabilities: Tensor = found.float().softmax(-1)
    return probabilities


def _overlap(logits: Tensor, wanted: Tensor) -> NDArray[np.float64]:
    """sum(min(p, q)) of each row. Ids that one of the two lacks are never accepted."""
    drafted = logits.float().softmax(-1)
    shared = min(drafted.shape[-1], wanted.shape[-1])
    found: NDArray[np.float64] = torch.minimum(drafted[:, :shared], wanted[:, :shared]).sum(-1).double().cpu().numpy()
    return found
