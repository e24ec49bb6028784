"""The loss of labels, with its gradient computed beside it, some rows of logits at a time.

A vocabulary is large: the logits of a step, their logarithms, probabilities and gradients would be most of a training's
memory, and on a CPU most of its time. Here a block of rows stays in the processor's cache from the logits to the
gradient, and only the gradient is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

BLOCK = {"cpu": 8 << 20}  # bytes of a block in float32
GPU_BLOCK = 256 << 20  # where each block is a call of its own for several kernels


@dataclass(frozen=True, slots=True)
class Teaching:
    """What a target says about labels."""

    told: Tensor  # the target's logits of some tokens, [m, vocabulary]; the draft may have more rows, or fewer
    places: Tensor  # the row of `told` that each label is learned from, [n]
    weights: Tensor  # of each label, [n]
    ce_share: float = 0.1  # of the cross-entropy of the label itself
    kl_share: float = 1.0  # of KL(target || draft), among the ids that both have


def label_loss(logits: Tensor, labels: Tensor, teaching: Teaching | None = None) -> tuple[Tensor, Tensor]:
    """The summed loss of n labels, a scalar in nats, and the cross-entropy of each, [n], which has no gradient.

    logits: [n, vocabulary]. labels: [n]. teaching: None is the cross-entropy alone, with weights of 1.
    """
    apply: Any = _LabelLoss.apply  # without types of its own
    found: tuple[Tensor, Tensor] = apply(logits, labels, teaching)
    return found


class _LabelLoss(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, teaching: Teaching | None) -> tuple[Tensor, Tensor]:
        teacher = None if teaching is None else _Teacher(teaching, logits.shape[1])
        ce_share, kl_share = (1.0, 0.0) if teaching is None else (teaching.ce_share, teaching.kl_share)
        gradient, surprise = torch.empty_like(logits), torch.empty(len(labels), device=logits.device)
        total = torch.zeros((), device=logits.device)
        for rows in _blocks(logits):
            label = labels[rows, None]
            drafted = logits[rows].float().log_softmax(-1)
            surprise[rows] = -drafted.gather(1, label).squeeze(1)
            losses = ce_share * surprise[rows]
            target = None
            if teacher is not None:
                target, divergence = teacher.rows(rows, drafted)
                losses = losses + kl_share * divergence
            # Of -sum(a_i log q_i) the gradient is q - a, where sum(a) = 1
            slope = drafted.exp_().mul_(ce_share + kl_share)
            if target is not None:
                slope[:, : target.shape[1]].sub_(target, alpha=kl_share)
            slope.scatter_add_(1, label, torch.full_like(label, -ce_share, dtype=slope.dtype))
            if teaching is not None:
                weight = teaching.weights[rows].float()
                losses, slope = losses * weight, slope.mul_(weight[:, None])
            total += losses.sum()
            gradient[rows] = slope.to(gradient.dtype)
        ctx.gradient = gradient
        ctx.mark_non_differentiable(surprise)
        return total, surprise

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None  # scaled in place, since it may be the largest tensor of all
        return gradient.mul_(slopes[0]), None, None


class _Teacher:
    """The target's probabilities, which several labels may learn from."""

    def __init__(self, teaching: Teaching, vocabulary: int) -> None:
        told = teaching.told
        used, self._places = torch.unique(teaching.places, return_inverse=True)
        both = min(vocabulary, told.shape[1])
        self._probabilities = told[used, :both].float()
        self._negative_entropy = torch.empty(len(used), device=told.device)
        for rows in _blocks(self._probabilities):
            logs = self._probabilities[rows].log_softmax(-1)
            probabilities = logs.exp()
            self._negative_entropy[rows] = torch.linalg.vecdot(probabilities, logs)
            self._probabilities[rows] = probabilities

    def rows(self, rows: slice, drafted: Tensor) -> tuple[Tensor, Tensor]:
        """The probabilities that a block of labels is learned from, and their divergence from the draft's logs."""
        places = self._places[rows]
        target = self._probabilities[places]
        return target, self._negative_entropy[places] - torch.linalg.vecdot(target, drafted[:, : target.shape[1]])


def _blocks(logits: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK.get(logits.device.type, GPU_BLOCK) // (4 * logits.shape[1]))
    return (slice(first, first + step) for first in range(0, len(logits), step))
