"""An export against torch: the check that every export ends with.

Teacher-forced over one fixed text: a prefill, single-token steps, a step of wrong tokens that is
rolled back, and a multi-token step over the right ones. Draft graphs are checked the same way, and
on the rows of their masks. Of a target it is also found out which step widths give equal rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pard_onnx.models.checkpoint import Checkpoint
from pard_onnx.models.manifest import Parity
from pard_onnx.models.spec import ModelSpec

from .reference import reference_logits

TEXT = (
    "def binary_search(items, wanted):\n    low, high = 0, len(items)\n    while low < high:\n"
    "        middle = (low + high) // 2\n        if items[middle] < wanted:\n            low = middle + 1\n"
    "        else:\n            high = middle\n    return low\n\nThe quick brown fox jumps over 13 lazy dogs."
)
LENGTH, PREFILL, SINGLE, MULTI = 48, 32, 4, 8
WIDEST = LENGTH - PREFILL  # of the steps compared bit for bit
ROWS = 128  # of the KV buffers here: more than LENGTH plus what a step may add
Logits = NDArray[np.float32]


@dataclass(slots=True)
class _Graph:
    """The exported graph with plain feeds; `length` tokens are in its cache."""

    session: ort.InferenceSession
    spec: ModelSpec
    caches: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    length: int = 0

    @classmethod
    def open(cls, path: Path, spec: ModelSpec) -> _Graph:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        floats = np.float16 if session.get_inputs()[2].type == "tensor(float16)" else np.float32
        shape = (1, spec.kv_heads, ROWS, spec.head_dim)
        names = [f"past_key_values.{i}.{part}" for i in range(spec.layers) for part in ("key", "value")]
        return cls(session, spec, {n: np.zeros(shape, floats) for n in names})

    def step(self, ids: NDArray[np.int64], draft_length: int = 1) -> Logits:
        """Logits of a step: all its rows [n, vocabulary], or the last K of a draft."""
        total = self.length + len(ids)
        feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, total), np.int64), **self.caches}
        if self.spec.pard is not None:
            feeds["draft_length"] = np.array([draft_length])
        presents = [name.replace("past_key_values", "present") for name in self.caches]
        logits, *caches = self.session.run(["logits", *presents], feeds)
        self.caches = dict(zip(self.caches, caches, strict=True))
        self.length = total
        rows: Logits = logits[0]
        return rows


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
    graph = _Graph.open(folder / "model.onnx", spec)
    found, rolled_back = _replay(graph, ids)
    if spec.pard is None:
        expected = np.concatenate([wanted[0], wanted[0][-MULTI:]])
    else:
        single = slice(PREFILL - 1, PREFILL + SINGLE)
        expected = np.concatenate([wanted[0][single], wanted[1][-MULTI:]])
    parity = _compare(found, expected, rolled_back, spec.vocabulary.size)
    return parity if spec.pard else replace(parity, exact_widths=_exact_widths(graph, ids))


def _exact_widths(graph: _Graph, ids: NDArray[np.int64]) -> tuple[int, ...]:
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


def _replay(graph: _Graph, ids: NDArray[np.int64]) -> tuple[Logits, int]:
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
