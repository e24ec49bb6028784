"""The arithmetic of quality: windows, rows and scores against literal loops; rows of artifacts against torch."""

import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from pard_onnx.benchmarks.quality.perplexity import (
    DRAFTS,
    LEAST_TOKENS,
    STRIDE,
    TextRows,
    artifact_rows,
    checkpoint_rows,
    cut_windows,
    round_starts,
    row_count,
    score_rows,
)
from pard_onnx.export.exporter import Job, export
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.devices import DEVICES, form_for
from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import Manifest, Source
from pard_onnx.runtime.providers.discovery import require_installed
from pard_onnx.runtime.providers.threads import Threads

Floats = NDArray[np.float32]


@given(
    st.integers(0, 400),
    st.integers(LEAST_TOKENS, 64),
    st.integers(LEAST_TOKENS, 300),
    st.lists(st.just(999), max_size=1),
)
def test_windows_are_pieces_of_the_text(size: int, length: int, most: int, before: list[int]) -> None:
    ids = list(range(size))
    if len(before) + size < LEAST_TOKENS:
        with pytest.raises(BadInput, match=f"the text has {size} tokens"):
            cut_windows(ids, length, most, before)
        return
    found = cut_windows(ids, length, most, before)
    assert found.size <= most and found.shape[1] == min(length, most, len(before) + size)
    for row in found.tolist():
        piece = row[len(before) :]
        assert row[: len(before)] == before and piece == list(range(piece[0], piece[0] + len(piece)))
    firsts = found[:, len(before)]
    assert (np.diff(firsts) >= found.shape[1] - len(before)).all()  # no token twice
    if len(found) > 1:
        assert firsts[0] == 0 and size - found[-1, -1] <= 2 * length  # from its beginning to its end


def literal_scores(ref: Floats, model: Floats, wanted: list[int]) -> tuple[float, float, float, float]:
    """Perplexity, ratio of perplexities, divergence and agreement, number by number."""
    losses, base, divergence, same = [], [], [], []
    for p_logits, q_logits, token in zip(ref.tolist(), model.tolist(), wanted, strict=True):
        p, q = ([math.exp(x - max(row)) for x in row] for row in (p_logits, q_logits))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        losses.append(-math.log(q[token]))
        base.append(-math.log(p[token]))
        divergence.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        same.append(p.index(max(p)) == q.index(max(q)))
    mean = [sum(values) / len(values) for values in (losses, base, divergence, same)]
    return math.exp(mean[0]), math.exp(mean[0] - mean[1]), mean[2], mean[3]


@given(st.integers(0, 2**32), st.integers(2, 40), st.floats(0, 2))
def test_scores_are_those_of_a_literal_loop(seed: int, many: int, noise: float) -> None:
    random = np.random.default_rng(seed)
    size, padding = 11, 3
    base = random.normal(0, 3, (many, size + padding)).astype(np.float32)
    model = base + random.normal(0, noise, base.shape).astype(np.float32)
    model[:, size:] = base[:, size:] = 1e4  # rows of the vocabulary that the tokenizer does not have
    wanted = random.integers(size, size=many)
    masks = np.arange(many) % 3

    def parts(logits: Floats) -> Iterator[TextRows]:
        yield TextRows(wanted[:1], masks[:1], logits[:1])
        yield TextRows(wanted[1:], masks[1:], logits[1:])

    file = io.BytesIO()
    alone = score_rows(parts(base), size, keep=file)
    file.seek(0)
    found = score_rows(parts(model), size, against=file)
    for kind, row, unaware in zip((masks == 0, masks > 0), found, alone, strict=True):
        expected = literal_scores(base[kind, :size], model[kind, :size], wanted[kind].tolist())
        assert row.ratio is not None and row.divergence is not None
        actual = (row.perplexity, row.ratio.value, row.divergence, row.agreement)
        assert actual == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert row.count == unaware.count == kind.sum()
        assert unaware.ratio is None and row.perplexity / row.ratio.value == pytest.approx(unaware.perplexity, 1e-5)
    assert [row.rows for row in found] == ["tokens", "masks"]


def test_an_id_that_neither_can_give_costs_nothing() -> None:
    logits = np.array([[0.0, 1.0, -np.inf]] * 2, np.float32)
    file = io.BytesIO()
    score_rows([TextRows(np.array([0, 1]), np.zeros(2, np.int64), logits)], 3, keep=file)
    file.seek(0)
    (found,) = score_rows([TextRows(np.array([0, 1]), np.zeros(2, np.int64), logits)], 3, against=file)
    assert found.divergence == pytest.approx(0, abs=1e-7) and found.agreement == 1


@pytest.mark.parametrize(("role", "device"), (("target", "cpu"), ("draft", "cpu"), ("draft", "npu")))
def test_rows_are_torchs_own(tmp_path: Path, tiny: Callable[..., Path], role: str, device: str) -> None:
    """Every row by the artifact and by the streamed checkpoint is transformers' of the tokens that it may see."""
    checkpoint = Checkpoint.open(tiny(tmp_path / "model", "qwen2", role))
    wanted = form_for(DEVICES[device])
    export(Job(checkpoint, Source("tiny"), tmp_path / "out", "fp32", form=wanted, capacity=128, verify=False))
    text = np.random.default_rng(1).integers(0, 290, (2, 45))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)

    def literal() -> Iterator[tuple[int, int, Floats]]:
        for ids in text.tolist():
            if role == "target":
                yield from ((ids[i + 1], 0, torchs(ids[: i + 1])[-1]) for i in range(len(ids) - 1))
                continue
            for known in round_starts(len(ids)):
                logits = torchs(ids[:known] + [300] * (DRAFTS - 1))[-DRAFTS:]
                yield from ((ids[known + j], j, logits[j]) for j in range(DRAFTS))

    def torchs(ids: list[int]) -> Floats:
        with torch.inference_mode():
            found: Floats = model(input_ids=torch.tensor([ids])).logits[0].numpy()
        return found

    expected = list(literal())
    manifest = Manifest.read(tmp_path / "out")
    assert row_count(manifest.spec, text) == len(expected) > STRIDE
    for rows in (
        artifact_rows(tmp_path / "out", manifest, text, require_installed("cpu"), Threads(1)),
        checkpoint_rows(checkpoint, text),
    ):
        found = [item for part in rows for item in zip(part.wanted, part.masks, part.logits.copy(), strict=True)]
        assert [(int(a), int(b)) for a, b, _ in found] == [(a, b) for a, b, _ in expected]
        for (_, _, ours), (_, _, theirs) in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours[:300], theirs[:300], atol=1e-4)
