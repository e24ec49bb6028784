"""A checkpoint's model in transformers without its weights; they come in one module at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from optimum.exporters.tasks import TasksManager
from torch import Tensor, nn
from transformers import AutoConfig

from pard_onnx.models.checkpoint import EMBEDDING, Checkpoint
from pard_onnx.models.families import FAMILIES
from pard_onnx.models.layer_attention import KINDS
from pard_onnx.models.spec import ModelSpec, Rotary
from pard_onnx.models.tensors import read_tensor, row_blocks

from .imported import imported


def skeleton(checkpoint: Checkpoint, attention: str, dtype: torch.dtype) -> Any:
    """The family's own model on the meta device, what is computed and not stored aside.

    attention: a key of AttentionInterface.
    """
    config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    build = TasksManager.get_model_class_for_task("text-generation", framework="pt", model_type=checkpoint.spec.family)
    with torch.device("meta"):
        model = build.from_config(config, attn_implementation=attention, dtype=dtype).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not stored
    embedding = FAMILIES[checkpoint.spec.family].embedding
    if embedding is not None:
        setattr(model.model.embed_tokens, embedding.buffer, torch.tensor(checkpoint.spec.embedding_scale))
    return model


def rotary_tables(module: nn.Module, spec: ModelSpec, positions: Tensor) -> dict[Rotary, tuple[Tensor, Tensor]]:
    """cos and sin [batch, sequence, head_dim] in float32 of every rotary rule that layers have. module: the family's;
    positions: [batch, sequence]. Where window layers have a rule of their own it asks for the kind of layer."""
    x, kinds = torch.zeros(1), dict(zip(("rope", "window_rope"), KINDS, strict=True))
    named = spec.window_rope is not None
    return {rotary: module(x, positions, *([kinds[rotary]] if named else [])) for rotary in spec.rotaries}


@contextmanager
def weights(module: nn.Module, name: str, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[None]:
    """Of a module and all inside it; name: the module's in the model, as the checkpoint's tensors are named."""
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
    """A parameter, filled by blocks of rows: the float32 copy is never whole."""
    integers = imported(checkpoint)
    if integers and part == "weight" and name in checkpoint.packed:
        shape: tuple[int, ...] = checkpoint.packed[name].shape
        read = partial(integers.dequantized, name)
    else:
        entry = checkpoint.tensors.get(f"{name}.{part}") or checkpoint.tensors[EMBEDDING]  # a tied head
        shape, read = entry.shape, partial(read_tensor, entry)
    tensor = torch.empty(shape, dtype=dtype)
    for rows in row_blocks(shape):
        tensor[rows] = torch.from_numpy(read(rows))
    return tensor
