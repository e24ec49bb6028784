"""The parity check, with which every export ends: the logits of the exported graphs against torch's.

Both read one fixed text: a prefill, steps of single tokens, a step of wrong tokens that is rolled back, and a step of
several tokens over the right ones. A draft's logits at its masks are compared too; those of a draft that reads features
without and with them. For a target the check also finds the step widths whose rows are bitwise equal, and compares the
hidden states that it gives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

import numpy as np
import torch

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import Failure
from pard_onnx.models.manifest import Manifest, Parity, read_draft_ids
from pard_onnx.models.precision import FLOATS
from pard_onnx.models.spec import TargetFeatures

from .drive import Driver, Ids, Logits, drive
from .reference import Reference, load_reference

TEXT = (
    "def binary_search(items, wanted):\n    low, high = 0, len(items)\n    while low < high:\n"
    "        middle = (low + high) // 2\n        if items[middle] < wanted:\n            low = middle + 1\n"
    "        else:\n            high = middle\n    return low\n\nThe quick brown fox jumps over 13 lazy dogs."
)
LENGTH, PREFILL, SINGLE, MULTI = 48, 32, 4, 8
# The largest relative error of logits: far above what the floats' precision costs (1e-6 and 1e-3), far below what a
# misread weight does
FLOAT_ERRORS = {"float32": 0.03, "float16": 0.1}
OTHER_MODEL = 1.0  # that of logits which have nothing in common with the reference
WIDEST = LENGTH - PREFILL  # of the steps compared bit for bit


def check(checkpoint: Checkpoint, folder: Path, manifest: Manifest, reference: Reference | None = None) -> Parity:
    """Compare the graphs in `folder` with torch on the checkpoint that they were made of.

    Raises Failure for another model, and for logits that are not finite.

    reference: the checkpoint in torch; None: it is loaded here.
    """
    reference = reference or load_reference(checkpoint)
    spec = checkpoint.spec
    ids = _ids(checkpoint)
    batch = ids[None]
    if spec.pard is not None:  # a second sequence that ends with masks
        masked = ids.copy()
        masked[LENGTH - MULTI + 1 :] = spec.pard.mask_id
        batch = np.stack([ids, masked])
    wanted = reference(torch.from_numpy(batch)).numpy()
    graph = drive(folder, manifest)
    rows = _replay(graph, ids, draft=spec.pard is not None)
    expected = [wanted[row.sequence, row.end - len(row.logits) : row.end] for row in rows]
    if spec.pard is not None and spec.pard.features:  # once more, with features
        given = _features(spec.pard.features)
        masked_features = np.concatenate(
            [given[: LENGTH - MULTI + 1], np.repeat(given[[LENGTH - MULTI]], MULTI - 1, 0)]
        )
        states = torch.from_numpy(np.stack([given, masked_features]))
        wanted = reference(torch.from_numpy(batch), features=states).numpy()
        graph.length = 0
        dependent = _replay(graph, ids, draft=True, features=given)
        expected += [wanted[row.sequence, row.end - len(row.logits) : row.end] for row in dependent]
        rows += dependent
    found = np.concatenate([row.logits for row in rows])
    # The ids of the columns; further columns are padding ids, whose logits are -inf by design
    ids_of = read_draft_ids(folder) if manifest.draft_vocabulary else np.arange(spec.vocabulary.size)
    found, known = found[:, : len(ids_of)], np.concatenate(expected)[:, ids_of]
    parity = _compare(found, known, len(rows[-1].logits))
    if not isfinite(parity.max_error):
        raise Failure(
            f"{checkpoint.path}: its logits are not finite, in torch or in the {manifest.precision} graph; "
            "the checkpoint is damaged or beyond the range of its floats (--no-verify exports it all the same)"
        )
    _require_same_model(found, known, manifest)
    if manifest.feature_layers:
        graph.length = 0
        graph.step(ids)
        exact = reference.hidden_states(torch.from_numpy(ids[None]), manifest.feature_layers)[0].numpy()
        _require_same_model(graph.hidden_states, exact, manifest, "hidden states")
    any_width = spec.pard is None and not manifest.graphs  # steps of any width, with logits of all rows
    return replace(parity, exact_widths=_exact_widths(graph, ids)) if any_width else parity


def _exact_widths(graph: Driver, ids: Ids) -> tuple[int, ...]:
    """Step widths at which the logits of the same tokens are bitwise those of the widest step."""
    rows = {}
    for width in range(1, WIDEST + 1):
        graph.length = PREFILL
        rows[width] = graph.step(ids[PREFILL : PREFILL + width])
    return tuple(width for width, found in rows.items() if np.array_equal(found, rows[WIDEST][:width]))


@dataclass(frozen=True, slots=True)
class _Rows:
    """Logits of the last tokens before the position `end` of a sequence."""

    logits: Logits
    end: int
    sequence: int = 0  # 0: the text; 1: the sequence that ends with masks


def _ids(checkpoint: Checkpoint) -> Ids:
    tokenizer = checkpoint.tokenizer()
    encoded = tokenizer.encode(TEXT, add_special_tokens=False).ids
    return np.resize(np.array(encoded, dtype=np.int64), LENGTH)


def _features(features: TargetFeatures) -> Logits:
    """What a draft reads with each token of the text: numbers that no target gives, since any do; none at first."""
    found = np.random.default_rng(0).normal(size=(LENGTH, features.columns)).astype(np.float32)
    found[0] = 0
    found[:, features.width :] = 1  # of the bias
    return found


def _replay(graph: Driver, ids: Ids, *, draft: bool, features: Logits | None = None) -> list[_Rows]:
    """The graph's rows in the order of the module docstring; the last MULTI follow a rollback.

    features: of the ids; None: a draft reads tokens alone.
    """

    def step(first: int, stop: int, draft_length: int = 1) -> Logits:
        given = None if features is None else features[first:stop]
        return graph.step(ids[first:stop], draft_length, given)

    rows = [_Rows(step(0, PREFILL), PREFILL)]
    rows += [_Rows(step(i, i + 1), i + 1) for i in range(PREFILL, PREFILL + SINGLE)]
    if not draft:
        rows.append(_Rows(step(PREFILL + SINGLE, LENGTH), LENGTH))
    start = LENGTH - MULTI
    graph.length = start
    step(0, MULTI)  # wrong tokens over the right ones
    graph.length = start
    if not draft:
        rows.append(_Rows(step(start, LENGTH), LENGTH))
    else:
        graph.length = PREFILL + SINGLE  # as if the draft had not read the tokens in between
        rows.append(_Rows(step(PREFILL + SINGLE, start + 1, MULTI), LENGTH, 1))
    return rows


def _compare(found: Logits, expected: Logits, rolled_back: int) -> Parity:
    error = np.abs(found - expected)
    agreement = (found.argmax(axis=1) == expected.argmax(axis=1)).mean()
    return Parity(
        len(found), float(error.max()), float(error.mean()), float(agreement), float(error[-rolled_back:].max())
    )


def _require_same_model(found: Logits, expected: Logits, manifest: Manifest, what: str = "logits") -> None:
    """Failure where the graphs compute something else than the checkpoint."""
    with np.errstate(invalid="ignore", over="ignore"):
        error = float(np.sqrt(np.square(found - expected).mean() / expected.var()))
    floats = manifest.kv_cache == "float" and all(tensor.format in FLOATS.values() for tensor in manifest.tensors)
    most = FLOAT_ERRORS[manifest.recipe.floats] if floats else OTHER_MODEL
    if error > most:
        raise Failure(
            f"the exported {manifest.precision} graph is not the model that transformers loads: the relative error of "
            f"its {what} is {error:.2g}, at most {most:g} is rounding; please report this model (--no-verify exports "
            "it all the same)"
        )
