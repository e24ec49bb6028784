"""The recipe of the PARD-2 draft: its batches, and a run of a few steps on the shipped pair."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from pard_onnx.models.adapt import pard2
from pard_onnx.models.adapt.packing import Drop
from pard_onnx.models.adapt.training import Schedule
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.demo import DRAFT, TARGET, pard2_recipe, recipe


@pytest.fixture
def stage(tmp_path, monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 2000, 4000)
    monkeypatch.setattr(recipe.TrainingRecipe, "tokens", lambda self: tokens)
    monkeypatch.setattr(pard2_recipe.Pard2Recipe, "replies", lambda self: tokens[::-1].copy())
    monkeypatch.setattr(pard2_recipe, "DROP", Drop(3, 0.5, 0.2))
    return pard2_recipe.Pard2Recipe(tmp_path, log=lambda _: None)


def test_a_batch_reads_features_but_for_some_sequences(stage, monkeypatch):
    target, windows = stage.target(), np.random.default_rng(1).integers(0, 2000, (4, 20))
    monkeypatch.setattr(pard2_recipe.pard2, "WITHOUT_FEATURES", 0.5)
    batches = [pard2_recipe.packed_batch(target, windows, step, Drop(3, 0.5, 0.2)) for step in (0, 0, 1, 2, 3)]
    assert batches[0].features.equal(batches[1].features) and batches[0].positions.equal(batches[1].positions)
    assert not batches[0].positions.equal(batches[2].positions)
    read = torch.cat([batch.features.abs().amax((1, 2)) > 0 for batch in batches[1:]])
    assert 0 < read.sum() < len(read)
    assert batches[0].features.shape == (*batches[0].ids.shape, 3 * 256)


def test_the_shipped_draft_becomes_a_checkpoint_that_reads_the_shipped_target(stage, tmp_path, monkeypatch):
    short = Schedule(steps=3, rate=1e-3, warmup=1, save_every=2)
    train = pard2_recipe.Pard2Recipe.pard2_draft
    monkeypatch.setattr(pard2_recipe.Pard2Recipe, "pard2_draft", lambda self: train(self, short, rows=2, length=24))
    stage.publish(tmp_path / "out")
    spec = Checkpoint.open(tmp_path / "out").spec
    features = spec.pard.features
    assert features.layers == pard2_recipe.LAYERS and features.width == 3 * Checkpoint.open(TARGET).spec.hidden
    assert features.scale == pard2.SCALE and not features.bias
    assert spec.pard.mask_id == Checkpoint.open(DRAFT).spec.pard.mask_id
    again = train(stage, short, rows=2, length=24)  # it is finished: only loaded
    assert again.target_proj.weight.abs().max() > 0
