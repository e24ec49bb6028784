"""What a training has reached: `Point` at each evaluation, `TrainingState` in a checkpoint, `Outcome` at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .acceptance import Acceptance


@dataclass(frozen=True, slots=True)
class Point:
    """One evaluation."""

    step: int
    loss: float  # nats a label, the mean of the steps since the evaluation before
    loss_by_position: tuple[float, ...]  # [K]: the same of each position
    acceptance: Acceptance | None  # None without held-out samples

    @property
    def score(self) -> float:
        """What the best checkpoint has most of."""
        return -self.loss if self.acceptance is None else self.acceptance.mean_accepted


@dataclass(frozen=True, slots=True)
class StepSums:
    """Losses since the last evaluation, summed over labels."""

    total: float = 0.0
    labels: int = 0
    position: tuple[float, ...] = ()  # [K]
    counts: tuple[float, ...] = ()  # [K]

    @property
    def loss(self) -> float:
        return self.total / max(1, self.labels)

    @property
    def by_position(self) -> tuple[float, ...]:
        return tuple(loss / max(1.0, count) for loss, count in zip(self.position, self.counts, strict=True))

    def with_step(self, total: float, labels: int, position: Sequence[Sequence[float]]) -> StepSums:
        """position: [2, K], the losses of a step and the labels of each position."""
        before = (self.position or [0.0] * len(position[0]), self.counts or [0.0] * len(position[0]))
        losses, counts = (tuple(map(sum, zip(*pair, strict=True))) for pair in zip(before, position, strict=True))
        return StepSums(self.total + total, self.labels + labels, losses, counts)


@dataclass(frozen=True, slots=True)
class TrainingState:
    """How far a training is, as its checkpoint has it."""

    step: int = 0
    tokens: int = 0  # real tokens that were learned from
    seconds: float = 0.0  # of steps, without evaluations
    history: tuple[Point, ...] = ()
    sums: StepSums = StepSums()

    @property
    def best(self) -> Point | None:
        return max(self.history, key=lambda point: point.score, default=None)  # the first of equal ones

    @property
    def patience_used(self) -> int:
        """Evaluations since the best one."""
        best = self.best
        return 0 if best is None else sum(point.step > best.step for point in self.history)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished training has reached."""

    steps: int  # that were taken
    planned_steps: int
    best_step: int  # whose weights the draft has
    mean_accepted: float  # tokens of a round on held-out samples; 0 without any
    acceptance: Acceptance | None  # of the best step
    history: tuple[Point, ...]
    tokens_per_second: float  # real tokens, in all processes together
    seconds: float
    projection: str | None = None  # the file with PARD-2's projection: a safetensors file with `target_proj.weight`

    @property
    def stopped_early(self) -> bool:
        return self.steps < self.planned_steps
