"""What a training minimizes: PARD's cross-entropy, or PARD-2's weighted cross-entropy and divergence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from . import pard2
from .attention import Plan, chosen_form, padded
from .label_loss import Teaching, label_loss
from .packing import IGNORE, PackedSequence
from .settings import Settings

GAIN = 0.5  # the scale of PARD-2's projection while it is trained, in root mean squares of the embedding


@dataclass(frozen=True, slots=True)
class Losses:
    """The loss of a sequence."""

    total: Tensor  # a scalar: the sum over the labels, in nats
    by_position: Tensor  # [K]: the cross-entropy of each position, summed
    labels: Tensor  # [K]: the labels of each position


class Pard:
    """PARD: the cross-entropy of each label."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.form = chosen_form(settings.attention, device)

    def network(self, draft: PreTrainedModel) -> nn.Module:
        """What is trained: the draft itself, or a module around it."""
        return draft

    def logits(self, net: nn.Module, packed: PackedSequence, rows: Tensor, training: bool) -> tuple[Tensor, Any]:
        """The logits of some rows [n, vocabulary], and what the target says, where it is asked."""
        packed = padded(packed) if self.form == "flex" else packed
        ids, positions = (torch.from_numpy(one)[None].to(self.device) for one in (packed.ids, packed.positions))
        plan = Plan(packed, self.form, self.device)
        found = net(input_ids=ids, position_ids=positions, plan=plan, logits_to_keep=rows, use_cache=False)
        return found.logits[0], None

    def losses(self, net: nn.Module, packed: PackedSequence, training: bool = True) -> Losses:
        """The loss of a packed sequence."""
        kept = np.flatnonzero(packed.labels != IGNORE)
        rows, labels = (torch.from_numpy(one).to(self.device) for one in (kept, packed.labels[kept]))
        logits, read = self.logits(net, packed, rows, training)
        total, surprise = self.total(logits, labels, kept, read)
        segments = torch.from_numpy(packed.segments[kept]).to(self.device)
        zeros = torch.zeros(self.settings.draft_length, device=self.device)
        return Losses(
            total,
            zeros.index_add(0, segments, surprise),
            zeros.index_add(0, segments, torch.ones_like(surprise)),
        )

    def total(self, logits: Tensor, labels: Tensor, kept: np.ndarray[Any, Any], read: Any) -> tuple[Tensor, Tensor]:
        """The loss of the kept tokens, and the cross-entropy of each, which has no gradient."""
        return label_loss(logits, labels)


class Pard2(Pard):
    """PARD-2: what the target says about the real tokens weighs and teaches; it reads each sample as it comes."""

    def __init__(self, settings: Settings, device: torch.device, target: PreTrainedModel) -> None:
        super().__init__(settings, device)
        self.target, self.layers = target, feature_layers(target.config.num_hidden_layers)

    def network(self, draft: PreTrainedModel, whitening: Tensor | None = None) -> nn.Module:
        """whitening: of the target's features, one part for each layer; None: they are read as they are."""
        embedding: Any = draft.get_input_embeddings()
        # The first steps of a new projection are noise, which must be small beside embeddings
        size = float(embedding.weight.detach().float().square().mean().sqrt())
        gain = GAIN * size * float(getattr(embedding, "embed_scale", 1.0))
        return pard2.FeatureDraft(draft, len(self.layers) * self.target.config.hidden_size, gain, whitening)

    def whitening(self, sequences: Iterable[PackedSequence]) -> Tensor:
        """The whitening of the features that the target has in some sequences."""
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for packed in sequences:
            features = reading(self.target, packed, self.layers, self.device).features
            total = total + pard2.moments(features, len(self.layers))
            count += features[..., 0].numel()
        return pard2.whitening_of(total / count)

    def logits(self, net: nn.Module, packed: PackedSequence, rows: Tensor, training: bool) -> tuple[Tensor, Any]:
        read = reading(self.target, packed, self.layers, self.device)
        positions, bases = (torch.from_numpy(one)[None].to(self.device) for one in text_places(packed))
        features = pard2.packed_features(read, bases)
        # Which sequences are read without features depends on their tokens alone, so that a resumed run is exact
        if training and np.random.default_rng(int(packed.ids.sum())).random() < pard2.WITHOUT_FEATURES:
            features = torch.zeros_like(features)
        if self.form == "flex":
            count = len(packed.ids)
            packed = padded(packed)
            features = pad(features, (0, 0, 0, len(packed.ids) - count))
        ids, places = (torch.from_numpy(one)[None].to(self.device) for one in (packed.ids, packed.positions))
        plan = Plan(packed, self.form, self.device)
        logits = net(ids, places, None, features, plan=plan, logits_to_keep=rows)[0]
        return logits, (read, positions, bases)

    def total(self, logits: Tensor, labels: Tensor, kept: np.ndarray[Any, Any], read: Any) -> tuple[Tensor, Tensor]:
        found, positions, bases = read
        rows = torch.from_numpy(kept).to(self.device)
        weights = pard2.token_weights(found, positions[:, rows], bases[:, rows])[0]
        total, surprise = label_loss(logits, labels, Teaching(found.logits[0], positions[0, rows], weights))
        return total * (len(kept) / weights.sum().clamp_min(1e-6)), surprise


def objective(settings: Settings, device: torch.device, target: PreTrainedModel | None) -> Pard:
    """The objective of a method."""
    if settings.method == "pard2":
        assert target is not None, "PARD-2 learns from a target"
        return Pard2(settings, device, target)
    return Pard(settings, device)


def feature_layers(layers: int) -> tuple[int, ...]:
    """Four states of a target of so many layers, as PARD-2's authors take them: the last one, and some before it.

    The numbers count from the end of transformers' `hidden_states`, which has one more than there are layers.
    """
    if layers >= 24:
        return (-1, -8, -16, -24)
    return tuple(sorted({max(-1 - round(part * layers / 4), -layers) for part in range(4)}, reverse=True))


def text_places(packed: PackedSequence) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The positions and bases of packed tokens in the text of all samples, one after the other."""
    lengths = np.bincount(packed.samples[packed.segments == 0])
    starts = (np.cumsum(lengths) - lengths)[packed.samples]
    return packed.positions + starts, packed.bases + starts


def reading(
    target: PreTrainedModel, packed: PackedSequence, layers: Sequence[int], device: torch.device
) -> pard2.TargetReading:
    """What the target says about the real tokens of all samples, each read alone, one after the other."""
    real = packed.segments == 0
    parts = []
    for number in range(int(packed.samples.max()) + 1):
        ids = torch.from_numpy(packed.ids[real & (packed.samples == number)])[None].to(device)
        parts.append(pard2.read_target(target, ids, tuple(layers)))
    return pard2.TargetReading(
        torch.cat([one.features for one in parts], 1),
        torch.cat([one.logits for one in parts], 1),
        torch.cat([one.log_gold for one in parts], 1),
    )
