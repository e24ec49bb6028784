"""PARD-2's training (arXiv 2605.08632, section 3): a parallel draft that reads its target learns what the target says.

A token of a packed sequence counts with the probability that the target's decoding comes to it: the product of the
target's probabilities of the real tokens that its masks skip (confidence-adaptive tokens, CAT). It learns a little from
the real token and mostly from the target's whole distribution. Now and then a sequence is read without features, so
that the same weights are also a draft that reads tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, pad
from transformers import PreTrainedModel

from .label_loss import Teaching, label_loss
from .packing import IGNORE

WITHOUT_FEATURES = 0.1  # the share of sequences that are read without features
SCALE = 0.02  # of the projection in a checkpoint, as published


class FeatureDraft(nn.Module):
    """A draft with the projection that adds the target's features to its embeddings.

    The projection is zero at first: before training, this is the draft as it was. Where features are whitened, what is
    learned is a projection of the whitened ones, and the two matrices are one after training (`projection`).
    """

    def __init__(
        self, draft: PreTrainedModel, width: int, scale: float = SCALE, whitening: Tensor | None = None
    ) -> None:
        """width: columns of a feature, that is layers times the target's hidden size. scale: of the projection.

        whitening: of features (`whitening_of`); None: they are read as they are.
        """
        super().__init__()
        self.draft = draft
        self.scale = scale
        self.target_proj = nn.Linear(width, draft.config.hidden_size, bias=False, device=draft.device)
        # No buffer: several processes would send it to one another at each step
        self.whitening = None if whitening is None else whitening.to(draft.device)
        nn.init.zeros_(self.target_proj.weight)

    def forward(
        self, ids: Tensor, positions: Tensor, mask: Tensor | None, features: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Logits, [batch, tokens, vocabulary].

        ids, positions: [batch, tokens]. mask: added to attention scores, [batch, 1, tokens, tokens]. features: what
        each token reads of its target, [batch, tokens, width]; zeros for a token that reads nothing. options: of the
        draft's own `forward`.
        """
        embeddings = self.draft.get_input_embeddings()(ids)
        if features is not None:
            if self.whitening is not None:
                features = whitened(features, self.whitening)
            embeddings = embeddings + self.scale * self.target_proj(features)
        inputs = {"inputs_embeds": embeddings, "position_ids": positions, "attention_mask": mask, "use_cache": False}
        found = self.draft(**inputs, **options)
        logits: Tensor = found.logits
        return logits

    @torch.no_grad()
    def projection(self, scale: float = SCALE) -> Tensor:
        """What a checkpoint holds: `scale` times this matrix [hidden, width] projects features as they are."""
        weight = self.target_proj.weight.float()
        if self.whitening is not None:
            weight = whitened(weight, self.whitening.transpose(1, 2))
        return weight * (self.scale / scale)

    def facts(self, layers: Sequence[int], scale: float = SCALE) -> dict[str, object]:
        """What the config of a checkpoint says. layers: of the target; scale: as of `projection`."""
        return {
            "spd_type": "pard2",
            "pard2": True,
            "pard2_scale": scale,
            "pard2_proj_bias": False,
            "pard2_target_layers": list(layers),
            "pard2_target_dim": self.target_proj.in_features,
        }


def whitened(features: Tensor, whitening: Tensor) -> Tensor:
    """Features [..., width], each part of them times its matrix. whitening: [parts, width / parts, width / parts]."""
    parts = features.float().reshape(*features.shape[:-1], *whitening.shape[:2])
    return torch.einsum("...pi,pij->...pj", parts, whitening).flatten(-2)


@torch.no_grad()
def moments(features: Tensor, parts: int = 1) -> Tensor:
    """The sums of squares and products of features [..., width]: [parts, width / parts, width / parts]."""
    flat = features.double().reshape(-1, parts, features.shape[-1] // parts)
    return torch.einsum("npi,npj->pij", flat, flat)


@torch.no_grad()
def whitening_of(moments: Tensor, floor: float = 1e-3) -> Tensor:
    """The matrices by which features become uncorrelated in each of their parts, of mean square 1.

    Columns are first divided by their root mean square, since layers differ in size. floor: directions with a smaller
    share of the mean variance than this are not enlarged further; they hold little but what a quantized target rounds
    otherwise.

    moments: of n features, divided by n. The result has the same shape: [parts, width / parts, width / parts].
    """
    sizes = moments.diagonal(dim1=1, dim2=2).sqrt().clamp_min(1e-6)
    values, vectors = torch.linalg.eigh(moments / sizes[:, :, None] / sizes[:, None, :])
    roots = (values.clamp_min(0) + floor * values.mean(1, keepdim=True)).rsqrt()
    matrices = (vectors * roots[:, None, :]) @ vectors.transpose(1, 2) / sizes[:, :, None]
    found: Tensor = matrices.float()
    return found


@dataclass(frozen=True, slots=True)
class TargetReading:
    """What a target says about real tokens [batch, n]."""

    features: Tensor  # of the token before each token, [batch, n, width]; zeros for the first token
    logits: Tensor  # of the token after each token, [batch, n, vocabulary]
    log_gold: Tensor  # log-probability of each token after those before it, [batch, n]; 0 for the first token


@torch.no_grad()
def read_target(target: PreTrainedModel, ids: Tensor, layers: tuple[int, ...]) -> TargetReading:
    """Run the target over ids [batch, n]. layers: indices of transformers' `hidden_states`, from the end."""
    found = target(input_ids=ids, use_cache=False, output_hidden_states=True)
    features = torch.cat([found.hidden_states[layer] for layer in layers], dim=-1)
    log_probabilities = log_softmax(found.logits[:, :-1].float(), dim=-1)
    log_gold = log_probabilities.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return TargetReading(pad(features[:, :-1], (0, 0, 1, 0)), found.logits, pad(log_gold, (1, 0)))


def packed_features(reading: TargetReading, bases: Tensor) -> Tensor:
    """The features of packed tokens, [batch, tokens, width]: masks repeat those of the real token that they follow.

    bases: the real token of each packed token, [batch, tokens].
    """
    return rows(reading.features, bases)


def token_weights(reading: TargetReading, positions: Tensor, bases: Tensor) -> Tensor:
    """The probability that the target goes on from each token's base with the real tokens up to its position.

    positions, bases: [batch, tokens], and so is the result; 1 for real tokens, whose base is their position.
    """
    total = reading.log_gold.cumsum(dim=1)
    return (total.gather(1, positions) - total.gather(1, bases)).exp()


def loss(
    logits: Tensor,
    labels: Tensor,
    positions: Tensor,
    bases: Tensor,
    reading: TargetReading,
    ce_share: float = 0.1,
    kl_share: float = 1.0,
) -> Tensor:
    """ce_share times the weighted mean cross-entropy, and kl_share times that of KL(target || draft); in nats.

    logits: the draft's, [batch, tokens, vocabulary]. labels: the real token after each token, or IGNORE; positions and
    bases: as in `PackedSequence`; each [batch, tokens].
    """
    counted = labels != IGNORE
    weights = token_weights(reading, positions, bases)[counted]
    batch = torch.arange(len(labels), device=labels.device)[:, None]
    places = (batch * reading.logits.shape[1] + positions)[counted]
    total, _ = label_loss(
        logits[counted], labels[counted], Teaching(reading.logits.flatten(0, 1), places, weights, ce_share, kl_share)
    )
    return total / weights.sum().clamp_min(1e-6)


def rows(values: Tensor, index: Tensor) -> Tensor:
    """values [batch, n, width] at index [batch, tokens]: [batch, tokens, width]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
