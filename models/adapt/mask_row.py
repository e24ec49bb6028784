"""An embedding that is not trained, but for the row of the mask token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

NAME = "mask_row"


@contextmanager
def frozen_embedding(model: PreTrainedModel, mask_id: int) -> Iterator[None]:
    """Inside, the embedding (and a head that is the same matrix) is frozen, and the mask's row a parameter of its own.

    Afterwards the row is in the embedding.
    """
    embedding: Any = model.get_input_embeddings()
    weight: nn.Parameter = embedding.weight
    weight.requires_grad_(False)
    embedding.register_parameter(NAME, nn.Parameter(weight[mask_id].detach().clone()))

    def with_mask_row(module: Any, arguments: tuple[Tensor, ...], found: Tensor) -> Tensor:
        row = module.mask_row * getattr(module, "embed_scale", 1.0)  # which Gemma's embedding multiplies with
        return torch.where((arguments[0] == mask_id)[..., None], row.to(found.dtype), found)

    hook = embedding.register_forward_hook(with_mask_row)
    try:
        yield
    finally:
        hook.remove()
        with torch.no_grad():
            weight[mask_id] = embedding.mask_row.to(weight.dtype)
        del embedding.mask_row
        weight.requires_grad_(True)
