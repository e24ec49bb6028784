"""The memory that a training takes, estimated before it starts, and what to change where it does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pard_onnx.models.errors import BadInput
from pard_onnx.models.families import shapes
from pard_onnx.models.spec import ModelSpec

from .acceptance import BASES
from .settings import Settings
from .start import Start

MEMINFO, OWN_STATUS = Path("/proc/meminfo"), Path("/proc/self/status")
PROGRAM = 600 << 20  # bytes: Python, torch and transformers themselves
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Estimate:
    """The memory of a training in bytes, by what it is for."""

    weights: int  # float32
    gradients: int
    optimizer: int  # AdamW's two averages of each trained weight
    activations: int  # that the backward pass reads
    logits: int  # of the tokens that are learned, and their gradients
    target: int  # one that is read while the draft learns or is measured, and what it says about a sequence
    program: int
    available: int | None  # bytes that this process may have; None where the system does not say
    device: str
    advice: str = ""  # what to change, where it does not fit

    @property
    def total(self) -> int:
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.logits, self.target)
        return sum(parts) + self.program

    @property
    def fits(self) -> bool:
        return self.available is None or self.total <= self.available

    def __str__(self) -> str:
        names = [one.name for one in fields(self) if one.name not in ("available", "device", "advice", "program")]
        parts = ", ".join(f"{name} {getattr(self, name) / GIB:.2f}" for name in names if getattr(self, name))
        free = "" if self.available is None else f" of {self.available / GIB:.2f} GiB that are free"
        line = f"about {self.total / GIB:.2f} GiB{free} on {self.device} ({parts})"
        return line if self.fits else f"{line}: too much; {self.advice}"


@dataclass(frozen=True, slots=True)
class TargetSize:
    """What the memory of a target depends on, of one that is loaded, or of one that would be."""

    weights: int  # bytes
    rows: int  # of its vocabulary

    @classmethod
    def of(cls, target: PreTrainedModel | ModelSpec) -> TargetSize:
        if isinstance(target, ModelSpec):
            return cls(4 * sum(prod(shape) for _, shape in shapes(target)), target.vocabulary.rows)  # in float32
        weights = sum(one.numel() * one.element_size() for one in target.parameters())
        return cls(weights, target.config.get_text_config().vocab_size)


def estimate(start: Start, settings: Settings, target: PreTrainedModel | ModelSpec | None = None) -> Estimate:
    """The memory of a training of this draft in one process.

    target: one that is in memory beside the draft, with its weights or as the spec of one that is not loaded yet.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = None if target is None else TargetSize.of(target)
    found = _estimate(start.model, settings, size, device)
    return found if found.fits else replace(found, advice=_advice(start.model, settings, size, device))


def require_room(start: Start, settings: Settings, target: PreTrainedModel | ModelSpec | None = None) -> Estimate:
    """The estimate; BadInput where the training does not fit, with what to change."""
    found = estimate(start, settings, target)
    if not found.fits:
        raise BadInput(f"not enough memory for this training: {found}")
    return found


def packed_tokens(settings: Settings) -> int:
    """Tokens of a full sequence, its masks included, if all of it is replies."""
    return sum(settings.drop.counts(settings.sequence_tokens))


def _estimate(model: PreTrainedModel, settings: Settings, target: TargetSize | None, device: torch.device) -> Estimate:
    config = model.config.get_text_config()
    parameters = sum(one.numel() for one in model.parameters())
    embedding: Any = model.get_input_embeddings()
    frozen = embedding.weight.numel() if settings.freeze_embedding else 0
    trained = 4 * (parameters - frozen)
    tokens = packed_tokens(settings)
    size = 2 if uses_bf16(settings, device) else 4
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    keys = (config.num_key_value_heads or heads) * head
    # Inputs of each matmul and norm, and what the rotary embedding, the attention and the gate keep
    layer = tokens * size * (8 * hidden + 5 * heads * head + 6 * keys + 4 * inner)
    layers = config.num_hidden_layers
    activations = tokens * 4 * hidden * layers + layer if settings.recompute else layer * layers
    mask = tokens * tokens if settings.attention == "dense" else 0  # others keep a fraction of it
    logits = tokens * config.vocab_size * (size + 4 + 4)  # themselves, as floats, and their gradients
    other = 0
    if target is not None:
        # Its logits, as floats too, and its probabilities
        other = target.weights + settings.sequence_tokens * target.rows * 12
    if target is not None and settings.method == "pard":
        # It is read while the draft is measured, when nothing is learned
        measured = min(BASES, settings.sequence_tokens) * settings.draft_length * config.vocab_size * 20
        other += max(0, measured - logits - activations)
    available = available_memory(device)
    return Estimate(
        4 * parameters, trained, 2 * trained, activations + mask, logits, other, PROGRAM, available, device.type
    )


def uses_bf16(settings: Settings, device: torch.device) -> bool:
    """Whether the training computes in bf16; weights and the optimizer stay float32."""
    if settings.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return settings.precision == "bf16"


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process may have on a device; None where the system does not say.

    On a CPU those that it has already, such as the draft's weights, are among them.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free, own = _bytes_in(MEMINFO, "MemAvailable:"), _bytes_in(OWN_STATUS, "RssAnon:")
    return None if free is None else free + (own or 0)


def _bytes_in(file: Path, name: str) -> int | None:
    """A number of kilobytes in a file of the Linux kernel; None where it is not there."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    except (OSError, StopIteration, ValueError):
        return None


def _changes(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """Settings that take less memory, and how to ask for them: what costs the least first, one upon the other."""
    names: list[str] = []
    for name, value, option in (
        ("attention", "auto", "leave out --attention dense"),
        ("recompute", True, "--recompute"),
        *(("sequence_tokens", tokens, f"--sequence-tokens {tokens}") for tokens in (512, 256, 128)),
        ("freeze_embedding", True, "--freeze-embedding"),
    ):
        now = getattr(settings, name)
        if now == value or (name == "attention" and now != "dense") or (name == "sequence_tokens" and now <= value):
            continue
        changed: Any = {name: value}
        settings = replace(settings, **changed)
        names = [one for one in names if not (name == "sequence_tokens" and one.startswith("--sequence"))]
        names.append(option)
        yield " ".join(names), settings


def _advice(model: PreTrainedModel, settings: Settings, target: TargetSize | None, device: torch.device) -> str:
    if target is not None and settings.method == "pard":
        found = _estimate(model, settings, None, device)
        if found.fits:
            return f"--expected-acceptance no would take about {found.total / GIB:.2f} GiB"
    for names, changed in _changes(settings):
        found = _estimate(model, changed, target, device)
        if found.fits:
            return f"{names} would take about {found.total / GIB:.2f} GiB"
    return "take a smaller draft (--shallow with fewer layers), a device with more memory, or end other programs"
