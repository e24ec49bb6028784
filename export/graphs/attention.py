"""Attention variants: how a layer's attention enters the graph. A table; another variant is another entry.

A variant is an attention function for transformers' AttentionInterface, which emits the operator, and
what that operator needs besides queries, keys and values: the trunk's extra inputs and, where they are
not the graph's own, how it computes them from `attention_mask`. The portable variant's operator is an
abstract one, `pard.Attention`, which plain_attention.py writes out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from pard_onnx.models.spec import LayerAttention, ModelSpec, Rotary

from .tape import DOMAIN, MICROSOFT

TABLES = ("cos_cache", "sin_cache")


@dataclass(slots=True)
class LayerCaches:
    """Travels through transformers' forward as a keyword argument; one entry a layer."""

    spec: ModelSpec
    past: list[tuple[Tensor, Tensor]]  # key, value: [batch, kv_heads, rows, head_dim]
    extra: dict[str, Tensor]  # the variant's own inputs
    present: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


Attend = Callable[..., tuple[Tensor, None]]


@dataclass(frozen=True, slots=True)
class Variant:
    """attend: the AttentionInterface function. extra: dummy tensors for its inputs, given batch, sequence and rows;
    dims: names of their dynamic dimensions. tables: the rotary tables in the operator's layout, from cos and sin [rows,
    head_dim / 2]; they are inputs too, under `table_name`. lengths: graph nodes that compute the inputs that are no
    tables from attention_mask [batch, total] and the number of tokens that the graph appends (int64 [1] or None); None:
    they are the graph's own inputs."""

    name: str
    attend: Attend
    extra: Callable[[int, int, int], dict[str, Tensor]]
    dims: dict[str, tuple[str, ...]]
    tables: Callable[[Tensor, Tensor], dict[str, Tensor]]
    lengths: Callable[[ir.tape.Tape, ir.Value, ir.Value | None], dict[str, ir.Value]] | None


def table_name(name: str, rotary: Rotary) -> str:
    """The input that has a rotary rule's table."""
    return name if rotary == "rope" else f"{rotary}.{name}"


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
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """com.microsoft.GroupQueryAttention with rotary embedding inside; causal by definition. Its window counts as
    transformers' does: the token itself and those before it."""
    batch, heads, sequence, head_dim = query.shape
    extra = ("seqlens_k", "total_sequence_length")
    rotary, window = _layer(module, caches).rotary, _window(module, caches, sliding_window)
    attributes = {
        "num_heads": heads,
        "kv_num_heads": key.shape[1],
        "scale": scaling,
        "do_rotary": int(rotary is not None),
    }
    if window is not None:
        attributes["local_window_size"] = window
    new = [_flat(states) for states in (query, key, value)]
    shape = (batch, sequence, heads * head_dim)
    out = _emit(f"{MICROSOFT}::GroupQueryAttention", new, extra, attributes, shape, module, caches)
    return out.reshape(batch, sequence, heads, head_dim), None


def _layer(module: nn.Module, caches: LayerCaches) -> LayerAttention:
    return caches.spec.attention_of(int(module.layer_idx))  # type: ignore[arg-type]


def _window(module: nn.Module, caches: LayerCaches, modelled: int | None) -> int | None:
    """The layer's window; modelled: transformers' own. Past the check that ends an export, nothing else would tell that
    the two differ."""
    window, most = _layer(module, caches).window, caches.spec.max_positions
    if min(window or most, most) != min(modelled or most, most):
        raise ValueError(f"layer {module.layer_idx} has a window of {modelled} tokens in transformers, {window} here")
    return window


def _emit(
    operator: str,
    new: list[Tensor],
    extra: Sequence[str],
    attributes: dict[str, Any],
    shape: tuple[int, ...],
    module: nn.Module,
    caches: LayerCaches,
) -> Tensor:
    """The operator on new queries, keys and values, the layer's past, and extra inputs; its output, of this shape. The
    present goes into the caches. The layer's rotary tables, if it has any, come last."""
    layer, rotary = int(module.layer_idx), _layer(module, caches).rotary  # type: ignore[arg-type]
    past = caches.past[layer]
    if rotary is not None:
        extra = [*extra, *(table_name(name, rotary) for name in TABLES)]
    out, key, value = torch.onnx.ops.symbolic_multi_out(
        operator,
        [*new, *past, *(caches.extra[name] for name in extra)],
        attributes,
        dtypes=[new[0].dtype] * 3,
        shapes=[shape, *(part.shape for part in past)],
        version=1,
    )
    caches.present[layer] = (key, value)
    return out


def _gqa_extra(batch: int, sequence: int, rows: int) -> dict[str, Tensor]:
    return {
        "seqlens_k": torch.zeros(batch, dtype=torch.int32),
        "total_sequence_length": torch.zeros((), dtype=torch.int32),
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


def _portable_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    caches: LayerCaches,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """pard.Attention(query, key, value, past_key, past_value, position_ids, attention_mask, cos?, sin?)
    {scale, window}; window 0: none."""
    batch, heads, sequence, head_dim = query.shape
    extra = ("position_ids", "attention_mask")
    new, shape = [query, key, value], (batch, sequence, heads, head_dim)
    attributes = {"scale": scaling, "window": _window(module, caches, sliding_window) or 0}
    return _emit(f"{DOMAIN}::Attention", new, extra, attributes, shape, module, caches), None


def _portable_extra(batch: int, sequence: int, rows: int) -> dict[str, Tensor]:
    return {
        "position_ids": torch.zeros(batch, sequence, dtype=torch.int64),
        "attention_mask": torch.zeros(batch, rows - 2, dtype=torch.int64),
    }


def _portable_tables(cos: Tensor, sin: Tensor) -> dict[str, Tensor]:
    """Whole heads wide: x turns by x * cos + (x with its halves swapped) * sin."""
    return {"cos_cache": torch.cat([cos, cos], -1), "sin_cache": torch.cat([-sin, sin], -1)}


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(
            "gqa",
            _group_query_attention,
            _gqa_extra,
            {"seqlens_k": ("batch",)},
            lambda cos, sin: {"cos_cache": cos, "sin_cache": sin},
            _gqa_lengths,
        ),
        Variant(
            "portable",
            _portable_attention,
            _portable_extra,
            {"position_ids": ("batch", "sequence"), "attention_mask": ("batch", "keys")},
            _portable_tables,
            None,
        ),
    )
}
