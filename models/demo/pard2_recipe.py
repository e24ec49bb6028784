"""How the demo pair's draft became a PARD-2 draft: `python -m pard_onnx.models.demo.pard2_recipe --work DIR`.

Two stages, each resumable; a finished one is skipped:
  replies     the shipped target's own greedy continuations of corpus prefixes
  draft       the shipped PARD draft, which learns to read its target (PARD-2, arXiv 2605.08632)
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from pard_onnx.models import demo
from pard_onnx.models.adapt import pard2
from pard_onnx.models.adapt.packing import Drop, pack
from pard_onnx.models.adapt.training import Schedule, train

from . import tokenizer
from .recipe import DEVICE, MASK_ID, SEED, Ids, TrainingRecipe, save

LAYERS = (-1, -3, -5)  # of the target's six: what the last norm gives, and what layers 4 and 2 leave
# The projection's scale while it is trained: the first steps are noise, which must be small beside embeddings
GAIN = 0.1
DROP = Drop(segments=16, ratio=0.7, floor=0.1)
SCHEDULE = Schedule(steps=1200, rate=1e-3)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Packed sequences and what the target says about their real tokens."""

    ids: Tensor  # [batch, tokens], as the next three
    positions: Tensor
    labels: Tensor
    bases: Tensor
    mask: Tensor  # added to attention scores, [batch, 1, tokens, tokens]
    features: Tensor  # [batch, tokens, width]; zeros in sequences that are read without features
    reading: pard2.TargetReading


def packed_batch(target: Qwen2ForCausalLM, windows: Ids, step: int, drop: Drop = DROP) -> PackedBatch:
    """The packed windows [rows, length] of a step."""
    rng = np.random.default_rng((SEED, 2, step))
    packs = [pack(row, MASK_ID, drop, rng) for row in windows]
    ids, positions, labels, bases = (
        torch.from_numpy(np.stack([getattr(packed, name) for packed in packs])).to(DEVICE)
        for name in ("ids", "positions", "labels", "bases")
    )
    visible = np.stack([packed.mask() for packed in packs])[:, None]
    mask = torch.from_numpy(np.where(visible, np.float32(0), np.float32("-inf"))).to(DEVICE)
    reading = pard2.read_target(target, torch.from_numpy(windows).to(DEVICE), LAYERS)
    read = torch.from_numpy(rng.random(len(windows)) >= pard2.WITHOUT_FEATURES).to(DEVICE)
    features = pard2.packed_features(reading, bases) * read[:, None, None]
    return PackedBatch(ids, positions, labels, bases, mask, features, reading)


def packed_loss(net: nn.Module, batch: PackedBatch) -> Tensor:
    logits = net(batch.ids, batch.positions, batch.mask, batch.features)
    return pard2.loss(logits, batch.labels, batch.positions, batch.bases, batch.reading)


@dataclass(frozen=True, slots=True)
class Pard2Recipe(TrainingRecipe):
    """The stages over one work folder; they go on from the shipped pair instead of training it."""

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(demo.TARGET / "tokenizer.json"))

    def target(self, schedule: Schedule | None = None) -> Qwen2ForCausalLM:
        net = shipped(demo.TARGET)
        nn.Module.eval(net).requires_grad_(False)
        return net

    def replies(self, total: int = 400_000, rows: int = 128, prompt: int = 64, new: int = 192) -> Ids:
        return TrainingRecipe.replies(self, total, rows, prompt, new)  # `super` knows no dataclass with slots

    def pard2_draft(self, schedule: Schedule = SCHEDULE, rows: int = 8, length: int = 320) -> pard2.FeatureDraft:
        target, mixed = self.target(), self.mixed(length)
        sample = pard2.read_target(target, torch.from_numpy(mixed(0, 8 * rows)).to(DEVICE), LAYERS).features
        whitening = pard2.whitening_of(pard2.moments(sample) / sample[..., 0].numel())
        net = pard2.FeatureDraft(shipped(demo.DRAFT), sample.shape[-1], GAIN, whitening)

        def batch(step: int) -> PackedBatch:
            return packed_batch(target, mixed(step, rows), step)

        train(net, batch, packed_loss, schedule, self.work / "pard2-draft", self.log)
        return net

    def publish(self, folder: Path) -> None:
        """Write the draft as a checkpoint in the form of AMD's."""
        net = self.pard2_draft()
        assert isinstance(net.draft, Qwen2ForCausalLM)
        net.draft.config.update(net.facts(LAYERS))
        save(net.draft, folder)
        tokenizer.save(self.tokenizer(), folder)
        projection = folder / "pard_warp_model" / "model.safetensors"
        projection.parent.mkdir(exist_ok=True)
        weight = net.projection().to("cpu", torch.bfloat16).contiguous()
        save_file({"target_proj.weight": weight}, projection, {"format": "pt"})


def shipped(folder: Path) -> Qwen2ForCausalLM:
    """A model of the pair, in float32."""
    net = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nn.Module.to(net, DEVICE)  # transformers' own `to` is untyped
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and logs of the stages")
    parser.add_argument("--output", type=Path, help="where to write the finished draft; default: WORK/pard2")
    arguments = parser.parse_args()
    Pard2Recipe(arguments.work).publish(arguments.output or arguments.work / "pard2")


if __name__ == "__main__":
    main()
