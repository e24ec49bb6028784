"""Scales of activations for static quantization: of what the matrices' products read and give over calibration text.

The text goes through the float model a layer at a time (layers.py), so that neither the float graph nor its inner
values are ever whole. Zero points, and scales for a range, are onnxruntime.quantization's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.quant_utils import compute_scale_zp, get_qmin_qmax_for_qType
from torch import Tensor, nn

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadInput
from pard_onnx.quantize.packing.prepared import HEAD

from .activations import Scales
from .layers import GROUPS, Layers
from .magnitudes import Magnitudes
from .text import Row

ENOUGH = 32  # rows of text, spread over it; more change no scale by much
TYPES = {8: QuantType.QInt8, 16: QuantType.QInt16}
Progress = Callable[[int], None]  # layers done


@dataclass(slots=True)
class Ranges:
    """Magnitudes by the names of matrices: what their products read, and what they give before a bias is added."""

    inputs: dict[str, Magnitudes] = field(default_factory=dict)
    outputs: dict[str, Magnitudes] = field(default_factory=dict)

    def scales(self, bits: int) -> Scales:
        return Scales(*({n: scale(m, bits) for n, m in part.items()} for part in (self.inputs, self.outputs)))


def scale(found: Magnitudes, bits: int) -> np.float32:
    """Of symmetric integers of so many bits, whose zero point is 0; 1 for what is always 0."""
    largest = found.clip(bits)
    lowest, highest = get_qmin_qmax_for_qType(TYPES[bits].tensor_type, symmetric=True)
    _, scale = compute_scale_zp(-largest, largest, lowest, highest, symmetric=True)
    return np.float32(scale)


def some(rows: Sequence[Row]) -> list[Row]:
    """At most ENOUGH, from all over the text."""
    return [rows[i * len(rows) // ENOUGH] for i in range(ENOUGH)] if len(rows) > ENOUGH else list(rows)


def ranges(checkpoint: Checkpoint, rows: Sequence[Row], progress: Progress) -> Ranges:
    """BadInput where the model's own numbers are not finite."""
    found = Ranges()
    with torch.inference_mode():
        layers = Layers(checkpoint, rows)
        for index in range(checkpoint.spec.layers):
            with layers.loaded(index) as layer, _watched(layer, f"model.layers.{index}", found):
                layers.advance(layer)
            progress(index + 1)
        found.inputs[HEAD] = Magnitudes()
        for states in layers.hidden:
            _add(found.inputs[HEAD], layers.normed(states), HEAD)
    return found


@contextmanager
def _watched(layer: nn.Module, prefix: str, found: Ranges) -> Iterator[None]:
    """While the layer runs its matrices' inputs and products go into `found`. Those of one input share its entry."""
    hooks = []
    for group in GROUPS:
        shared = Magnitudes()
        for name in group:
            module, full = layer.get_submodule(name), f"{prefix}.{name}"
            found.inputs[full], found.outputs[full] = shared, Magnitudes()
            hooks.append(module.register_forward_hook(_adds(full, found, reads=name == group[0])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adds(name: str, found: Ranges, *, reads: bool) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if reads:
            _add(found.inputs[name], arguments[0], name)
        bias = module._parameters.get("bias")
        _add(found.outputs[name], output if bias is None else output - bias, name)

    return hook


def _add(magnitudes: Magnitudes, x: Tensor, name: str) -> None:
    try:
        magnitudes.add(x.numpy())
    except ValueError:
        reason = "what it reads or gives is not finite over this text; the checkpoint is damaged"
        raise BadInput(f"{name}: {reason}") from None
