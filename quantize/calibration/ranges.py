"""Ranges of activations over calibration text, and the scales by which recipes with QuantizeLinear quantize them.

The inputs and the products of all matrices are measured. The text goes through the float model a layer at a time
(layers.py), so that the whole model and its activations are never in memory. The scale for a range is computed by
onnxruntime.quantization.
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

from .layers import GROUPS, Layers
from .magnitudes import ActivationScales, Magnitudes
from .text import CalibrationRow

MOST_ROWS = 32  # of text; more rows hardly change the scales
TYPES = {8: QuantType.QInt8, 16: QuantType.QInt16}
Progress = Callable[[int], None]  # layers done


@dataclass(slots=True)
class ActivationRanges:
    """The magnitudes of activations, by the names of the matrices that they are multiplied by."""

    inputs: dict[str, Magnitudes] = field(default_factory=dict)  # of the product's input
    outputs: dict[str, Magnitudes] = field(default_factory=dict)  # of the product, before a bias is added

    def scales(self, bits: int) -> ActivationScales:
        """The scales for symmetric integers of so many bits."""
        parts = (self.inputs, self.outputs)
        return ActivationScales(*({name: activation_scale(m, bits) for name, m in part.items()} for part in parts))


def activation_scale(magnitudes: Magnitudes, bits: int) -> np.float32:
    """The scale for symmetric integers of so many bits, whose zero point is 0; 1 if all values are 0."""
    largest = magnitudes.clip(bits)
    lowest, highest = get_qmin_qmax_for_qType(TYPES[bits].tensor_type, symmetric=True)
    _, scale = compute_scale_zp(-largest, largest, lowest, highest, symmetric=True)
    return np.float32(scale)


def measure_ranges(checkpoint: Checkpoint, rows: Sequence[CalibrationRow], progress: Progress) -> ActivationRanges:
    """Measure the ranges over rows of text; progress: layers done. Raises BadInput if an activation is not finite."""
    found = ActivationRanges()
    with torch.inference_mode():
        layers = Layers(checkpoint, rows)
        for index in range(checkpoint.spec.layers):
            with layers.loaded(index) as layer, _recorded(layer, f"model.layers.{index}", found):
                layers.advance(layer)
            progress(index + 1)
        found.inputs[HEAD] = Magnitudes()
        for states in layers.hidden:
            _add(found.inputs[HEAD], layers.head_inputs(states), HEAD)
    return found


@contextmanager
def _recorded(layer: nn.Module, prefix: str, found: ActivationRanges) -> Iterator[None]:
    """Record the layer's activations in `found` while the context is open. Matrices with one input share its record."""
    hooks = []
    for group in GROUPS:
        shared = Magnitudes()
        for name in group:
            module, full = layer.get_submodule(name), f"{prefix}.{name}"
            found.inputs[full], found.outputs[full] = shared, Magnitudes()
            hooks.append(module.register_forward_hook(_recording_hook(full, found, reads=name == group[0])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _recording_hook(
    name: str, found: ActivationRanges, *, reads: bool
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
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
