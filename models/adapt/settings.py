"""`Settings`: how a draft is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pard_onnx.models.checks import DRAFT_LIMIT, finite_number, require_whole
from pard_onnx.models.errors import BadInput, shown

from .packing import Drop

Method = Literal["pard", "pard2"]
WRITER_PRECISION: Literal["int8"] = "int8"  # of an exported target that writes replies: nearly what its floats say
Precision = Literal["auto", "fp32", "bf16"]
Attention = Literal["auto", "dense", "chunks", "flex"]
CHOICES = {"method": get_args(Method), "precision": get_args(Precision), "attention": get_args(Attention)}
# What a resumed run may change: it decides when to look and when to stop, and not what a step learns
FREE = frozenset({"save_every", "evaluate_every", "patience", "attention"})


@dataclass(frozen=True, slots=True)
class Settings:
    """How a draft is trained. Raises BadInput for values that cannot be."""

    method: Method = "pard"
    draft_length: int = 8  # K
    ratio: float = 0.7  # COD: what each position keeps of the masks of the one before it
    floor: float = 0.2  # COD: the least share of the masks that a position keeps
    rate: float = 2e-4  # the peak learning rate
    epochs: float = 3.0  # passes over the data, unless `steps` is given
    steps: int | None = None  # of the optimizer
    sequence_tokens: int = 1024  # real tokens of a packed sequence at most
    batch_tokens: int = 8192  # real tokens of a step of the optimizer, about
    warmup: float = 0.05  # the share of the steps over which the rate rises
    weight_decay: float = 0.01
    clip: float = 1.0  # the largest norm of a gradient
    seed: int = 0
    precision: Precision = "auto"  # bf16 on a GPU that has it, else fp32
    attention: Attention = "auto"  # flex on CUDA and ROCm, else chunks
    recompute: bool = False  # compute activations again in the backward pass, which saves memory
    freeze_embedding: bool = False
    save_every: int = 200  # steps
    evaluate_every: int = 200  # steps
    patience: int = 5  # evaluations without a gain after which the training ends

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise BadInput(f"{name} must be one of {', '.join(known)}, not {shown(getattr(self, name))}")
        require_whole("draft_length", self.draft_length, 1, DRAFT_LIMIT)
        least = {"sequence_tokens": self.draft_length + 2, "seed": 0}
        for name in ("sequence_tokens", "batch_tokens", "save_every", "evaluate_every", "patience", "seed"):
            require_whole(name, getattr(self, name), least.get(name, 1))
        if self.steps is not None:
            require_whole("steps", self.steps, 1)
        for name, most in (("ratio", 1.0), ("floor", 1.0), ("rate", 1.0), ("epochs", 1e6), ("clip", 1e6)):
            if not 0 < finite_number(name, getattr(self, name)) <= most:
                raise BadInput(f"{name} must be above 0 and at most {most:g}, not {shown(getattr(self, name))}")
        for name in ("warmup", "weight_decay"):
            if not 0 <= finite_number(name, getattr(self, name)) <= 1:
                raise BadInput(f"{name} must be from 0 to 1, not {shown(getattr(self, name))}")

    @property
    def drop(self) -> Drop:
        return Drop(self.draft_length, self.ratio, self.floor)

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of `step` (0-based) of `steps`: it rises linearly, then falls linearly towards zero."""
        rising = round(self.warmup * steps)
        if step < rising:
            return self.rate * (step + 1) / (rising + 1)
        return self.rate * (steps - step) / (steps - rising)
