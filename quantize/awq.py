"""AWQ (arXiv 2306.00978): input columns that carry large activations are scaled up before they are rounded.

The inverse scale goes into what makes the input: a norm, or the matrix before it. A column's scale is its root mean
square to the power a; a is tried out, and that with the least error of the outputs is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pard_onnx.models.precision import Format
from pard_onnx.models.spec import ModelSpec

from .layers import GROUPS, Group
from .pack import fit_block, pack, unpack
from .spool import Spool

POWERS = np.linspace(0, 1, 11)
SAMPLED = 256  # rows of a matrix whose errors are computed
FLOOR = 1e-3  # of the mean: columns that the text hardly uses


def sources(spec: ModelSpec) -> dict[Group, str]:
    """Who makes the input of each group."""
    return dict(zip(GROUPS, (spec.norms[0], "self_attn.v_proj", spec.mlp_norm, "mlp.up_proj"), strict=True))


def fold(layer: nn.Module, prefix: str, spec: ModelSpec, fmt: Format, grams: dict[Group, Tensor], spool: Spool) -> None:
    """Scale the layer's matrices, and their sources by the inverse. Changes the layer, its grams and, for the vectors
    that the checkpoint has otherwise, the spool."""
    for group, source in sources(spec).items():
        readers = [layer.get_parameter(f"{name}.weight").data for name in group]
        shared = spec.heads // spec.kv_heads if source == "self_attn.v_proj" else 1
        scale = _scale(readers, grams[group], fmt, shared, spec.head_dim)
        for reader in readers:
            reader *= scale
        grams[group] /= torch.outer(scale, scale)
        module = layer.get_submodule(source)
        offset = spec.norm_offset if source in spec.norms else 0.0
        _divide(module, _of_source(scale, shared, spec.head_dim), offset)
        for part, parameter in module.named_parameters():
            if parameter.ndim == 1:
                spool.replace(f"{prefix}.{source}.{part}", parameter.detach().numpy().copy())


def _divide(module: nn.Module, scale: Tensor, offset: float) -> None:
    """offset: what a norm adds to its weight, so that their sum is divided."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.data = (parameter.data + offset) / scale - offset
        else:
            parameter.data /= scale[:, None]


def _scale(readers: Sequence[Tensor], gram: Tensor, fmt: Format, shared: int, head_dim: int) -> Tensor:
    """The input's scales [in]; equal for the `shared` query heads of one value head."""
    squares = gram.diagonal()
    grouped = squares.reshape(-1, shared, head_dim if shared > 1 else 1)
    size = grouped.mean(dim=1, keepdim=True).expand_as(grouped).reshape(-1).sqrt()
    size = size.clamp_min(FLOOR * float(size.mean()) or 1.0)
    sampled = [reader[:: -(-len(reader) // SAMPLED)].contiguous() for reader in readers]
    tried = []
    for power in POWERS:
        scale = size**power
        scale /= (scale.max() * scale.min()).sqrt()
        tried.append((sum(_error(rows, scale, gram, fmt) for rows in sampled), scale))
    best: Tensor = min(tried, key=lambda pair: pair[0])[1]
    return best


def _of_source(scale: Tensor, shared: int, head_dim: int) -> Tensor:
    """By the source's own rows: a value head's stand once, however many query heads read it."""
    return scale.reshape(-1, shared, head_dim)[:, 0].reshape(-1) if shared > 1 else scale


def _error(rows: Tensor, scale: Tensor, gram: Tensor, fmt: Format) -> float:
    """Squared error of the outputs."""
    scaled = (rows * scale).numpy()
    fmt = fit_block(fmt, scaled.shape[1], "")
    off = torch.from_numpy(unpack(pack(scaled, fmt), fmt)) / scale - rows
    return float(((off @ gram) * off).sum())
