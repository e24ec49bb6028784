"""A model's tensors widened to a larger geometry in which they compute the same.

Every axis of every tensor is a list of the small model's channels, repeated, each with a factor:

hidden    The residual stream is `copies` times the small one, copy after copy, so a quantization block of 128 lies
          within one copy and quantizes as it did. RMSNorm over equal copies is RMSNorm over one. What writes the
          stream (embedding, o_proj, down_proj) repeats its rows; what reads it takes a share of each copy, the
          shares being powers of two that sum to one: exact in bfloat16. The LM head's shares are in the last norm,
          because a tied head has the embedding's matrix.
heads     The small model's heads come first in their group, and its groups first. All others are dead: they repeat
          live ones and their columns of o_proj are zero.
inner     Dead neurons repeat live ones, too; their columns of down_proj are zero.
layers    Dead layers repeat the live one before them, rows in an order of their own; o_proj and down_proj are so faint
          (2^-100) that no sum changes by them. No two matrices are equal, zero ones included: ONNX Runtime would keep
          one packed copy of them, which fits the processor's cache. Dead layers are spread, so that the hidden states
          change along the whole depth as they do in any model.
ids       Padding rows are the small model's own, which training has made unlikely, times 3 to 4: there are a
          thousand times as many of them, and none may be sampled by a program that does not mask them.

Dead parts repeat live ones rather than hold noise, since then their activations have the live ones' range: where
activations are quantized with one scale a tensor, that scale stays what it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.checkpoints.checkpoint import EMBEDDING, Checkpoint
from pard_onnx.models.checkpoints.tensors import BLOCK_VALUES, read_tensor
from pard_onnx.models.spec import ModelSpec

Ids = NDArray[np.intp]
Floats = NDArray[np.float32]
LAYERS = "model.layers."
CLOSING = ("o_proj", "down_proj")
MATRICES = (*CLOSING, "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
FAINT = np.float32(2.0**-100)
PADDING = (3.0, 4.0)
SEED = 0


@dataclass(frozen=True, slots=True)
class Axis:
    """For every channel of the wide model: the small model's channel that it repeats, and its factor."""

    source: Ids
    factor: Floats

    @classmethod
    def of(cls, source: Ids, live: NDArray[np.bool_] | None = None) -> Axis:
        """Channels that are closed (factor 0) unless they are live."""
        return cls(source, np.ones(len(source), np.float32) if live is None else live.astype(np.float32))


def shares(copies: int) -> Floats:
    """As many powers of two, as equal as can be, that sum to one."""
    whole = 1 << (copies - 1).bit_length()
    single = 2 * copies - whole
    return np.repeat(np.array([1 / whole, 2 / whole], np.float32), [single, copies - single])


@dataclass(frozen=True, slots=True)
class Widening:
    """small: the model that is computed. axes: of the wide model's tensors, by the last but one part of their names:
    [out, in] of a matrix, whose bias has the first of them."""

    small: Checkpoint
    wide: ModelSpec
    axes: Mapping[str, tuple[Axis, ...]]

    @classmethod
    def of(cls, small: Checkpoint, wide: ModelSpec) -> Widening:
        """wide: what `misfits` finds nothing wrong with."""
        return cls(small, wide, axes(small.spec, wide))

    def tensor(self, name: str) -> Iterator[NDArray[np.uint16]]:
        """The wide model's tensor as blocks of rows, in the bits of bfloat16."""
        *path, part, kind = name.split(".")
        rows, *columns = self.axes[part][: 1 if kind == "bias" else None]
        if part in MATRICES and not self._is_live(int(path[2])):
            rows = dead(rows, part, int(path[2]))
        weight = read_tensor(self.small.tensors[self._source(name)])
        for axis in columns:
            weight = weight[:, axis.source] * axis.factor
        factor = rows.factor.reshape(-1, *[1] * len(columns))
        step = max(1, BLOCK_VALUES // (len(columns[0].source) if columns else 1))
        for start in range(0, len(rows.source), step):
            block = slice(start, start + step)
            yield bfloat16(weight[rows.source[block]] * factor[block])

    def _source(self, name: str) -> str:
        """The small model's tensor that `name` is made of."""
        if name == "lm_head.weight" and self.small.spec.tied:
            return EMBEDDING
        if not name.startswith(LAYERS):
            return name
        index, _, rest = name.removeprefix(LAYERS).partition(".")
        return f"{LAYERS}{self._layer(int(index))}.{rest}"

    def _layer(self, index: int) -> int:
        return index * self.small.spec.layers // self.wide.layers

    def _is_live(self, index: int) -> bool:
        return index == 0 or self._layer(index) != self._layer(index - 1)


def dead(rows: Axis, part: str, layer: int) -> Axis:
    """The rows of a dead layer's matrix, or of its bias: the live ones', but not equal to any other's."""
    random = np.random.default_rng((SEED, layer, MATRICES.index(part)))
    if part in CLOSING:
        return Axis(rows.source, FAINT * random.choice(np.array([-1, 1], np.float32), len(rows.source)))
    return Axis(random.permutation(rows.source), rows.factor)


def axes(small: ModelSpec, wide: ModelSpec) -> dict[str, tuple[Axis, ...]]:
    stream, reader = hidden_axes(small, wide)
    queries, keys, heads = head_axes(small, wide)
    inner, neurons = inner_axes(small, wide)
    ids = id_axis(small, wide)
    return {
        "embed_tokens": (ids, stream),
        "lm_head": (ids, stream),
        "norm": (reader,),
        "input_layernorm": (stream,),
        "post_attention_layernorm": (stream,),
        "q_proj": (queries, reader),
        "k_proj": (keys, reader),
        "v_proj": (keys, reader),
        "o_proj": (stream, heads),
        "gate_proj": (inner, reader),
        "up_proj": (inner, reader),
        "down_proj": (stream, neurons),
    }


def hidden_axes(small: ModelSpec, wide: ModelSpec) -> tuple[Axis, Axis]:
    """The residual stream as it is written, and as it is read."""
    source = np.arange(wide.hidden) % small.hidden
    return Axis.of(source), Axis(source, np.repeat(shares(wide.hidden // small.hidden), small.hidden))


def head_axes(small: ModelSpec, wide: ModelSpec) -> tuple[Axis, Axis, Axis]:
    """Channels of the query heads, of the key and value heads, and of the heads as o_proj reads them."""
    size, own = wide.heads // wide.kv_heads, small.heads // small.kv_heads
    group, place = np.divmod(np.arange(wide.heads), size)
    keys = np.arange(wide.kv_heads) % small.kv_heads
    queries = _channels(keys[group] * own + place % own, wide.head_dim)
    live = np.repeat((group < small.kv_heads) & (place < own), wide.head_dim)
    return Axis.of(queries), Axis.of(_channels(keys, wide.head_dim)), Axis.of(queries, live)


def _channels(heads: Ids, size: int) -> Ids:
    return (heads[:, None] * size + np.arange(size)).ravel()


def inner_axes(small: ModelSpec, wide: ModelSpec) -> tuple[Axis, Axis]:
    """The MLP's neurons as they are written, and as down_proj reads them."""
    every = np.arange(wide.intermediate)
    source = every % small.intermediate
    return Axis.of(source), Axis.of(source, every < small.intermediate)


def id_axis(small: ModelSpec, wide: ModelSpec) -> Axis:
    kept, rows = used_rows(small), wide.vocabulary.rows
    padding = kept + np.arange(rows - kept) % (small.vocabulary.rows - kept)
    factor = np.random.default_rng(SEED).uniform(*PADDING, rows - kept)
    return Axis(np.concatenate([np.arange(kept), padding]), np.concatenate([np.ones(kept), factor]).astype(np.float32))


def used_rows(small: ModelSpec) -> int:
    """Embedding rows that are read: the tokenizer's, and a draft's mask behind them."""
    return max(small.vocabulary.size, small.pard.mask_id + 1 if small.pard else 0)


def bfloat16(values: Floats) -> NDArray[np.uint16]:
    """The upper halves: exact for all but padding rows, which are cut off."""
    return (values.view(np.uint32) >> 16).astype("<u2")


def misfits(small: ModelSpec, wide: ModelSpec) -> Iterator[str]:
    """Why `small` cannot be widened to `wide`."""
    same = {"family": (small.family, wide.family), "head_dim": (small.head_dim, wide.head_dim)}
    same |= {"rope_theta": (small.rope.theta, wide.rope.theta), "rms_norm_eps": (small.norm_eps, wide.norm_eps)}
    for name, (own, other) in same.items():
        if own != other:
            yield f"{name} {other} is not {own}"
    if wide.hidden % small.hidden:
        yield f"hidden size {wide.hidden} is no multiple of {small.hidden}"
    least = {name: (getattr(small, name), getattr(wide, name)) for name in ("layers", "kv_heads", "intermediate")}
    least["heads a group"] = (small.heads // small.kv_heads, wide.heads // wide.kv_heads)
    least["vocabulary rows"] = (small.vocabulary.rows, wide.vocabulary.rows)
    for name, (own, other) in least.items():
        if other < own:
            yield f"{name} {other} is less than {own}"
