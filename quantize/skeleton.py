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
from pard_onnx.models.tensors import read_tensor, row_blocks

from .imported import imported


def skeleton(checkpoint: Checkpoint, attention: str, dtype: torch.dtype) -> Any:
    """The family's own model on the meta device, rotary tables aside. attention: a key of AttentionInterface."""
    config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    build = TasksManager.get_model_class_for_task("text-generation", framework="pt", model_type=checkpoint.spec.family)
    with torch.device("meta"):
        model = build.from_config(config, attn_implementation=attention, dtype=dtype).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not stored
    return model


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
