"""torch's own logits of a checkpoint, in its own precision, with one layer's weights in memory at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from optimum.exporters.tasks import TasksManager
from torch import Tensor, nn
from transformers import AutoConfig

from pard_onnx.models.checkpoint import Checkpoint
from pard_onnx.models.tensors import read_tensor, row_blocks
from pard_onnx.quantize.imported import imported


def reference_logits(checkpoint: Checkpoint, ids: Tensor, dtype: torch.dtype | None = None, **inputs: Tensor) -> Tensor:
    """Logits of ids [batch, sequence]: float32 [batch, sequence, vocabulary rows].

    dtype: to compute in, None for the checkpoint's own; integers stand for products that half precision would round,
    so of a quantized checkpoint it is float32. inputs: for sequences that are not plain text, the model's
    `position_ids` [batch, sequence] and `attention_mask` [batch, 1, sequence, sequence], added to the scores.
    """
    config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    dtype = dtype or (torch.float32 if checkpoint.quantization else getattr(torch, checkpoint.spec.dtype))
    build = TasksManager.get_model_class_for_task("text-generation", framework="pt", model_type=checkpoint.spec.family)
    with torch.device("meta"):
        model = build.from_config(config, attn_implementation="eager", dtype=dtype).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not stored
    for name, module in model.named_modules():
        if module._parameters:
            _lend_weights(module, name, checkpoint, dtype)
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, use_cache=False, **inputs).logits
    return logits.float()


def _lend_weights(module: nn.Module, name: str, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Weights come in before the module runs and go again after it."""
    empty = {part: p for part, p in module._parameters.items() if p is not None}

    def load(*_: Any) -> None:
        for part in empty:
            module._parameters[part] = nn.Parameter(_weight(checkpoint, name, part, dtype), requires_grad=False)

    def drop(*_: Any) -> None:
        module._parameters.update(empty)

    module.register_forward_pre_hook(load)
    module.register_forward_hook(drop)


def _weight(checkpoint: Checkpoint, name: str, part: str, dtype: torch.dtype) -> Tensor:
    """A parameter, filled by blocks of rows: the float32 copy is never whole."""
    integers = imported(checkpoint)
    if integers and part == "weight" and name in checkpoint.packed:
        shape: tuple[int, ...] = checkpoint.packed[name].shape
        read = partial(integers.dequantized, name)
    else:
        entry = checkpoint.tensors.get(f"{name}.{part}") or checkpoint.tensors["model.embed_tokens.weight"]
        shape, read = entry.shape, partial(read_tensor, entry)
    tensor = torch.empty(shape, dtype=dtype)
    for rows in row_blocks(shape):
        tensor[rows] = torch.from_numpy(read(rows))
    return tensor
