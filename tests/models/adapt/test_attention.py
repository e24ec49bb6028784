"""Attention of packed sequences: each sample and base computed alone by the plain model, as at run time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from tiny import ARCHITECTURES, write  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from pard_onnx.models.adapt.attention import Plan, chunk_spans, padded, with_packed_attention  # noqa: E402
from pard_onnx.models.adapt.packing import IGNORE, Drop, pack_samples  # noqa: E402

MASK, CPU = 299, torch.device("cpu")
FORMS = ("dense", "chunks", "flex")


def samples_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 290, n), rng.random(n) < 0.7) for n in lengths]


def packed_of(lengths, drop, seed=0):
    return pack_samples(samples_of(lengths, seed), MASK, drop, np.random.default_rng(seed))


def run(model: Any, packed: Any, form: str) -> Any:
    with with_packed_attention(model):
        ids, positions = (torch.from_numpy(one)[None] for one in (packed.ids, packed.positions))
        return model(input_ids=ids, position_ids=positions, plan=Plan(packed, form, CPU), use_cache=False).logits[0]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_form_is_each_sample_and_base_alone(family: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("pard_onnx.models.adapt.attention.CHUNK", 16)
    monkeypatch.setattr(chunk_spans, "__defaults__", (16,))  # so that samples of a test have several chunks
    folder = write(tmp_path / "model", family, layers=2, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    samples = samples_of((19, 3, 1, 9))
    packed = pack_samples(samples, MASK, Drop(4, 0.8, 0.3), np.random.default_rng(1))
    with torch.inference_mode():
        found = {form: run(model, padded(packed) if form == "flex" else packed, form) for form in FORMS}
        for row, (sample, segment, base) in enumerate(zip(packed.samples, packed.segments, packed.bases, strict=True)):
            run_time = [*samples[sample][0][: base + 1], *[MASK] * segment]
            expected = model(input_ids=torch.tensor([run_time]), use_cache=False).logits[0, -1]
            for form in FORMS:
                torch.testing.assert_close(found[form][row], expected, rtol=1e-3, atol=1e-4, msg=f"{form} {row}")
    assert packed.segments.max() == 3 and found["dense"].std() > 0.3
    assert model.config._attn_implementation == "sdpa"


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 64), st.integers(1, 5), st.integers(0, 99))
def test_chunks_hold_all_that_is_seen(lengths, size, length, seed):
    packed = packed_of(lengths, Drop(length, 0.7, 0.3), seed)
    mask, seen = packed.mask(), np.zeros((len(packed.ids),) * 2, bool)
    queries = []
    for rows, keys in chunk_spans(packed, size):
        queries += range(rows.start, rows.stop)
        for span in keys:
            seen[rows, span] = True
    assert queries == list(range(len(packed.ids)))
    assert not (mask & ~seen).any()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 99))
def test_masks_and_labels_are_of_replies(lengths, length, seed):
    """What is learned is a reply's token, and a chain follows a token from which a reply goes on."""
    samples = samples_of(lengths, seed)
    packed = pack_samples(samples, MASK, Drop(length, 0.7, 0.3), np.random.default_rng(seed))
    assert sorted({*packed.samples.tolist()}) == list(range(len(lengths)))
    for number, (tokens, replies) in enumerate(samples):
        own = packed.samples == number
        assert packed.positions[own].min() == 0
        assert packed.ids[own & (packed.segments == 0)].tolist() == tokens.tolist()
        places = zip(packed.segments[own], packed.positions[own], packed.bases[own], packed.labels[own], strict=True)
        for segment, position, base, label in places:
            learned = position + 1 < len(tokens) and replies[position + 1]
            assert label == (tokens[position + 1] if learned else IGNORE)
            assert segment == 0 or replies[base + 1]


def test_gradients_are_those_of_the_dense_mask(tmp_path):
    folder = write(tmp_path / "model", "qwen3", layers=2, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    packed = packed_of((300, 20, 30), Drop(4, 0.7, 0.2))
    assert len(chunk_spans(packed)) > 2
    gradients = {}
    for form in ("dense", "chunks"):
        model.zero_grad()
        run(model, packed, form).square().mean().backward()
        gradients[form] = [one.grad.clone() for one in model.parameters()]
    for dense, chunks in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(chunks, dense, rtol=1e-4, atol=1e-6)
