"""Attention variants: how a layer's attention enters the graph. A table; another variant is another entry.

A variant is an attention function for transformers' AttentionInterface, which emits the operator, and
what that operator needs besides queries, keys and values: the trunk's extra inputs and how the graph
computes them from `attention_mask`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

MICROSOFT = "com.microsoft"


@dataclass(slots=True)
class LayerCaches:
    """Travels through transformers' forward as a keyword argument; one entry a layer."""

    past: list[tuple[Tensor, Tensor]]  # key, value: [batch, kv_heads, rows, head_dim]
    extra: dict[str, Tensor]  # the variant's own inputs
    present: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


Attend = Callable[..., tuple[Tensor, None]]


@dataclass(frozen=True, slots=True)
class Variant:
    """attend: the AttentionInterface function. extra: dummy tensors for its inputs, given batch and
    rotary tables [rows, head_dim / 2]. lengths: graph nodes that compute the non-table inputs from
    attention_mask [batch, total] and the number of tokens that the graph appends (int64 [1] or None)."""

    name: str
    attend: Attend
    extra: Callable[[int, int, int], dict[str, Tensor]]
    lengths: Callable[[ir.tape.Tape, ir.Value, ir.Value | None], dict[str, ir.Value]]


def _flat(states: Tensor) -> Tensor:
    """[batch, heads, sequence, head_dim] to [batch, sequence, heads * head_dim]."""
    batch, _, sequence, _ = states.shape
    return states.transpose(1, 2).reshape(batch, sequence, -1)


def _group_query_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    caches: LayerCaches,
    **_: Any,
) -> tuple[Tensor, None]:
    """com.microsoft.GroupQueryAttention with rotary embedding inside; causal by definition."""
    batch, heads, sequence, head_dim = query.shape
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    past_key, past_value = caches.past[layer]
    extra = caches.extra
    out, new_key, new_value = torch.onnx.ops.symbolic_multi_out(
        f"{MICROSOFT}::GroupQueryAttention",
        [
            _flat(query),
            _flat(key),
            _flat(value),
            past_key,
            past_value,
            extra["seqlens_k"],
            extra["total_sequence_length"],
            extra["cos_cache"],
            extra["sin_cache"],
        ],
        {"num_heads": heads, "kv_num_heads": key.shape[1], "scale": scaling, "do_rotary": 1},
        dtypes=[query.dtype] * 3,
        shapes=[(batch, sequence, heads * head_dim), past_key.shape, past_value.shape],
        version=1,
    )
    caches.present[layer] = (new_key, new_value)
    return out.reshape(batch, sequence, heads, head_dim), None


def _gqa_extra(batch: int, rows: int, half_dim: int) -> dict[str, Tensor]:
    return {
        "seqlens_k": torch.zeros(batch, dtype=torch.int32),
        "total_sequence_length": torch.zeros((), dtype=torch.int32),
        "cos_cache": torch.zeros(rows, half_dim),
        "sin_cache": torch.zeros(rows, half_dim),
    }


def _gqa_lengths(tape: ir.tape.Tape, mask: ir.Value, appended: ir.Value | None) -> dict[str, ir.Value]:
    """seqlens_k is the index of the last valid key (total - 1), one a row of the batch."""
    one = tape.initializer(ir.tensor([1], name="lengths.one"))
    total = tape.op("Shape", [mask], {"start": 1, "end": 2})
    valid = tape.op("ReduceSum", [mask, one], {"keepdims": 0})
    if appended is not None:
        total, valid = tape.op("Add", [total, appended]), tape.op("Add", [valid, appended])
    last = tape.op("Sub", [valid, one])
    return {
        "seqlens_k": tape.op("Cast", [last], {"to": ir.DataType.INT32}),
        "total_sequence_length": tape.op("Squeeze", [tape.op("Cast", [total], {"to": ir.DataType.INT32})]),
    }


VARIANTS: dict[str, Variant] = {v.name: v for v in (Variant("gqa", _group_query_attention, _gqa_extra, _gqa_lengths),)}
