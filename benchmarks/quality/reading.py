"""What a model says while it reads a text: its logits with the text itself as history (teacher forcing).

The text is cut into windows of equal length, each read from an empty cache. A target says what follows every token.
A draft is read as it is used, in rounds of STRIDE new tokens and K - 1 masks: it says what follows the last of the
tokens, and what follows each mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.adapt.packing import IGNORE, PackedSequence
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import Manifest, read_draft_ids
from pard_onnx.models.spec import ModelSpec
from pard_onnx.runtime.model import session_class
from pard_onnx.runtime.providers.table import Provider
from pard_onnx.runtime.providers.threads import Threads
from pard_onnx.runtime.sessions.session import DraftSession, TargetSession

CHUNK = 32  # rows at a time: of Qwen's vocabulary 20 MB
STRIDE = 4  # a round's usual number of new tokens
DRAFTS = 8  # K
LEAST = STRIDE + DRAFTS  # tokens of a window that a draft can be asked in
TORCH_VALUES = 1 << 28  # logits that torch computes at once

Ids = NDArray[np.int64]
Windows = NDArray[np.int64]  # [windows, tokens]


@dataclass(frozen=True, slots=True)
class Rows:
    """Predictions: the ids that the text has there, and the masks between it and the last known token, [n] each;
    logits [n, vocabulary rows], -inf of ids that the model cannot say. The logits may be overwritten by the next
    rows."""

    wanted: Ids
    masks: Ids
    logits: NDArray[np.float32]


def windows(ids: Sequence[int], length: int, most: int, before: Sequence[int] = ()) -> Windows:
    """At most `most` tokens in windows of `length`, spread evenly over the text; a shorter text is one window.

    before: what the tokenizer puts in front of a text (BOS), and here of every window. BadInput for too few tokens.
    """
    length = min(length, most, len(before) + len(ids))
    if length < LEAST:
        raise BadInput(f"the text has {len(ids)} tokens; a report needs at least {LEAST}")
    step = length - len(before)
    whole = len(ids) // step
    used = np.linspace(0, whole - 1, max(1, min(most // length, whole))).round().astype(int)
    return np.array([[*before, *ids[i * step : (i + 1) * step]] for i in used], np.int64)


def rounds(length: int) -> range:
    """Numbers of known tokens at which a draft is asked, so that the text has all that follows."""
    return range(STRIDE, length - DRAFTS + 1, STRIDE)


def count(spec: ModelSpec, text: Windows) -> int:
    """Rows that a model of this spec gives."""
    many, length = text.shape
    return int(many) * (length - 1 if spec.pard is None else len(rounds(length)) * DRAFTS)


def by_artifact(
    folder: Path, manifest: Manifest, text: Windows, provider: Provider, threads: Threads
) -> Iterator[Rows]:
    """The rows of an exported model, in the order of the text."""
    session = session_class(manifest)(folder, manifest, provider, threads)
    if manifest.role == "target":
        return _target_rows(session, text)
    ids = read_draft_ids(folder) if manifest.draft_vocabulary else None
    return _draft_rows(session, text, ids)


def _target_rows(session: TargetSession, text: Windows) -> Iterator[Rows]:
    for ids in text:
        session.rollback(0)
        for first in range(0, len(ids) - 1, CHUNK):
            wanted = ids[first + 1 : first + 1 + CHUNK]
            logits = session.step(ids[first : first + len(wanted)].tolist(), len(wanted)).logits
            yield Rows(wanted, np.zeros_like(wanted), logits)


def _draft_rows(session: DraftSession, text: Windows, chosen: Ids | None) -> Iterator[Rows]:
    """chosen: the ids of the logits, None for all."""
    every = np.full((DRAFTS, session.manifest.spec.vocabulary.rows), -np.inf, np.float32)
    for ids in text:
        session.rollback(0)
        for known in rounds(len(ids)):
            start = session.length
            logits = session.logits(ids[known - STRIDE : known].tolist(), DRAFTS)
            session.rollback(start + STRIDE)
            if chosen is not None:
                every[:, chosen] = logits
                logits = every
            yield Rows(ids[known : known + DRAFTS], np.arange(DRAFTS), logits)


def by_checkpoint(checkpoint: Checkpoint, text: Windows) -> Iterator[Rows]:
    """The same rows by torch in float32, the weights as they are; one layer's weights are in memory at a time."""
    import torch

    from pard_onnx.export.verify.parity import reference_logits

    spec = checkpoint.spec
    if spec.pard is not None:
        for ids in text:
            packed = in_rounds(ids, spec.pard.mask_id)
            hidden = torch.from_numpy(~packed.mask())[None, None]
            inputs = {
                "position_ids": torch.from_numpy(packed.positions)[None],
                "attention_mask": torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min),
            }
            logits = reference_logits(checkpoint, torch.from_numpy(packed.ids)[None], torch.float32, **inputs)
            order = np.lexsort((packed.segments, packed.bases))
            asked = order[np.isin(packed.bases[order], np.array(rounds(len(ids))) - 1)]
            yield from _in_chunks(packed.labels[asked], packed.segments[asked], logits[0].numpy(), asked)
        return
    batch = max(1, TORCH_VALUES // (text.shape[1] * spec.vocabulary.rows))
    for first in range(0, len(text), batch):
        part = text[first : first + batch]
        logits = reference_logits(checkpoint, torch.from_numpy(part), torch.float32)
        for ids, found in zip(part, logits.numpy(), strict=True):
            yield from _in_chunks(ids[1:], np.zeros_like(ids[1:]), found, np.arange(len(ids) - 1))


def in_rounds(ids: Ids, mask_id: int) -> PackedSequence:
    """A window and the masks of all its rounds in one sequence; each round's see the tokens that it knows."""
    asked = np.array(rounds(len(ids))) - 1
    bases = np.concatenate([np.arange(len(ids)), *[asked] * (DRAFTS - 1)])
    segments = np.concatenate([np.zeros(len(ids), np.int64), np.repeat(np.arange(1, DRAFTS), len(asked))])
    positions = bases + segments
    labels = np.append(ids, IGNORE)[positions + 1]
    return PackedSequence(np.where(segments == 0, ids[bases], mask_id), positions, labels, segments, bases)


def _in_chunks(wanted: Ids, masks: Ids, logits: NDArray[np.float32], order: Ids) -> Iterator[Rows]:
    for first in range(0, len(order), CHUNK):
        part = slice(first, first + CHUNK)
        yield Rows(wanted[part], masks[part], logits[order[part]])
