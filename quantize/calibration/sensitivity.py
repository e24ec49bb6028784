"""The loss of each matrix by 4 bits, measured on calibration text.

A matrix is rounded to 4 bits while all others stay in floats. Its loss is the mean over tokens of |change|^2 /
|output|^2 of its layer's output; of the embedding, of the embeddings themselves; of the LM head, the KL divergence of
its predictions in nats. The residual stream passes relative changes on, so the loss comes close to the divergence of
the whole model's predictions: on the shipped target it is 0.5 to 1.2 times that, and the logarithms of the two have a
correlation of 0.97.
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
from pard_onnx.quantize.algorithms.grid import round_by_search
from pard_onnx.quantize.algorithms.mixed import Unit, extra_bytes
from pard_onnx.quantize.packing.pack import format_for_width, unpack
from pard_onnx.quantize.packing.prepared import EMBEDDING, HEAD

from .layers import Layers
from .text import CalibrationRow

ROWS = 4  # of calibration text that are used
UNIT_MATRICES = (
    ("self_attn.q_proj",),
    ("self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
TOKENS = 256  # whose predictions the LM head's loss is computed from


def measure_losses(
    checkpoint: Checkpoint, recipe: Recipe, rows: Sequence[CalibrationRow], progress: Callable[[int], None]
) -> list[Unit]:
    """The loss of every unit: each layer runs once in floats and once for each unit. progress: layers done."""
    losses = []
    with torch.inference_mode():
        layers = Layers(checkpoint, rows[:ROWS])
        spec, embedded = checkpoint.spec, layers.hidden[:]
        for index in range(spec.layers):
            with layers.loaded(index) as layer:
                outputs = list(layers.run(layer))
                for group in UNIT_MATRICES:
                    names = tuple(f"model.layers.{index}.{name}" for name in group)
                    parameters = [layer.get_parameter(f"{name}.weight") for name in group]
                    with _rounded_parameters(parameters, recipe.matrices):
                        loss = _loss(layers.run(layer), outputs)
                    losses.append(Unit(names, loss, extra_bytes(checkpoint, recipe, names)))
                layers.hidden = outputs
            progress(index + 1)
        losses.append(Unit((HEAD,), _head_loss(layers, recipe.head), extra_bytes(checkpoint, recipe, (HEAD,))))
        if not spec.tied:
            loss = _loss((_round(states[0], recipe.embedding)[None] for states in embedded), embedded)
            losses.append(Unit((EMBEDDING,), loss, extra_bytes(checkpoint, recipe, (EMBEDDING,))))
    return losses


@contextmanager
def _rounded_parameters(parameters: Sequence[nn.Parameter], fmt: Format) -> Iterator[None]:
    """Round matrices while the context is open."""
    kept = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = _round(parameter.data, fmt)
        yield
    finally:
        for parameter, weight in zip(parameters, kept, strict=True):
            parameter.data = weight


def _round(weight: Tensor, fmt: Format) -> Tensor:
    fmt = format_for_width(fmt, weight.shape[1], "")
    return torch.from_numpy(unpack(round_by_search(weight.numpy(), fmt), fmt))


def _loss(changed: Iterable[Tensor], outputs: Sequence[Tensor]) -> float:
    """The mean of |change|^2 / |output|^2 over the tokens of outputs [1, S, width]."""
    shares = [((a - b).square().sum(-1) / b.square().sum(-1)).mean() for a, b in zip(changed, outputs, strict=True)]
    return float(torch.stack(shares).mean())


def _head_loss(layers: Layers, fmt: Format) -> float:
    """KL divergence, in nats, of the LM head's predictions when its matrix is rounded."""
    tensors = layers.checkpoint.tensors
    entry = tensors.get(f"{HEAD}.weight") or tensors[EMBEDDING_TENSOR]
    every = torch.cat([layers.head_inputs(states)[0] for states in layers.hidden])
    states = every[:: -(-len(every) // TOKENS)]
    exact, changed = (torch.empty(len(states), entry.shape[0]) for _ in range(2))
    for rows in row_blocks(entry.shape):
        weight = torch.from_numpy(read_tensor(entry, rows))
        exact[:, rows], changed[:, rows] = states @ weight.T, states @ _round(weight, fmt).T
    return float(kl_div(changed.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean"))
