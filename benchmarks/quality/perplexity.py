"""The quality of models on a text: perplexity, and the divergence from the unquantized model.

A model predicts the text with the text itself as history (teacher forcing). The text is cut into windows of equal
length, and each is read from an empty KV cache. A target predicts the token after every token. A draft is read in
rounds, as it is used: STRIDE new tokens and K - 1 masks, which predict the token after the last new one and the token
after each mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import exp, sqrt
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from pard_onnx.benchmarks.trial import Ratio
from pard_onnx.models.adapt.packing import IGNORE, PackedSequence
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import Manifest, read_draft_ids
from pard_onnx.models.spec import ModelSpec
from pard_onnx.runtime.model import session_class
from pard_onnx.runtime.providers.table import Provider
from pard_onnx.runtime.providers.threads import Threads
from pard_onnx.runtime.sessions.session import DraftSession, TargetSession
from pard_onnx.runtime.tuning.steps import StepCosts

CHUNK = 32  # rows of logits at a time; with Qwen's vocabulary 20 MB
STRIDE = 4  # the usual number of new tokens of a round
DRAFTS = 8  # K
LEAST_TOKENS = STRIDE + DRAFTS  # of a window, so that it has one round of a draft
TORCH_VALUES = 1 << 28  # logits that torch computes at a time

Ids = NDArray[np.int64]
Windows = NDArray[np.int64]  # [windows, tokens]


@dataclass(frozen=True, slots=True)
class TextRows:
    """n predictions of tokens of the text. The next rows may overwrite the logits."""

    wanted: Ids  # [n], the tokens of the text
    masks: Ids  # [n], the number of masks between the last known token and the predicted one
    logits: NDArray[np.float32]  # [n, vocabulary rows], -inf for ids that the model cannot propose


def cut_windows(ids: Sequence[int], length: int, most: int, before: Sequence[int] = ()) -> Windows:
    """Cut at most `most` tokens into windows of `length`, spread evenly over the text; a shorter text is one window.

    before: the ids that the tokenizer puts before a text (BOS), with which every window begins. Raises BadInput for a
    text of too few tokens.
    """
    length = min(length, most, len(before) + len(ids))
    if length < LEAST_TOKENS:
        raise BadInput(f"the text has {len(ids)} tokens; a report needs at least {LEAST_TOKENS}")
    step = length - len(before)
    whole = len(ids) // step
    used = np.linspace(0, whole - 1, max(1, min(most // length, whole))).round().astype(int)
    return np.array([[*before, *ids[i * step : (i + 1) * step]] for i in used], np.int64)


def round_starts(length: int) -> range:
    """The numbers of known tokens at which a draft's rounds start; the text has all tokens that they predict."""
    return range(STRIDE, length - DRAFTS + 1, STRIDE)


def row_count(spec: ModelSpec, text: Windows) -> int:
    """The number of rows that a model of this spec yields."""
    number, length = text.shape
    return int(number) * (length - 1 if spec.pard is None else len(round_starts(length)) * DRAFTS)


def artifact_rows(
    folder: Path, manifest: Manifest, text: Windows, provider: Provider, threads: Threads
) -> Iterator[TextRows]:
    """Yield the rows of an exported model, in the order of the text."""
    session = session_class(manifest)(folder, manifest, provider, threads)
    if manifest.role == "target":
        return _target_rows(session, text)
    ids = read_draft_ids(folder) if manifest.draft_vocabulary else None
    return _draft_rows(session, text, ids)


def _target_rows(session: TargetSession, text: Windows) -> Iterator[TextRows]:
    for ids in text:
        session.rollback(0)
        for first in range(0, len(ids) - 1, CHUNK):
            wanted = ids[first + 1 : first + 1 + CHUNK]
            logits = session.step(ids[first : first + len(wanted)].tolist(), len(wanted)).logits
            yield TextRows(wanted, np.zeros_like(wanted), logits)


def _draft_rows(session: DraftSession, text: Windows, proposable: Ids | None) -> Iterator[TextRows]:
    """proposable: the ids of the logits' columns; None: all ids."""
    every = np.full((DRAFTS, session.manifest.spec.vocabulary.rows), -np.inf, np.float32)
    for ids in text:
        session.rollback(0)
        for known in round_starts(len(ids)):
            start = session.length
            logits = session.logits(ids[known - STRIDE : known].tolist(), DRAFTS)
            session.rollback(start + STRIDE)
            if proposable is not None:
                every[:, proposable] = logits
                logits = every
            yield TextRows(ids[known : known + DRAFTS], np.arange(DRAFTS), logits)


def checkpoint_rows(checkpoint: Checkpoint, text: Windows) -> Iterator[TextRows]:
    """Yield the same rows by torch in float32 from a checkpoint as transformers loads it; weights stay on the disk."""
    import torch

    from pard_onnx.export.verify.reference import reference_logits

    spec = checkpoint.spec
    if spec.pard is not None:
        for ids in text:
            packed = packed_rounds(ids, spec.pard.mask_id)
            hidden = torch.from_numpy(~packed.mask())[None, None]
            inputs = {
                "position_ids": torch.from_numpy(packed.positions)[None],
                "attention_mask": torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min),
            }
            logits = reference_logits(checkpoint, torch.from_numpy(packed.ids)[None], **inputs)
            order = np.lexsort((packed.segments, packed.bases))
            asked = order[np.isin(packed.bases[order], np.array(round_starts(len(ids))) - 1)]
            yield from _in_chunks(packed.labels[asked], packed.segments[asked], logits[0].numpy(), asked)
        return
    batch = max(1, TORCH_VALUES // (text.shape[1] * spec.vocabulary.rows))
    for first in range(0, len(text), batch):
        part = text[first : first + batch]
        logits = reference_logits(checkpoint, torch.from_numpy(part))
        for ids, found in zip(part, logits.numpy(), strict=True):
            yield from _in_chunks(ids[1:], np.zeros_like(ids[1:]), found, np.arange(len(ids) - 1))


def packed_rounds(ids: Ids, mask_id: int) -> PackedSequence:
    """A window and the masks of all its rounds as one sequence, in which masks attend to their round's tokens only."""
    asked = np.array(round_starts(len(ids))) - 1
    bases = np.concatenate([np.arange(len(ids)), *[asked] * (DRAFTS - 1)])
    segments = np.concatenate([np.zeros(len(ids), np.int64), np.repeat(np.arange(1, DRAFTS), len(asked))])
    positions = bases + segments
    labels = np.append(ids, IGNORE)[positions + 1]
    packed_ids = np.where(segments == 0, ids[bases], mask_id)
    return PackedSequence(packed_ids, positions, labels, segments, bases, np.zeros_like(bases))


def _in_chunks(wanted: Ids, masks: Ids, logits: NDArray[np.float32], order: Ids) -> Iterator[TextRows]:
    for first in range(0, len(order), CHUNK):
        part = slice(first, first + CHUNK)
        yield TextRows(wanted[part], masks[part], logits[order[part]])


Doubles = NDArray[np.float64]
STORED = np.dtype("<f4")  # type of the reference's log probabilities in the temporary file
NORMAL = 1.96  # standard errors on each side of a mean: 95 %
ROW_KINDS = ("tokens", "masks")  # which come directly before the predicted token


@dataclass(frozen=True, slots=True)
class Fidelity:
    """A model's quality on the rows after tokens, or on a draft's rows after masks."""

    rows: str  # of ROW_KINDS
    count: int
    # exp of the mean negative log likelihood; None for a draft with a reduced vocabulary, for which some texts have
    # probability 0
    perplexity: float | None
    # Compared with the reference; None without one:
    ratio: Ratio | None = None  # of the perplexities, with its 95 % interval over the same rows
    divergence: float | None = None  # mean KL divergence of the model's distribution from the reference's, nats
    agreement: float | None = None  # share of rows with the same most likely token
    coverage: float = 1.0  # share of rows whose token the model can propose


@dataclass(frozen=True, slots=True)
class Quality:
    """One model in a report."""

    name: str
    precision: str
    bytes: int  # of all its files; of a checkpoint: of its weights
    fidelity: tuple[Fidelity, ...]
    accepted: float | None = None  # mean accepted length of the pair, with the bonus token
    costs: StepCosts | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Models of one role on one text."""

    role: str
    text: str
    tokens: int
    reference: Quality | None  # the unquantized model
    models: tuple[Quality, ...]
    partner: str | None = None  # the model that forms a pair with each of them
    draft_length: int | None = None  # of the pairs; a draft's rounds have one mask less


def log_softmax(logits: NDArray[np.float32]) -> Doubles:
    """Log probabilities of each row [n, ids], in float64: float16's divergences are as small as float32's errors."""
    out = logits.astype(np.float64)
    out -= out.max(axis=1, keepdims=True)
    out -= np.log(np.exp(out).sum(axis=1, keepdims=True))
    return out


def divergences(reference: Doubles, model: Doubles) -> Doubles:
    """KL(reference || model) of each row, from log probabilities.

    An id with probability 0 in the reference adds nothing. An id with probability 0 in the model alone would make the
    divergence infinite; such ids are left out here, and the caller has to notice them.
    """
    possible = np.isfinite(reference) & np.isfinite(model)
    terms = np.zeros_like(reference)
    np.subtract(reference, model, out=terms, where=possible)
    terms *= np.exp(reference)
    found: Doubles = terms.sum(axis=1)
    return found


def score_rows(
    rows: Iterable[TextRows], size: int, *, keep: IO[bytes] | None = None, against: IO[bytes] | None = None
) -> tuple[Fidelity, ...]:
    """Score a model's rows over the first `size` ids, which are the tokenizer's.

    keep: a file into which the log probabilities are written; against: such a file of the reference, of the same rows.
    """
    columns: list[Doubles] = []  # masks, loss, the reference's loss, divergence, agreement
    reduced = False
    for part in rows:
        found = log_softmax(part.logits[:, :size])
        if keep:
            keep.write(found.astype(STORED).data)
        column = np.zeros((5, len(found)))
        each, excluded = np.arange(len(found)), np.isneginf(found)
        column[0], column[1] = part.masks, -found[each, part.wanted]
        if against:
            wanted = np.frombuffer(against.read(found.size * STORED.itemsize), STORED).reshape(found.shape)
            expected = wanted.astype(np.float64)
            column[2], column[3] = -expected[each, part.wanted], divergences(expected, found)
            column[4] = expected.argmax(axis=1) == found.argmax(axis=1)
            excluded &= np.isfinite(expected)
        reduced |= bool(excluded.any())
        columns.append(column)
    table = np.concatenate(columns, axis=1)
    kinds = (table[:, table[0] == 0], table[:, table[0] > 0])
    return tuple(
        fidelity(name, kind, compared=against is not None, reduced=reduced)
        for name, kind in zip(ROW_KINDS, kinds, strict=True)
        if kind.size
    )


def fidelity(name: str, table: Doubles, *, compared: bool, reduced: bool) -> Fidelity:
    """The mean values of rows of one kind; table: the columns of `score_rows`."""
    _, loss, expected, divergence, agreement = table
    count = len(loss)
    if reduced:
        agreed = float(agreement.mean()) if compared else None
        return Fidelity(name, count, None, agreement=agreed, coverage=float(np.isfinite(loss).mean()))
    perplexity = exp(loss.mean())
    if not compared:
        return Fidelity(name, count, perplexity)
    difference = loss - expected
    error = NORMAL * difference.std() / sqrt(count)
    middle = difference.mean()
    ratio = Ratio(exp(middle), exp(middle - error), exp(middle + error))
    return Fidelity(name, count, perplexity, ratio, float(divergence.mean()), float(agreement.mean()))
