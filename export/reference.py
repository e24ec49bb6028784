"""torch's own logits of a checkpoint, in its own precision, with one module's weights in memory at a time."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from pard_onnx.models.checkpoint import Checkpoint
from pard_onnx.models.layer_attention import KINDS
from pard_onnx.models.spec import ModelSpec
from pard_onnx.quantize.skeleton import skeleton, weights


def reference_logits(checkpoint: Checkpoint, ids: Tensor, dtype: torch.dtype | None = None, **inputs: Tensor) -> Tensor:
    """Logits of ids [batch, sequence]: float32 [batch, sequence, vocabulary rows].

    dtype: to compute in, None for the checkpoint's own; integers stand for products that half precision would round,
    so of a quantized checkpoint it is float32. inputs: for sequences that are not plain text, the model's
    `position_ids` [batch, sequence] and `attention_mask` [batch, 1, sequence, sequence], added to the scores.
    """
    dtype = dtype or (torch.float32 if checkpoint.quantization else getattr(torch, checkpoint.spec.dtype))
    model = skeleton(checkpoint, "eager", dtype)
    for name, module in model.named_modules():
        if module._parameters:
            _lend_weights(module, name, checkpoint, dtype)
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, use_cache=False, **_by_kind(checkpoint.spec, inputs)).logits
    return logits.float()


def _by_kind(spec: ModelSpec, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """A mask of one's own reaches every layer as it is: window layers get one that leaves out what is far behind."""
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    window = next((window for window in spec.windows if window is not None), None)
    if mask is None or positions is None or window is None:
        return dict(inputs)
    far = (positions[:, :, None] - positions[:, None] >= window)[:, None]
    return {**inputs, "attention_mask": dict(zip(KINDS, (mask, mask.masked_fill(far, float("-inf"))), strict=True))}


def _lend_weights(module: nn.Module, name: str, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Weights come in before the module runs and go again after it."""
    lent: list[AbstractContextManager[None]] = []

    def load(*_: Any) -> None:
        lent.append(weights(module, name, checkpoint, dtype))
        lent[-1].__enter__()

    def drop(*_: Any) -> None:
        lent.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(load)
    module.register_forward_hook(drop)
