"""What a checkpoint is, as far as exporting and running it needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["target", "draft"]
PROJECTION = "target_proj"  # the name of the matrix that TargetFeatures are multiplied by
FEATURE_NORM = "model.layers.0.hidden_norm"  # of the product, where features are joined by "concat"
MASK_FEATURE = "mask_hidden"  # a mask's learned feature there
FeatureJoin = Literal["add", "concat"]
Rotary = Literal["rope", "window_rope"]  # a field of ModelSpec


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3's frequency-dependent stretching of rotary wavelengths."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN (arXiv 2309.00071): long rotary wavelengths are stretched `factor` times, short ones are kept, and cos and
    sin are multiplied by an attention factor, which `factor` and mscale give where it is None."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def positions(self) -> int:
        """How many positions the stretched wavelengths are for."""
        return int(self.original_max_position_embeddings * self.factor)


@dataclass(frozen=True, slots=True)
class Rope:
    theta: float
    llama3: Llama3Scaling | None = None
    yarn: Yarn | None = None


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """window: how many tokens a token sees at most, itself included; None: all before it. rotary: the rule that turns
    its queries and keys, None for none."""

    window: int | None = None
    rotary: Rotary | None = "rope"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """rows: of the embedding matrix, padding included. size: ids 0..size-1 may be read and written: those of the
    tokenizer that the embedding has rows for, and those that end texts."""

    rows: int
    size: int
    eos_ids: tuple[int, ...]
    bos_id: int | None = None


@dataclass(frozen=True, slots=True)
class TargetFeatures:
    """The hidden states of its target that a draft reads with each token: those of the token before it.

    join "add", of PARD-2 (arXiv 2605.08632, AMD-AGI/PARD): scale * projection(feature) is added to the embedding.
    join "concat", of P-EAGLE (vLLM, speculators): projection(feature) is what the layers' residual stream begins with,
    and the first layer's attention reads the embedding and the projection, each after a norm of its own, side by side.
    Masks have a learned feature there.
    """

    layers: tuple[int, ...]  # in the order of concatenation: -1 is after the last norm, -j the residual stream after
    # layer (number of layers) + 1 - j; j >= 0, of P-EAGLE: the residual stream before layer j
    width: int  # of one token's feature: len(layers) * the target's hidden size
    scale: float = 0.02
    bias: bool = False  # whether the projection has one
    join: FeatureJoin = "add"
    norm_before_residual: bool = False  # of "concat": whether the residual stream begins with the normed projection

    @property
    def columns(self) -> int:
        """Columns of the draft's input `target_features`: with a bias, the last one is multiplied by it."""
        return self.width + int(self.bias)

    def layers_of(self, target_layers: int) -> tuple[int, ...]:
        """The layers counted from the end of a target with so many layers, as in `Manifest.feature_layers`."""
        return tuple(layer - target_layers - 1 if layer >= 0 else layer for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Pard:
    """A parallel draft's own facts: the one mask id that all positions share, and what it reads of its target."""

    mask_id: int
    spd_type: str = "pard"
    features: TargetFeatures | None = None  # None: it reads tokens alone


@dataclass(frozen=True, slots=True)
class ModelSpec:
    family: str  # the config's model_type
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Rope
    qk_norm: bool
    qkv_bias: bool
    tied: bool  # lm_head shares the embedding matrix
    max_positions: int
    dtype: str  # of the checkpoint's weights: float32, float16, bfloat16
    vocabulary: Vocabulary
    chat_template: str | None = None
    pard: Pard | None = None
    attention: tuple[LayerAttention, ...] = ()  # of each layer; (): LayerAttention() in all of them
    window_rope: Rope | None = None  # of window layers that have a rotary rule of their own
    embedding_scale: float | None = None  # embeddings are multiplied by it
    norm_offset: float = 0.0  # added to the weights of norms
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")  # of a layer, beside q's and k's
    mlp_norm: str = "post_attention_layernorm"  # the one that the MLP reads

    @property
    def role(self) -> Role:
        return "draft" if self.pard else "target"

    def attention_of(self, layer: int) -> LayerAttention:
        return self.attention[layer] if self.attention else LayerAttention()

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        """The rotary rules that layers have, each once."""
        found = (self.attention_of(layer).rotary for layer in range(self.layers))
        return tuple(sorted({rotary for rotary in found if rotary is not None}))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The windows that layers have, each once."""
        return tuple(dict.fromkeys(self.attention_of(layer).window for layer in range(self.layers)))
