"""The check of quality that ends an export: how well the exported graphs predict a text that ships, against torch.

The text is cut into windows, each of which begins with an empty KV cache. Targets read a window in steps of several
tokens, drafts token by token, since their graphs give the logits of a step's last token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.gguf.checkpoint import GGUF
from pard_onnx.models.errors import Failure
from pard_onnx.models.manifest import Manifest, TextQuality, read_draft_ids

from .drive import Driver, Ids, Logits, drive
from .reference import Reference, load_reference

TEXT = Path(__file__).parent / "text.txt"  # of prose, code and other languages; it is not in the calibration text
ROWS = 1024  # predictions, in all windows
WINDOW = 256  # predictions of a window
BATCH = 2  # windows that the checkpoint reads at a time: their logits are in memory, and weights are widened each time
STEP = 64  # tokens of a target's step
# Shares by which the perplexity may rise: without a warning, by the bits of most weights (0: floats); at all
WARNED = {0: 0.01, 8: 0.01, 4: 0.03}
ACCEPTED = 0.25
# By the beginning of a recipe's or precision's name, the option that loses less
BETTER = (
    ("int4-best", "--precision int8"),
    ("int4-good", "--quality best"),
    ("int4", "--quality good"),
    ("int8-a8w8", "--recipe int8-a16w8"),
    ("int8-a16w8", "--precision fp32"),
    ("int8-best", "--precision fp32"),
    ("int8", "--quality best"),
)
LOGITS = 1 << 24  # that are in memory in float64 at a time
LARGEST = 700.0  # of a mean loss: its exponential is still a number
Losses = NDArray[np.float64]  # -log p of the text's tokens, in nats


def measure(
    checkpoint: Checkpoint, folder: Path, manifest: Manifest, reference: Reference | None = None
) -> TextQuality:
    """The perplexity of the graphs in `folder` and of their checkpoint, on ROWS rows of the text that ships.

    reference: the checkpoint in torch; None: it is loaded here.
    """
    reference = reference or load_reference(checkpoint)
    spec, window = manifest.spec, min(WINDOW, manifest.capacity - 1)
    known = read_draft_ids(folder) if manifest.draft_vocabulary else np.arange(spec.vocabulary.size)
    graph = drive(folder, manifest, window)
    step = 1 if spec.pard else max((g.width for g in manifest.graphs if g.logits), default=STEP)
    exact, exported, same = [], [], []
    for ids, logits in _with_reference(reference, _windows(checkpoint, window)):
        wanted = np.searchsorted(known, ids[1:])
        inside = known[np.minimum(wanted, len(known) - 1)] == ids[1:]  # a reduced vocabulary lacks some tokens
        floats = logits[:, known]
        found = _read(graph, ids[:-1], step)[:, : len(known)]
        exact.append(losses_of(floats, wanted)[inside])
        exported.append(losses_of(found, wanted)[inside])
        same.append((floats.argmax(axis=1) == found.argmax(axis=1))[inside])
    before, after = (float(np.exp(min(LARGEST, np.concatenate(losses).mean()))) for losses in (exact, exported))
    agreement = np.concatenate(same)
    return TextQuality(len(agreement), before, after, float(agreement.mean()))


def judge(quality: TextQuality, manifest: Manifest, accept_loss: bool) -> str | None:
    """What to warn of, in one line; None for an export that is as good as its bits allow.

    Raises Failure for a target beyond ACCEPTED, unless `accept_loss` is set. A draft's loss costs acceptance, but never
    changes a text. A model that predicts the text worse than chance (an untrained one) has no quality to lose.
    """
    chance = float(manifest.spec.vocabulary.size)
    if quality.loss <= WARNED[manifest.recipe.matrices.bits] or quality.reference_perplexity >= chance:
        return None
    name = manifest.quantization.recipe if manifest.quantization else manifest.precision
    said = (
        f"{name} raises this {manifest.role}'s perplexity on real text by {quality.loss:.1%}, from "
        f"{quality.reference_perplexity:.4g} to {quality.perplexity:.4g}"
    )
    better = _better(manifest, name)
    if manifest.role == "draft":
        return f"{said}: it will be accepted less often, with the same text; less is lost by {better}"
    if not quality.loss <= ACCEPTED and not accept_loss:  # a loss that is no number is a large one
        raise Failure(
            f"{said}, more than {ACCEPTED:.0%}: less is lost by {better}; --accept-loss exports it all the same"
        )
    return f"{said}; less is lost by {better}"


def _better(manifest: Manifest, name: str) -> str:
    """What loses less than the recipe or precision `name`."""
    if manifest.source.quantization == GGUF.method:
        floats = "--quality good, which rounds the floats that the file stands for"
        return floats if name.startswith("int4") else "--precision fp32"
    if manifest.source.quantization:
        return "the checkpoint in floats"
    return next((option for known, option in BETTER if name.startswith(known)), "--precision fp32")


def _windows(checkpoint: Checkpoint, window: int) -> list[Ids]:
    """Token ids of window + 1 tokens each, in which the text is repeated if it is too short."""
    tokenizer = checkpoint.tokenizer()
    text = TEXT.read_text(encoding="utf-8")
    before = tokenizer.encode("").ids[: window // 2]  # what the tokenizer puts before a text
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    count, own = ceil(ROWS / window), window + 1 - len(before)
    rows = np.resize(np.array(ids, np.int64), count * own).reshape(count, own)
    return [np.concatenate([np.array(before, np.int64), row]) for row in rows]


def _with_reference(reference: Reference, windows: Sequence[Ids]) -> Iterator[tuple[Ids, Logits]]:
    """Each window, with the reference's logits after all its tokens but the last."""
    for start in range(0, len(windows), BATCH):
        batch = windows[start : start + BATCH]
        yield from zip(batch, reference(torch.from_numpy(np.stack(batch)[:, :-1])).numpy(), strict=True)


def _read(graph: Driver, ids: Ids, step: int) -> Logits:
    """The graph's logits after each of the ids, from an empty KV cache."""
    graph.length = 0
    return np.concatenate([graph.step(ids[start : start + step]) for start in range(0, len(ids), step)])


def losses_of(logits: Logits, wanted: Ids) -> Losses:
    """-log p of the tokens `wanted` under logits [n, ids]; infinite where a row is not finite."""
    parts, count = [], max(1, LOGITS // logits.shape[1])
    for start in range(0, len(logits), count):
        rows = logits[start : start + count].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        own = wanted[start : start + count]
        picked = rows[np.arange(len(rows)), np.minimum(own, rows.shape[1] - 1)]
        parts.append(np.log(np.exp(rows).sum(axis=1)) - picked)
    losses = np.concatenate(parts)
    return np.where(np.isfinite(losses), losses, np.inf)
