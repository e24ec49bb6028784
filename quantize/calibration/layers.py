"""Run calibration text through a checkpoint's layers, with the weights of one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optimum.exporters.tasks import TasksManager
from torch import Tensor, nn
from transformers import AutoConfig

from pard_onnx.models.checkpoints.checkpoint import EMBEDDING, Checkpoint
from pard_onnx.models.checkpoints.config import read_config, transformers_refusals
from pard_onnx.models.checkpoints.eagle import eagle_config
from pard_onnx.models.checkpoints.layer_attention import KINDS
from pard_onnx.models.checkpoints.tensors import read_tensor, require_finite, row_blocks
from pard_onnx.models.errors import BadInput
from pard_onnx.models.families import FAMILIES
from pard_onnx.models.spec import ModelSpec, Rotary
from pard_onnx.quantize.packing.imported import imported_matrices

from .text import CalibrationRow

# Matrices of a layer with the same input, in the order in which they run.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
NOT_OF_LLAMA = ("dtype", "torch_dtype", "architectures", "auto_map")  # keys that are not passed on
Group = tuple[str, ...]
SIDE = 1024  # of the square blocks of a Gram matrix; blocks below the diagonal are copied, not computed


class _AllInputsSeen(Exception):
    """Ends a layer's run at its last matrix, when the inputs of all its matrices have been seen."""


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """The inputs of all layers for one row, apart from their hidden states."""

    rotary: Mapping[Rotary, tuple[Tensor, Tensor]]  # by rotary rule: cos, sin [1, S, head_dim]
    # By window: [1, 1, S, S], added to the scores; None for causal attention to all tokens before.
    masks: Mapping[int | None, Tensor | None]


class Layers:
    """The hidden states [1, S, hidden] of every row, before the layer that runs next."""

    def __init__(self, checkpoint: Checkpoint, rows: Sequence[CalibrationRow]) -> None:
        if joins_features(checkpoint.spec):
            raise BadInput(
                f"{checkpoint.path}: calibration text shows nothing of the hidden states that a P-EAGLE draft reads; "
                "take --quality fast, which reads no text"
            )
        self.checkpoint = checkpoint
        self.model = model_without_weights(checkpoint, "sdpa", torch.float32)
        self.hidden = [states[None] for states in _embedded(checkpoint, rows)]
        rotary = self.model.model.rotary_emb
        self._inputs = [_inputs(rotary, checkpoint.spec, row) for row in rows]

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """A layer with its weights in float32, which may be changed while the context is open."""
        layer: nn.Module = self.model.model.layers[index]
        prefix = f"model.layers.{index}"
        with loaded_weights(layer, prefix, self.checkpoint, torch.float32):
            for name, parameter in layer.named_parameters():
                require_finite(f"{prefix}.{name}", parameter.numpy())
            yield layer

    def run(self, layer: nn.Module) -> Iterator[Tensor]:
        """The layer's output for each row; the hidden states stay."""
        for states, inputs in zip(self.hidden, self._inputs, strict=True):
            yield self._output(layer, states, inputs)

    def _output(self, layer: nn.Module, states: Tensor, inputs: AttentionInputs) -> Tensor:
        attention = self.checkpoint.spec.attention_of(layer.self_attn.layer_idx)  # type: ignore[union-attr,arg-type]
        tables = inputs.rotary.get(attention.rotary) if attention.rotary else None  # None: a layer without rotary
        with self._matmul_precision():
            found = layer(states, attention_mask=inputs.masks[attention.window], position_embeddings=tables)
        output: Tensor = found[0] if isinstance(found, tuple) else found
        return output

    def advance(self, layer: nn.Module) -> None:
        """Replace the hidden states of every row by the layer's output."""
        for index, states in enumerate(self.run(layer)):
            self.hidden[index] = states

    def grams(self, layer: nn.Module) -> dict[Group, Tensor]:
        """X X^T of each group's input over all rows, [in, in]."""
        modules: dict[Group, nn.Module] = {group: layer.get_submodule(group[0]) for group in GROUPS}
        found = {group: _zeros(module) for group, module in modules.items()}
        hooks = [module.register_forward_pre_hook(_gram_hook(found[group])) for group, module in modules.items()]
        hooks.append(modules[GROUPS[-1]].register_forward_pre_hook(_stop_at_last_matrix))
        try:
            for states, inputs in zip(self.hidden, self._inputs, strict=True):
                with suppress(_AllInputsSeen):
                    self._output(layer, states, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        for gram in found.values():
            _fill_lower_half(gram)
        return found

    def advance_with_squares(self, layer: nn.Module) -> dict[Group, Tensor]:
        """`advance`, and the sums over all rows of the squares of each group's input, [in]."""
        modules: dict[Group, nn.Module] = {group: layer.get_submodule(group[0]) for group in GROUPS}
        found = {group: torch.zeros(int(module.in_features)) for group, module in modules.items()}  # type: ignore[arg-type]
        hooks = [module.register_forward_pre_hook(_squares_hook(found[group])) for group, module in modules.items()]
        try:
            self.advance(layer)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def head_squares(self) -> Tensor:
        """The sums over all rows of the squares of the LM head's input, [hidden]."""
        return torch.stack([self.head_inputs(states).square().sum(dim=(0, 1)) for states in self.hidden]).sum(dim=0)

    def head_inputs(self, states: Tensor) -> Tensor:
        """The input of the LM head: the last layer's output after the final norm."""
        norm = self.model.model.norm
        with loaded_weights(norm, "model.norm", self.checkpoint, torch.float32):
            found: Tensor = norm(states)
        return found

    def head_gram(self) -> Tensor:
        """X X^T of the LM head's input over all rows, [hidden, hidden]."""
        gram = torch.zeros(self.checkpoint.spec.hidden, self.checkpoint.spec.hidden)
        for states in self.hidden:
            _add(gram, self.head_inputs(states))
        _fill_lower_half(gram)
        return gram

    @contextmanager
    def _matmul_precision(self) -> Iterator[None]:
        """Multiply a checkpoint in bfloat16 in bfloat16, as it was trained, and add in float32.

        On processors with bfloat16 instructions this is several times faster than float32.
        """
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium" if self.checkpoint.spec.dtype == "bfloat16" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def _zeros(module: nn.Module) -> Tensor:
    width = int(module.in_features)  # type: ignore[arg-type]
    return torch.zeros(width, width)


def _gram_hook(gram: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:  # what a pre-hook returns becomes the input
        _add(gram, arguments[0])

    return hook


def _squares_hook(sums: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        sums.add_(arguments[0].square().sum(dim=(0, 1)))

    return hook


def _stop_at_last_matrix(*_: object) -> None:
    raise _AllInputsSeen


def _add(gram: Tensor, x: Tensor) -> None:
    """Add X X^T of these tokens, in the blocks on and above the diagonal."""
    flat = x.flatten(0, -2)
    for start in range(0, len(gram), SIDE):
        gram[start : start + SIDE, start:].addmm_(flat[:, start : start + SIDE].T, flat[:, start:])


def _fill_lower_half(gram: Tensor) -> None:
    """Copy the blocks above the diagonal to those below it."""
    for start in range(0, len(gram), SIDE):
        gram[start + SIDE :, start : start + SIDE] = gram[start : start + SIDE, start + SIDE :].T


def _embedded(checkpoint: Checkpoint, rows: Sequence[CalibrationRow]) -> list[Tensor]:
    """The embeddings of the rows' tokens; only the embedding's rows that are used stay in memory."""
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


def _inputs(rotary: nn.Module, spec: ModelSpec, row: CalibrationRow) -> AttentionInputs:
    positions = torch.from_numpy(row.positions)
    visible = None if row.mask is None else torch.from_numpy(row.mask)
    masks = {window: _mask(positions, visible, window) for window in spec.windows}
    return AttentionInputs(rotary_tables(rotary, spec, positions[None]), masks)


def _mask(positions: Tensor, visible: Tensor | None, window: int | None) -> Tensor | None:
    """The mask of layers with this window. visible: which token attends to which, [S, S]; None: causal attention."""
    if window is not None:
        before_window = positions[:, None] - positions[None] >= window
        if visible is None:
            visible = torch.ones(before_window.shape, dtype=torch.bool).tril()
        visible = visible & ~before_window
    if visible is None:
        return None
    return torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))[None, None]


def model_without_weights(checkpoint: Checkpoint, attention: str, dtype: torch.dtype) -> Any:
    """The family's transformers model on the meta device, apart from buffers that are computed and not stored.

    attention: a key of transformers' AttentionInterface.
    """
    with transformers_refusals(checkpoint.folder):
        # The dtype that was understood: transformers refuses some names that tools write
        config = transformers_config(checkpoint.folder, checkpoint.spec)
        config.vocab_size = checkpoint.spec.vocabulary.rows  # an adapter may have resized the embedding
        build = TasksManager.get_model_class_for_task(
            "text-generation", framework="pt", model_type=checkpoint.spec.family
        )
        with torch.device("meta"):
            model = build.from_config(config, attn_implementation=attention, dtype=dtype).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    if joins_features(checkpoint.spec):
        _join_features(model.model.layers[0], checkpoint.spec)
    embedding = FAMILIES[checkpoint.spec.family].embedding
    if embedding is not None:
        setattr(model.model.embed_tokens, embedding.buffer, torch.tensor(checkpoint.spec.embedding_scale))
    return model


def _join_features(layer: Any, spec: ModelSpec) -> None:
    """Let a Llama's first layer read [embedding, projected features], as EAGLE-3's does in vLLM."""
    assert spec.pard is not None and spec.pard.features is not None
    normed_residual = spec.pard.features.norm_before_residual
    for name in ("q_proj", "k_proj", "v_proj"):
        before = getattr(layer.self_attn, name)
        wider = nn.Linear(2 * spec.hidden, before.out_features, bias=False, device="meta", dtype=before.weight.dtype)
        setattr(layer.self_attn, name, wider)
    layer.hidden_norm = deepcopy(layer.input_layernorm)

    def forward(states: Tensor, **inputs: Any) -> Tensor:
        embedded, features = states.chunk(2, dim=-1)
        normed = layer.hidden_norm(features)
        joined = torch.cat([layer.input_layernorm(embedded), normed], dim=-1)
        inner: Tensor = (normed if normed_residual else features) + layer.self_attn(hidden_states=joined, **inputs)[0]
        output: Tensor = inner + layer.mlp(layer.post_attention_layernorm(inner))
        return output

    layer.forward = forward


def transformers_config(folder: Path, spec: ModelSpec) -> Any:
    """transformers' config of a checkpoint; of a P-EAGLE draft, that of the Llama whose layers it has."""
    if joins_features(spec):
        values = {k: v for k, v in eagle_config(read_config(folder))[0].values.items() if k not in NOT_OF_LLAMA}
        return AutoConfig.for_model(**values, dtype=spec.dtype)
    return AutoConfig.from_pretrained(folder, local_files_only=True, dtype=spec.dtype)


def joins_features(spec: ModelSpec) -> bool:
    """Whether the first layer reads features beside embeddings."""
    return spec.pard is not None and spec.pard.features is not None and spec.pard.features.join == "concat"


def rotary_tables(module: nn.Module, spec: ModelSpec, positions: Tensor) -> dict[Rotary, tuple[Tensor, Tensor]]:
    """cos and sin, [batch, sequence, head_dim] in float32, of every rotary rule that the layers have.

    module: the family's rotary embedding; where window layers have a rule of their own, it takes the kind of layer.
    positions: [batch, sequence].
    """
    x, kinds = torch.zeros(1), dict(zip(("rope", "window_rope"), KINDS, strict=True))
    by_kind = spec.window_rope is not None
    return {rotary: module(x, positions, *([kinds[rotary]] if by_kind else [])) for rotary in spec.rotaries}


@contextmanager
def loaded_weights(module: nn.Module, name: str, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[None]:
    """Load the parameters of a module and its children; they are dropped when the context ends.

    name: the module's name in the model, which the names of the checkpoint's tensors begin with.
    """
    empty = [(child, part, p) for child in module.modules() for part, p in child._parameters.items() if p is not None]
    prefixes = {child: f"{name}.{inner}" if inner else name for inner, child in module.named_modules()}
    try:
        for child, part, _ in empty:
            weight = _weight(checkpoint, prefixes[child], part, dtype)
            child._parameters[part] = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for child, part, parameter in empty:
            child._parameters[part] = parameter


def _weight(checkpoint: Checkpoint, name: str, part: str, dtype: torch.dtype) -> Tensor:
    """A parameter in `dtype`, filled by blocks of rows, so that there is never a whole copy in float32."""
    matrices = imported_matrices(checkpoint)
    if matrices and part == "weight" and name in checkpoint.packed:
        shape: tuple[int, ...] = checkpoint.packed[name].shape
        read = partial(matrices.dequantized, name)
    else:
        entry = checkpoint.tensors.get(f"{name}.{part}") or checkpoint.tensors[EMBEDDING]  # a tied head
        shape, read = entry.shape, partial(read_tensor, entry)
    tensor = torch.empty(shape, dtype=dtype)
    for rows in row_blocks(shape):
        tensor[rows] = torch.from_numpy(read(rows))
    return tensor
