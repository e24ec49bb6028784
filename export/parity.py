"""An export against torch: the check that every export ends with.

Teacher-forced over one fixed text: a prefill, single-token steps, a step of wrong tokens that is
rolled back, and a multi-token step over the right ones. Draft graphs are checked the same way, and
on the rows of their masks. Of a target it is also found out which step widths give equal rows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pard_onnx.models.checkpoint import Checkpoint
from pard_onnx.models.manifest import Parity

from .driver import Driver, Logits
from .reference import reference_logits

TEXT = (
    "def binary_search(items, wanted):\n    low, high = 0, len(items)\n    while low < high:\n"
    "        middle = (low + high) // 2\n        if items[middle] < wanted:\n            low = middle + 1\n"
    "        else:\n            high = middle\n    return low\n\nThe quick brown fox jumps over 13 lazy dogs."
)
LENGTH, PREFILL, SINGLE, MULTI = 48, 32, 4, 8
WIDEST = LENGTH - PREFILL  # of the steps compared bit for bit
ROWS = 128  # of the KV buffers here: more than LENGTH plus what a step may add


def check(checkpoint: Checkpoint, folder: Path) -> Parity:
    """Compare the graph in `folder` with torch on the checkpoint that it came from."""
    spec = checkpoint.spec
    ids = _ids(checkpoint)
    batch = ids[None]
    if spec.pard is not None:  # a second sequence, whose end is masks
        masked = ids.copy()
        masked[LENGTH - MULTI + 1 :] = spec.pard.mask_id
        batch = np.stack([ids, masked])
    wanted = reference_logits(checkpoint, torch.from_numpy(batch)).numpy()
    graph = Driver.open(folder / "model.onnx", spec, ROWS)
    found, rolled_back = _replay(graph, ids)
    if spec.pard is None:
        expected = np.concatenate([wanted[0], wanted[0][-MULTI:]])
    else:
        single = slice(PREFILL - 1, PREFILL + SINGLE)
        expected = np.concatenate([wanted[0][single], wanted[1][-MULTI:]])
    parity = _compare(found, expected, rolled_back, spec.vocabulary.size)
    return parity if spec.pard else replace(parity, exact_widths=_exact_widths(graph, ids))


def _exact_widths(graph: Driver, ids: NDArray[np.int64]) -> tuple[int, ...]:
    """Widths of steps over the same tokens whose logits are, bit for bit, those of the widest step."""
    rows = {}
    for width in range(1, WIDEST + 1):
        graph.length = PREFILL
        rows[width] = graph.step(ids[PREFILL : PREFILL + width])
    return tuple(width for width, found in rows.items() if np.array_equal(found, rows[WIDEST][:width]))


def _ids(checkpoint: Checkpoint) -> NDArray[np.int64]:
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    encoded = tokenizer.encode(TEXT, add_special_tokens=False).ids
    return np.resize(np.array(encoded, dtype=np.int64), LENGTH)


def _replay(graph: Driver, ids: NDArray[np.int64]) -> tuple[Logits, int]:
    """The graph's rows in the order of the module docstring, and how many of the last follow a rollback."""
    pard = graph.spec.pard
    rows = [graph.step(ids[:PREFILL])]
    rows += [graph.step(ids[i : i + 1]) for i in range(PREFILL, PREFILL + SINGLE)]
    if pard is None:
        rows.append(graph.step(ids[PREFILL + SINGLE :]))
    start = LENGTH - MULTI
    graph.length = start
    graph.step(ids[:MULTI])  # wrong tokens over the right ones
    graph.length = start
    if pard is None:
        rows.append(graph.step(ids[start:]))
    else:
        graph.length = PREFILL + SINGLE  # the draft's cache never saw what lies between
        rows.append(graph.step(ids[PREFILL + SINGLE : start + 1], draft_length=MULTI))
    return np.concatenate(rows), MULTI


def _compare(found: Logits, expected: Logits, rolled_back: int, size: int) -> Parity:
    """Over the ids that the tokenizer has; the rest is -inf by design."""
    found, expected = found[:, :size], expected[:, :size]
    error = np.abs(found - expected)
    agreement = (found.argmax(axis=1) == expected.argmax(axis=1)).mean()
    return Parity(
        len(found), float(error.max()), float(error.mean()), float(agreement), float(error[-rolled_back:].max())
    )
