"""AWQ (arXiv 2306.00978): columns of weights with large inputs are scaled up before they are rounded.

The inverse scale is multiplied into the source of the input: a norm, or the matrix before it. The scale of a column is
the root mean square of its input to the power a. Several values of a are tried, and the one with the least error of the
outputs is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pard_onnx.models.precision import Format
from pard_onnx.models.spec import ModelSpec
from pard_onnx.quantize.calibration.layers import GROUPS, Group
from pard_onnx.quantize.packing.pack import format_for_width, pack, unpack
from pard_onnx.quantize.packing.prepared import Spool

POWERS = np.linspace(0, 1, 11)
SAMPLED_ROWS = 256  # of a matrix, whose errors are computed
FLOOR = 1e-3  # least root mean square over the mean one, for columns that the text hardly uses


def sources(spec: ModelSpec) -> dict[Group, str]:
    """By group of matrices, the module whose output is their input."""
    return dict(zip(GROUPS, (spec.norms[0], "self_attn.v_proj", spec.mlp_norm, "mlp.up_proj"), strict=True))


def fold_scales(
    layer: nn.Module, prefix: str, spec: ModelSpec, fmt: Format, grams: dict[Group, Tensor], spool: Spool
) -> None:
    """Scale the columns of a layer's matrices, and divide their sources by the same scales.

    Changes the layer and its Gram matrices in place. Norms and biases that change are stored in the spool.
    """
    for group, source in sources(spec).items():
        readers = [layer.get_parameter(f"{name}.weight").data for name in group]
        shared = spec.heads // spec.kv_heads if source == "self_attn.v_proj" else 1
        scale = _best_scale(readers, grams[group], fmt, shared, spec.head_dim)
        for reader in readers:
            reader *= scale
        grams[group] /= torch.outer(scale, scale)
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


def _best_scale(readers: Sequence[Tensor], gram: Tensor, fmt: Format, shared: int, head_dim: int) -> Tensor:
    """The best scales of the input's columns, [in]; equal for the `shared` query heads of one value head."""
    squares = gram.diagonal()
    grouped = squares.reshape(-1, shared, head_dim if shared > 1 else 1)
    magnitude = grouped.mean(dim=1, keepdim=True).expand_as(grouped).reshape(-1).sqrt()
    magnitude = magnitude.clamp_min(FLOOR * float(magnitude.mean()) or 1.0)
    sampled = [reader[:: -(-len(reader) // SAMPLED_ROWS)].contiguous() for reader in readers]
    tried = []
    for power in POWERS:
        scale = magnitude**power
        scale /= (scale.max() * scale.min()).sqrt()
        tried.append((sum(_error(rows, scale, gram, fmt) for rows in sampled), scale))
    best: Tensor = min(tried, key=lambda pair: pair[0])[1]
    return best


def _source_scale(scale: Tensor, shared: int, head_dim: int) -> Tensor:
    """The scale of each output of the source: a value head has one output for all query heads that read it."""
    return scale.reshape(-1, shared, head_dim)[:, 0].reshape(-1) if shared > 1 else scale


def _error(rows: Tensor, scale: Tensor, gram: Tensor, fmt: Format) -> float:
    """Squared error of the outputs when rows are scaled, rounded to nearest and scaled back."""
    scaled = (rows * scale).numpy()
    fmt = format_for_width(fmt, scaled.shape[1], "")
    difference = torch.from_numpy(unpack(pack(scaled, fmt), fmt)) / scale - rows
    return float(((difference @ gram) * difference).sum())
