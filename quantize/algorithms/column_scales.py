"""Scales of input columns: a layer's matrices are multiplied by them, and the sources of their inputs are divided.

The source of an input is a norm, or the matrix before it, so the model computes the same. The scales make it lose less:

AWQ (arXiv 2306.00978)          Columns of weights with large inputs are scaled up before they are rounded. The scale is
                                the root mean square of the input to the power a. Several values of a are tried, and
                                the one with the least error of the outputs is taken.
SmoothQuant (arXiv 2211.10438)  Columns of activations with large values are scaled down, for kernels that round the
                                activations to 8 bits by blocks. The scale is the square root of the input's root mean
                                square over the column's largest weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pard_onnx.models.precision import Format
from pard_onnx.models.spec import ModelSpec
from pard_onnx.quantize.algorithms.grid import round_by_importance
from pard_onnx.quantize.calibration.layers import GROUPS, Group
from pard_onnx.quantize.packing.pack import format_for_width, unpack
from pard_onnx.quantize.packing.prepared import Spool

POWERS = np.linspace(0, 1, 11)
SAMPLED_ROWS = 64  # of a matrix, whose errors are computed
FLOOR = 1e-3  # least root mean square over the mean one, for columns that the text hardly uses


def sources(spec: ModelSpec) -> dict[Group, str]:
    """By group of matrices, the module whose output is their input."""
    return dict(zip(GROUPS, (spec.norms[0], "self_attn.v_proj", spec.mlp_norm, "mlp.up_proj"), strict=True))


# The scales [in] of the matrices that read an input, from the matrices [n, in] and X X^T [in, in] or the sums of
# squares [in] of the input. The last arguments: how many query heads share a value head (1: the input is not a value
# head's), whose columns have equal scales, and the width of a head.
ChooseScale = Callable[[Sequence[Tensor], Tensor, int, int], Tensor]


def fold_scales(
    layer: nn.Module, prefix: str, spec: ModelSpec, choose: ChooseScale, inputs: dict[Group, Tensor], spool: Spool
) -> None:
    """Scale the columns of a layer's matrices, and divide their sources by the same scales.

    inputs: X X^T or the sums of squares of each group's input. Changes the layer and them in place. Norms and biases
    that change are stored in the spool.
    """
    for group, source in sources(spec).items():
        readers = [layer.get_parameter(f"{name}.weight").data for name in group]
        shared = spec.heads // spec.kv_heads if source == "self_attn.v_proj" else 1
        scale = choose(readers, inputs[group], shared, spec.head_dim)
        for reader in readers:
            reader *= scale
        inputs[group] /= torch.outer(scale, scale) if inputs[group].ndim == 2 else scale.square()
        module = layer.get_submodule(source)
        offset = spec.norm_offset if source in spec.norms else 0.0
        _divide(module, _source_scale(scale, shared, spec.head_dim), offset)
        for part, parameter in module.named_parameters():
            if parameter.ndim == 1:
                spool.replace(f"{prefix}.{source}.{part}", parameter.detach().numpy().copy())


def _divide(module: nn.Module, scale: Tensor, offset: float) -> None:
    """Divide what the module gives by the scale. offset: what a norm adds to its weight before it multiplies."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.data = (parameter.data + offset) / scale - offset
        else:
            parameter.data /= scale[:, None]


def awq_scale(fmt: Format) -> ChooseScale:
    """AWQ's scales for matrices that are rounded to this format, by importance; they need X X^T."""

    def choose(readers: Sequence[Tensor], gram: Tensor, shared: int, head_dim: int) -> Tensor:
        magnitude = _magnitudes(gram.diagonal(), shared, head_dim)
        sampled = [reader[:: -(-len(reader) // SAMPLED_ROWS)].contiguous() for reader in readers]
        tried = []
        for power in POWERS:
            scale = _balanced(magnitude**power)
            tried.append((sum(_error(rows, scale, gram, fmt) for rows in sampled), scale))
        best: Tensor = min(tried, key=lambda pair: pair[0])[1]
        return best

    return choose


def smooth_scale(readers: Sequence[Tensor], squares: Tensor, shared: int, head_dim: int) -> Tensor:
    """SmoothQuant's scales, from the sums of squares of the input."""
    largest = torch.stack([reader.abs().amax(dim=0) for reader in readers]).amax(dim=0)
    largest = _shared_columns(largest, shared, head_dim, lambda heads: heads.amax(dim=1, keepdim=True))
    largest = largest.clamp_min(FLOOR * float(largest.mean()) or 1.0)
    return _balanced((_magnitudes(squares, shared, head_dim) / largest).sqrt())


def _magnitudes(squares: Tensor, shared: int, head_dim: int) -> Tensor:
    """Root mean squares of the columns, up to a common factor."""
    mean = _shared_columns(squares, shared, head_dim, lambda heads: heads.mean(dim=1, keepdim=True)).sqrt()
    return mean.clamp_min(FLOOR * float(mean.mean()) or 1.0)


def _shared_columns(values: Tensor, shared: int, head_dim: int, joined: Callable[[Tensor], Tensor]) -> Tensor:
    """The values [in], made equal for the `shared` query heads of one value head."""
    heads = values.reshape(-1, shared, head_dim if shared > 1 else 1)
    return joined(heads).expand_as(heads).reshape(-1)


def _balanced(scale: Tensor) -> Tensor:
    return scale / (scale.max() * scale.min()).sqrt()


def _source_scale(scale: Tensor, shared: int, head_dim: int) -> Tensor:
    """The scale of each output of the source: a value head has one output for all query heads that read it."""
    return scale.reshape(-1, shared, head_dim)[:, 0].reshape(-1) if shared > 1 else scale


def _error(rows: Tensor, scale: Tensor, gram: Tensor, fmt: Format) -> float:
    """Squared error of the outputs when rows are scaled, rounded by importance and scaled back."""
    scaled = (rows * scale).numpy()
    fmt = format_for_width(fmt, scaled.shape[1], "")
    packed = round_by_importance((gram.diagonal() / scale.square()).numpy())(scaled, fmt)
    difference = torch.from_numpy(unpack(packed, fmt)) / scale - rows
    return float(((difference @ gram) * difference).sum())
