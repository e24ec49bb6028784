"""Attention of packed sequences: a function of transformers' attention interface, in three forms of the same mask.

- dense: one scaled dot product over all pairs of tokens, with the mask as a matrix. The reference.
- chunks: the tokens are cut into chunks; each attends to the part of the sequence that it can see, which is its
  sample's prefix and the chunk itself. Fast on a CPU.
- flex: torch's flex_attention, which skips blocks of the mask on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from .packing import IGNORE, PackedSequence
from .settings import Attention

NAME = "pard_packed"  # in transformers' attention interface
CHUNK = 256  # tokens of a chunk, about
BLOCK = 128  # tokens: flex_attention's blocks, of which a sequence on a GPU has a whole number


@dataclass(frozen=True, slots=True)
class Chunk:
    """Neighbouring tokens, and the spans of tokens that they see."""

    queries: slice
    keys: tuple[slice, ...]
    mask: Tensor  # [queries, keys of all spans]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What each token of a packed sequence attends to, in the form that the attention computes."""

    packed: PackedSequence
    form: Attention  # not auto
    device: torch.device
    made: dict[int | None, Any] = field(default_factory=dict)  # by window: layers with the same one share it

    def of_window(self, window: int | None) -> Any:
        """The list of chunks, or the mask of flex_attention. window: positions that a token sees; None: all."""
        if window not in self.made:
            make = self._flex_mask if self.form == "flex" else self._chunks
            self.made[window] = make(window)
        return self.made[window]

    def _chunks(self, window: int | None) -> list[Chunk]:
        whole = slice(0, len(self.packed.ids))
        spans = [(whole, (whole,))] if self.form == "dense" else chunk_spans(self.packed)
        out = []
        for queries, keys in spans:
            columns = np.concatenate([np.arange(span.start, span.stop) for span in keys])
            mask = self.packed.visible(queries, columns, window)
            out.append(Chunk(queries, keys, torch.from_numpy(mask).to(self.device)))
        return out

    def _flex_mask(self, window: int | None) -> BlockMask:
        arrays = (self.packed.segments, self.packed.positions, self.packed.bases, self.packed.samples)
        segments, positions, bases, samples = (torch.from_numpy(one).to(self.device) for one in arrays)

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            prefix = (segments[key] == 0) & (positions[key] <= bases[query])
            chain = (bases[key] == bases[query]) & (segments[key] <= segments[query])
            found = (prefix | chain) & (samples[key] == samples[query])
            return found if window is None else found & (positions[query] - positions[key] < window)

        length = len(self.packed.ids)
        return create_block_mask(visible, None, None, length, length, device=self.device, BLOCK_SIZE=BLOCK)


def chunk_spans(packed: PackedSequence, size: int = CHUNK) -> list[tuple[slice, tuple[slice, ...]]]:
    """Chunks of about `size` tokens, and for each the spans that hold all that its tokens see.

    Neighbouring samples that fit a chunk together are one. A longer sample is cut into chunks of real tokens, which
    see what is before them, and chunks of masks, which see the prefix of their last base and their own chains.
    """
    edges = [0, *(np.flatnonzero(np.diff(packed.samples)) + 1).tolist(), len(packed.ids)]
    out: list[tuple[slice, tuple[slice, ...]]] = []
    begin = 0  # of whole samples that are not in a chunk yet
    for start, stop in pairwise(edges):
        if begin < start and stop - begin > size:
            out.append((slice(begin, start), (slice(begin, start),)))
            begin = start
        if stop - start > size:
            out += _spans_of_sample(packed, start, stop, size)
            begin = stop
    if begin < edges[-1]:
        out.append((slice(begin, edges[-1]), (slice(begin, edges[-1]),)))
    return out


def _spans_of_sample(packed: PackedSequence, start: int, stop: int, size: int) -> list[tuple[slice, tuple[slice, ...]]]:
    real = start + int(np.count_nonzero(packed.segments[start:stop] == 0))
    out: list[tuple[slice, tuple[slice, ...]]] = []
    for begin in range(start, real, size):
        queries = slice(begin, min(begin + size, real))
        out.append((queries, (slice(start, queries.stop),)))
    heads = real + np.flatnonzero(packed.segments[real:stop] == 1)  # where the chains begin
    begin = real
    while begin < stop:
        later = heads[heads >= begin + size]
        end = int(later[0]) if len(later) else stop
        prefix = slice(start, start + int(packed.bases[begin:end].max()) + 1)
        out.append((slice(begin, end), (prefix, slice(begin, end))))
        begin = end
    return out


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    plan: Plan | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, heads, tokens, size]; the result is [1, tokens, heads, size]."""
    assert plan is not None, "a packed sequence comes with its plan"
    if plan.form == "flex":
        found = _flex(query.is_cuda)(
            query, key, value, block_mask=plan.of_window(sliding_window), scale=scaling, enable_gqa=True
        )
        return found.transpose(1, 2).contiguous(), None
    parts = []
    for chunk in plan.of_window(sliding_window):
        keys, values = (_spans(one, chunk.keys) for one in (key, value))
        rows = query[:, :, chunk.queries]
        parts.append(
            scaled_dot_product_attention(
                rows, keys, values, attn_mask=chunk.mask, dropout_p=dropout, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _spans(values: Tensor, spans: tuple[slice, ...]) -> Tensor:
    """The tokens of the spans, of values [1, heads, tokens, size]."""
    parts = [values[:, :, span] for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


@cache
def _flex(compiled: bool) -> Callable[..., Any]:
    """flex_attention; without compilation it computes the whole matrix, for tests on a CPU."""
    function: Any = flex_attention
    return torch.compile(function) if compiled else function


def chosen_form(form: Attention, device: torch.device) -> Attention:
    if form != "auto":
        return form
    return "flex" if device.type == "cuda" else "chunks"  # torch calls ROCm's devices cuda, too


@contextmanager
def with_packed_attention(*models: PreTrainedModel) -> Iterator[None]:
    """The models' layers use `packed_attention` inside, and what they used before afterwards."""
    AttentionInterface.register(NAME, packed_attention)
    before = [model.config._attn_implementation for model in models]
    try:
        for model in models:
            model.set_attn_implementation(NAME)
        yield
    finally:
        for model, name in zip(models, before, strict=True):
            model.set_attn_implementation(name)


def padded(packed: PackedSequence, multiple: int = BLOCK) -> PackedSequence:
    """The sequence with padding up to a multiple of some tokens. Padding has no labels, and nothing sees it."""
    more = -len(packed.ids) % multiple
    if not more:
        return packed
    places = np.arange(more)
    fill: dict[str, NDArray[np.int64]] = {"positions": places, "bases": places, "labels": np.full(more, IGNORE)}
    fill |= {"samples": np.full(more, -1), "ids": np.zeros_like(places), "segments": np.zeros_like(places)}
    return PackedSequence(**{name: np.concatenate([getattr(packed, name), fill[name]]) for name in fill})
