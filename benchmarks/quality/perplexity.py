"""How good models are on a text: perplexity, and how far they are from the unquantized model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp, sqrt
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pard_onnx.benchmarks.statistics import Ratio
from pard_onnx.runtime.tuning.steps import StepCosts

from .reading import Rows

Doubles = NDArray[np.float64]
STORED = np.dtype("<f4")  # of the reference's log probabilities
NORMAL = 1.96  # standard errors on either side of a mean: 95 %
KINDS = ("tokens", "masks")  # what rows follow


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Over the rows that follow real tokens, or (of a draft) masks.

    perplexity: exp of the mean negative log likelihood of the text; None for a draft of a reduced vocabulary, to which
    some texts are impossible. Against the reference, None without one: ratio: of the perplexities, with its 95 %
    interval over the same rows; divergence: mean KL divergence of the model's distribution from the reference's, nats;
    agreement: share of rows with the same most likely token. coverage: share of rows whose token the model can say.
    """

    rows: str
    count: int
    perplexity: float | None
    ratio: Ratio | None = None
    divergence: float | None = None
    agreement: float | None = None
    coverage: float = 1.0


@dataclass(frozen=True, slots=True)
class Quality:
    """One model. bytes: of all its files, of a checkpoint's weights; accepted: mean accepted length of the pair, the
    bonus token counted; costs: of its steps."""

    name: str
    precision: str
    bytes: int
    fidelity: tuple[Fidelity, ...]
    accepted: float | None = None
    costs: StepCosts | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Models of one role on one text. reference: the unquantized model, which the others are compared with;
    partner: who makes a pair of each of them; draft_length: of the pairs, and a draft's masks and one."""

    role: str
    text: str
    tokens: int
    reference: Quality | None
    models: tuple[Quality, ...]
    partner: str | None = None
    draft_length: int | None = None


def log_softmax(logits: NDArray[np.float32]) -> Doubles:
    """Of each row [n, ids], in double precision: divergences of half precision are near float32's rounding."""
    out = logits.astype(np.float64)
    out -= out.max(axis=1, keepdims=True)
    out -= np.log(np.exp(out).sum(axis=1, keepdims=True))
    return out


def divergences(reference: Doubles, model: Doubles) -> Doubles:
    """KL(reference || model) of each row, from log probabilities; an id that the reference excludes adds nothing.

    What the model alone excludes makes it infinite; that is the caller's to notice, and left out here.
    """
    possible = np.isfinite(reference) & np.isfinite(model)
    terms = np.zeros_like(reference)
    np.subtract(reference, model, out=terms, where=possible)
    terms *= np.exp(reference)
    found: Doubles = terms.sum(axis=1)
    return found


def score(
    rows: Iterable[Rows], size: int, *, keep: BinaryIO | None = None, against: BinaryIO | None = None
) -> tuple[Fidelity, ...]:
    """Read a model's rows over the first `size` ids, those that the tokenizer has.

    keep: where its log probabilities are written; against: the reference's, written so, of the same rows.
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
        for name, kind in zip(KINDS, kinds, strict=True)
        if kind.size
    )


def fidelity(name: str, table: Doubles, *, compared: bool, reduced: bool) -> Fidelity:
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
