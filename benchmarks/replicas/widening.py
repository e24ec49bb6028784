"""Widen a model's tensors to a larger shape, in which they compute the same function.

Every axis of every tensor is a list of the small model's channels, repeated, each with a factor:

hidden    The residual stream consists of `copies` copies of the small model's, one after the other. So a quantization
          block of 128 lies within one copy and is quantized as in the small model. RMSNorm of equal copies is that of
          one copy. Matrices that write the stream (embedding, o_proj, down_proj) repeat their rows. Matrices that read
          it take a share of each copy; the shares are powers of two with the sum one, and exact in bfloat16. The shares
          of the LM head are in the last norm, because a tied head uses the embedding's matrix.
heads     The small model's heads are the first in their group, and its groups are the first. All other heads are dead:
          they repeat live ones, and their columns of o_proj are zero.
inner     Dead neurons repeat live ones too; their columns of down_proj are zero.
layers    Dead layers repeat the live layer before them with permuted rows. Their o_proj and down_proj are so small
          (2^-100) that they change no sum. No two matrices are equal, not even those of zeros, since ONNX Runtime would
          keep one packed copy of equal ones, which would fit into the processor's cache. Dead layers are spread over
          the depth, so that hidden states change from layer to layer as in any model.
ids       Padding rows repeat the small model's own, which training made unlikely, times 3 to 4. There are a thousand
          times as many of them, and a program that does not mask them must never sample one.

Dead parts repeat live ones instead of noise, so that their activations have the range of live ones: a scale that
quantizes the activations of a whole tensor stays the same.
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
OUTPUTS = ("o_proj", "down_proj")
MATRICES = (*OUTPUTS, "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
NEGLIGIBLE = np.float32(2.0**-100)
PADDING = (3.0, 4.0)
SEED = 0


@dataclass(frozen=True, slots=True)
class Axis:
    """The channels of the wide model along an axis."""

    source: Ids  # the small model's channel that each repeats
    factor: Floats

    @classmethod
    def of(cls, source: Ids, live: NDArray[np.bool_] | None = None) -> Axis:
        """Channels with the factor 1, or 0 if they are not live; None: all are live."""
        return cls(source, np.ones(len(source), np.float32) if live is None else live.astype(np.float32))


def powers_of_two_shares(copies: int) -> Floats:
    """`copies` powers of two, as equal as possible, with the sum one."""
    whole = 1 << (copies - 1).bit_length()
    single = 2 * copies - whole
    return np.repeat(np.array([1 / whole, 2 / whole], np.float32), [single, copies - single])


@dataclass(frozen=True, slots=True)
class Widening:
    """A model in a larger shape."""

    small: Checkpoint
    wide: ModelSpec
    # Of the wide model's tensors, by the last but one part of their names: (out, in) of a matrix, (out,) of its bias
    axes: Mapping[str, tuple[Axis, ...]]

    @classmethod
    def of(cls, small: Checkpoint, wide: ModelSpec) -> Widening:
        """wide: a shape without `obstacles`."""
        return cls(small, wide, tensor_axes(small.spec, wide))

    def tensor(self, name: str) -> Iterator[NDArray[np.uint16]]:
        """Yield the wide model's tensor in blocks of rows, as the bits of bfloat16."""
        *path, part, kind = name.split(".")
        rows, *columns = self.axes[part][: 1 if kind == "bias" else None]
        if part in MATRICES and not self._is_live(int(path[2])):
            rows = dead_rows(rows, part, int(path[2]))
        weight = read_tensor(self.small.tensors[self._source(name)])
        for axis in columns:
            weight = weight[:, axis.source] * axis.factor
        factor = rows.factor.reshape(-1, *[1] * len(columns))
        step = max(1, BLOCK_VALUES // (len(columns[0].source) if columns else 1))
        for start in range(0, len(rows.source), step):
            block = slice(start, start + step)
            yield bfloat16(weight[rows.source[block]] * factor[block])

    def _source(self, name: str) -> str:
        """The name of the small model's tensor that the tensor `name` is made of."""
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


def dead_rows(rows: Axis, part: str, layer: int) -> Axis:
    """The rows of a dead layer's matrix or bias: the live layer's, changed so that no two matrices are equal."""
    random = np.random.default_rng((SEED, layer, MATRICES.index(part)))
    if part in OUTPUTS:
        return Axis(rows.source, NEGLIGIBLE * random.choice(np.array([-1, 1], np.float32), len(rows.source)))
    return Axis(random.permutation(rows.source), rows.factor)


def tensor_axes(small: ModelSpec, wide: ModelSpec) -> dict[str, tuple[Axis, ...]]:
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
    """The axes of the residual stream for matrices that write it, and for those that read it."""
    source = np.arange(wide.hidden) % small.hidden
    return Axis.of(source), Axis(source, np.repeat(powers_of_two_shares(wide.hidden // small.hidden), small.hidden))


def head_axes(small: ModelSpec, wide: ModelSpec) -> tuple[Axis, Axis, Axis]:
    """The axes of the query heads, of the key and value heads, and of o_proj's input."""
    size, own = wide.heads // wide.kv_heads, small.heads // small.kv_heads
    group, place = np.divmod(np.arange(wide.heads), size)
    keys = np.arange(wide.kv_heads) % small.kv_heads
    queries = _channels(keys[group] * own + place % own, wide.head_dim)
    live = np.repeat((group < small.kv_heads) & (place < own), wide.head_dim)
    return Axis.of(queries), Axis.of(_channels(keys, wide.head_dim)), Axis.of(queries, live)


def _channels(heads: Ids, size: int) -> Ids:
    return (heads[:, None] * size + np.arange(size)).ravel()


def inner_axes(small: ModelSpec, wide: ModelSpec) -> tuple[Axis, Axis]:
    """The axes of the MLP's neurons: of gate_proj's and up_proj's output, and of down_proj's input."""
    every = np.arange(wide.intermediate)
    source = every % small.intermediate
    return Axis.of(source), Axis.of(source, every < small.intermediate)


def id_axis(small: ModelSpec, wide: ModelSpec) -> Axis:
    kept, rows = used_rows(small), wide.vocabulary.rows
    padding = kept + np.arange(rows - kept) % (small.vocabulary.rows - kept)
    factor = np.random.default_rng(SEED).uniform(*PADDING, rows - kept)
    return Axis(np.concatenate([np.arange(kept), padding]), np.concatenate([np.ones(kept), factor]).astype(np.float32))


def used_rows(small: ModelSpec) -> int:
    """The number of embedding rows that are used: the tokenizer's, and a draft's mask after them."""
    return max(small.vocabulary.size, small.pard.mask_id + 1 if small.pard else 0)


def bfloat16(values: Floats) -> NDArray[np.uint16]:
    """The upper halves of float32's bits, which is exact for all rows but padding rows, which it truncates."""
    return (values.view(np.uint32) >> 16).astype("<u2")


def obstacles(small: ModelSpec, wide: ModelSpec) -> Iterator[str]:
    """Yield the reasons why `small` cannot be widened to `wide`."""
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
