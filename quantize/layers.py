"""Calibration text on its way through a checkpoint's layers, one layer's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pard_onnx.models.checkpoint import EMBEDDING, Checkpoint
from pard_onnx.models.spec import ModelSpec, Rotary
from pard_onnx.models.tensors import read_tensor, require_finite, row_blocks

from .calibration import Row
from .skeleton import rotary_tables, skeleton, weights

# Matrices of a layer that read the same input, in the order in which they run.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
Group = tuple[str, ...]
SIDE = 1024  # of the blocks of a Gram matrix, of which those above the diagonal are computed


class _Known(Exception):
    """The input of a layer's last matrix: what the layer makes of it is not asked for."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What layers compute of one row besides its hidden states."""

    rotary: Mapping[Rotary, tuple[Tensor, Tensor]]  # cos, sin [1, S, head_dim]
    masks: Mapping[int | None, Tensor | None]  # by window; [1, 1, S, S], added to the scores; None: causal


class Layers:
    """The hidden states [1, S, hidden] of every row; `advance` takes them through a layer."""

    def __init__(self, checkpoint: Checkpoint, rows: Sequence[Row]) -> None:
        self.checkpoint = checkpoint
        self.model = skeleton(checkpoint, "sdpa", torch.float32)
        self.hidden = [states[None] for states in _embedded(checkpoint, rows)]
        rotary = self.model.model.rotary_emb
        self._inputs = [_inputs(rotary, checkpoint.spec, row) for row in rows]

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """A layer with its weights in float32, which may be changed while it is there."""
        layer: nn.Module = self.model.model.layers[index]
        prefix = f"model.layers.{index}"
        with weights(layer, prefix, self.checkpoint, torch.float32):
            for name, parameter in layer.named_parameters():
                require_finite(f"{prefix}.{name}", parameter.numpy())
            yield layer

    def run(self, layer: nn.Module) -> Iterator[Tensor]:
        """The layer's output for each row."""
        for states, inputs in zip(self.hidden, self._inputs, strict=True):
            yield self._output(layer, states, inputs)

    def _output(self, layer: nn.Module, states: Tensor, inputs: Inputs) -> Tensor:
        attention = self.checkpoint.spec.attention_of(layer.self_attn.layer_idx)  # type: ignore[union-attr,arg-type]
        # A layer that turns nothing looks at no tables
        tables = inputs.rotary.get(attention.rotary) if attention.rotary else None
        with self._products():
            found = layer(states, attention_mask=inputs.masks[attention.window], position_embeddings=tables)
        output: Tensor = found[0] if isinstance(found, tuple) else found
        return output

    def advance(self, layer: nn.Module) -> None:
        """Every row through the layer."""
        for index, states in enumerate(self.run(layer)):
            self.hidden[index] = states

    def grams(self, layer: nn.Module) -> dict[Group, Tensor]:
        """X X^T over all rows of each group's input, [in, in]."""
        modules: dict[Group, nn.Module] = {group: layer.get_submodule(group[0]) for group in GROUPS}
        found = {group: _zeros(module) for group, module in modules.items()}
        hooks = [module.register_forward_pre_hook(_adds_to(found[group])) for group, module in modules.items()]
        hooks.append(modules[GROUPS[-1]].register_forward_pre_hook(_stop))
        try:
            for states, inputs in zip(self.hidden, self._inputs, strict=True):
                with suppress(_Known):
                    self._output(layer, states, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        for gram in found.values():
            _mirror(gram)
        return found

    def normed(self, states: Tensor) -> Tensor:
        """What the LM head reads, of the last layer's output."""
        norm = self.model.model.norm
        with weights(norm, "model.norm", self.checkpoint, torch.float32):
            found: Tensor = norm(states)
        return found

    def head_gram(self) -> Tensor:
        """X X^T of what the LM head reads."""
        gram = torch.zeros(self.checkpoint.spec.hidden, self.checkpoint.spec.hidden)
        for states in self.hidden:
            _add(gram, self.normed(states))
        _mirror(gram)
        return gram

    @contextmanager
    def _products(self) -> Iterator[None]:
        """A checkpoint in bfloat16 is multiplied in bfloat16, as it was trained, where the processor has instructions
        for it: several times faster than float32. Sums are of float32 in any case."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium" if self.checkpoint.spec.dtype == "bfloat16" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def _zeros(module: nn.Module) -> Tensor:
    width = int(module.in_features)  # type: ignore[arg-type]
    return torch.zeros(width, width)


def _adds_to(gram: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:  # what a pre-hook returns becomes the input
        _add(gram, arguments[0])

    return hook


def _stop(*_: object) -> None:
    raise _Known


def _add(gram: Tensor, x: Tensor) -> None:
    """X X^T of these tokens, on and above the diagonal."""
    flat = x.flatten(0, -2)
    for start in range(0, len(gram), SIDE):
        gram[start : start + SIDE, start:].addmm_(flat[:, start : start + SIDE].T, flat[:, start:])


def _mirror(gram: Tensor) -> None:
    """What lies below the diagonal's blocks, from above."""
    for start in range(0, len(gram), SIDE):
        gram[start + SIDE :, start : start + SIDE] = gram[start : start + SIDE, start + SIDE :].T


def _embedded(checkpoint: Checkpoint, rows: Sequence[Row]) -> list[Tensor]:
    """The rows' embeddings; of the matrix only the rows that are used stay in memory."""
    entry = checkpoint.tensors[EMBEDDING]
    used = np.unique(np.concatenate([row.ids for row in rows]))
    table = np.empty((len(used), entry.shape[1]), np.float32)
    for block in row_blocks(entry.shape):
        inside = (used >= block.start) & (used < block.stop)
        if inside.any():
            table[inside] = read_tensor(entry, block)[used[inside] - block.start]
    require_finite(EMBEDDING, table)
    table *= np.float32(checkpoint.spec.embedding_scale or 1)
    return [torch.from_numpy(table[np.searchsorted(used, row.ids)]) for row in rows]


def _inputs(rotary: nn.Module, spec: ModelSpec, row: Row) -> Inputs:
    positions = torch.from_numpy(row.positions)
    seen = None if row.mask is None else torch.from_numpy(row.mask)
    masks = {window: _mask(positions, seen, window) for window in spec.windows}
    return Inputs(rotary_tables(rotary, spec, positions[None]), masks)


def _mask(positions: Tensor, seen: Tensor | None, window: int | None) -> Tensor | None:
    """seen: which token sees which, [S, S]; None: those before it."""
    if window is not None:
        far = positions[:, None] - positions[None] >= window
        seen = (torch.ones(far.shape, dtype=torch.bool).tril() if seen is None else seen) & ~far
    if seen is None:
        return None
    return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))[None, None]
