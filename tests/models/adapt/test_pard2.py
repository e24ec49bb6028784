"""PARD-2's training against a literal reading of the paper, and against what the draft reads at run time."""

import math

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from pard_onnx.models.adapt import pard2
from pard_onnx.models.adapt.packing import IGNORE, Drop, pack

MASK, LAYERS = 99, (-1, -2)


def model(vocabulary: int = 128, hidden: int = 32, seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def draft() -> pard2.FeatureDraft:
    whitening = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(2))
    net = pard2.FeatureDraft(model(), 48, scale=0.1, whitening=whitening)
    torch.nn.init.normal_(net.target_proj.weight, std=1.0)
    return net.eval()


@pytest.fixture(scope="module")
def target() -> Qwen2ForCausalLM:
    return model(vocabulary=140, hidden=24, seed=1)  # more rows than the draft has


class Packed:
    """Two packed sequences as tensors."""

    def __init__(self, target, length: int = 14, seed: int = 3) -> None:
        rng = np.random.default_rng(seed)
        self.tokens = rng.integers(0, 90, (2, length))
        self.packs = [pack(row, MASK, Drop(5, 0.8, 0.3), rng) for row in self.tokens]
        self.ids, self.positions, self.labels, self.bases = (
            torch.from_numpy(np.stack([getattr(one, name) for one in self.packs]))
            for name in ("ids", "positions", "labels", "bases")
        )
        self.mask = torch.where(
            torch.from_numpy(np.stack([one.mask() for one in self.packs]))[:, None], 0.0, -torch.inf
        )
        self.reading = pard2.read_target(target, torch.from_numpy(self.tokens), LAYERS)


def test_training_reads_what_the_draft_reads_at_run_time(draft, target):
    """Each token with the feature of the token before it, masks with that of the last real token; alone, unpacked."""
    packed = Packed(target)
    with torch.inference_mode():
        features = pard2.packed_features(packed.reading, packed.bases)
        logits = draft(packed.ids, packed.positions, packed.mask, features)
        hidden = target(input_ids=torch.from_numpy(packed.tokens), output_hidden_states=True).hidden_states
        hidden = torch.cat([hidden[layer] for layer in LAYERS], dim=-1)
        base, projection = draft.draft, draft.projection(scale=0.02)
        for row, one in enumerate(packed.packs):
            for at, (segment, last) in enumerate(zip(one.segments, one.bases, strict=True)):
                ids = [*packed.tokens[row, : last + 1], *[MASK] * segment]
                before = [torch.zeros(48), *hidden[row, :last]]
                read = torch.stack([*before, *[before[-1]] * segment])
                embeddings = base.get_input_embeddings()(torch.tensor(ids)) + 0.02 * read @ projection.T
                expected = base(inputs_embeds=embeddings[None]).logits[0, -1]
                torch.testing.assert_close(logits[row, at], expected, rtol=1e-3, atol=1e-3)
    assert logits.std() > 0.5  # far above the tolerance


def test_the_loss_is_the_papers_word_for_word(draft, target):
    packed = Packed(target)
    with torch.inference_mode():
        logits = draft(packed.ids, packed.positions, packed.mask, None)
        found = pard2.loss(logits, packed.labels, packed.positions, packed.bases, packed.reading, 0.3, 0.7)
        told = target(input_ids=torch.from_numpy(packed.tokens)).logits
        total = weights = 0.0
        for row, one in enumerate(packed.packs):
            for at, (segment, base) in enumerate(zip(one.segments, one.bases, strict=True)):
                if one.labels[at] == IGNORE:
                    continue
                weight = 1.0
                for skipped in range(base + 1, base + segment + 1):
                    weight *= told[row, skipped - 1].softmax(-1)[packed.tokens[row, skipped]].item()
                p = told[row, base + segment][:128].double().softmax(-1)
                q = logits[row, at].double().softmax(-1)
                surprise = -math.log(q[one.labels[at]].item())
                divergence = (p * (p.log() - q.log())).sum().item()
                total += weight * (0.3 * surprise + 0.7 * divergence)
                weights += weight
    assert found.item() == pytest.approx(total / weights, rel=1e-4)


def test_a_new_projection_changes_nothing(target):
    packed = Packed(target)
    net = pard2.FeatureDraft(model(), 48)
    with torch.inference_mode():
        features = pard2.packed_features(packed.reading, packed.bases)
        with_features = net(packed.ids, packed.positions, packed.mask, features)
        assert with_features.equal(net(packed.ids, packed.positions, packed.mask))


def test_every_part_learns(target):
    packed = Packed(target)
    net = pard2.FeatureDraft(model(), 48)
    logits = net(packed.ids, packed.positions, packed.mask, pard2.packed_features(packed.reading, packed.bases))
    pard2.loss(logits, packed.labels, packed.positions, packed.bases, packed.reading).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in net.parameters())
    assert all(parameter.grad is None for parameter in target.parameters())


def test_the_draft_that_says_what_the_target_says_has_no_loss(target):
    packed = Packed(target)
    told = packed.reading.logits.gather(1, packed.positions[..., None].expand(-1, -1, 140))
    found = pard2.loss(told, packed.labels, packed.positions, packed.bases, packed.reading, ce_share=0.0)
    assert found.item() == pytest.approx(0.0, abs=1e-5)


def test_whitened_features_are_uncorrelated_whatever_their_sizes():
    rng = torch.Generator().manual_seed(0)
    mixed = torch.randn(20, 500, 6, generator=rng) @ torch.randn(6, 6, generator=rng) + 3
    features = mixed * torch.tensor([1.0, 100, 0.1, 1, 30, 5])
    for parts in (1, 2):
        moments = pard2.moments(features, parts) / features[..., 0].numel()
        white = pard2.whitened(features, pard2.whitening_of(moments, floor=0.0)).flatten(0, 1)
        for part in white.split(6 // parts, dim=1):
            torch.testing.assert_close(part.T @ part / len(part), torch.eye(6 // parts), rtol=0, atol=1e-2)
    moments = pard2.moments(features) / features[..., 0].numel()
    bounded = pard2.whitened(features, pard2.whitening_of(moments, floor=1e-2)).flatten(0, 1)
    assert 0.05 < (bounded.T @ bounded / len(bounded)).diagonal().min() < 1 - 1e-4
