"""How much each matrix suffers from 4 bits.

The loss of a matrix is what 4 bits of it alone do to its layer's output: the mean over tokens of |change|^2 over
|output|^2, on calibration text; of the embedding, to what it gives; of the LM head, the divergence (KL, nats) of what
it predicts. The residual stream passes such shares on, and they come close to the divergence that the whole model has
in the end: on the shipped target 0.5 to 1.2 of it, with a correlation of 0.97 of the logarithms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from pard_onnx.models.checkpoints.checkpoint import EMBEDDING as EMBEDDING_TENSOR
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.tensors import read_tensor, row_blocks
from pard_onnx.models.precision import Format, Recipe
from pard_onnx.quantize.algorithms.grid import searched
from pard_onnx.quantize.algorithms.mixed import Unit, extra_bytes
from pard_onnx.quantize.packing.pack import fit_block, unpack
from pard_onnx.quantize.packing.prepared import EMBEDDING, HEAD

from .layers import Layers
from .text import Row

ROWS = 4  # of calibration text
UNITS = (
    ("self_attn.q_proj",),
    ("self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
TOKENS = 256  # whose predictions tell the LM head's loss


def units(checkpoint: Checkpoint, recipe: Recipe, rows: Sequence[Row], progress: Callable[[int], None]) -> list[Unit]:
    """Every unit's loss, from one float pass over a few rows and one trial a unit. progress: layers done."""
    found = []
    with torch.inference_mode():
        layers = Layers(checkpoint, rows[:ROWS])
        spec, embedded = checkpoint.spec, layers.hidden[:]
        for index in range(spec.layers):
            with layers.loaded(index) as layer:
                outputs = list(layers.run(layer))
                for group in UNITS:
                    names = tuple(f"model.layers.{index}.{name}" for name in group)
                    with _rounded([layer.get_parameter(f"{name}.weight") for name in group], recipe.matrices):
                        loss = _loss(layers.run(layer), outputs)
                    found.append(Unit(names, loss, extra_bytes(checkpoint, recipe, names)))
                layers.hidden = outputs
            progress(index + 1)
        found.append(Unit((HEAD,), _head_loss(layers, recipe.head), extra_bytes(checkpoint, recipe, (HEAD,))))
        if not spec.tied:
            loss = _loss((_round(states[0], recipe.embedding)[None] for states in embedded), embedded)
            found.append(Unit((EMBEDDING,), loss, extra_bytes(checkpoint, recipe, (EMBEDDING,))))
    return found


@contextmanager
def _rounded(parameters: Sequence[nn.Parameter], fmt: Format) -> Iterator[None]:
    kept = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = _round(parameter.data, fmt)
        yield
    finally:
        for parameter, weight in zip(parameters, kept, strict=True):
            parameter.data = weight


def _round(weight: Tensor, fmt: Format) -> Tensor:
    fmt = fit_block(fmt, weight.shape[1], "")
    return torch.from_numpy(unpack(searched(weight.numpy(), fmt), fmt))


def _loss(changed: Iterable[Tensor], outputs: Sequence[Tensor]) -> float:
    """Outputs [1, S, width] against the same changed."""
    shares = [((a - b).square().sum(-1) / b.square().sum(-1)).mean() for a, b in zip(changed, outputs, strict=True)]
    return float(torch.stack(shares).mean())


def _head_loss(layers: Layers, fmt: Format) -> float:
    tensors = layers.checkpoint.tensors
    entry = tensors.get(f"{HEAD}.weight") or tensors[EMBEDDING_TENSOR]
    every = torch.cat([layers.normed(states)[0] for states in layers.hidden])
    states = every[:: -(-len(every) // TOKENS)]
    exact, changed = (torch.empty(len(states), entry.shape[0]) for _ in range(2))
    for rows in row_blocks(entry.shape):
        weight = torch.from_numpy(read_tensor(entry, rows))
        exact[:, rows], changed[:, rows] = states @ weight.T, states @ _round(weight, fmt).T
    return float(kl_div(changed.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean"))
