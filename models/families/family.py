"""`Family`: what sets a model family's decoder layer apart, as plain data; and the tensors that a model of it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pard_onnx.models.spec import FEATURE_NORM, MASK_FEATURE, PROJECTION, ModelSpec


@dataclass(frozen=True, slots=True)
class Norm:
    """The family's RMS norm in transformers: x / rms(x) * (offset + weight).

    epsilon: the module's attribute that holds it.
    """

    class_name: str
    epsilon: str = "variance_epsilon"
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class ScaledEmbedding:
    """An embedding in transformers that multiplies its rows by sqrt(hidden).

    buffer: its attribute that holds the factor.
    """

    class_name: str
    buffer: str


@dataclass(frozen=True, slots=True)
class Windows:
    """Layers that see a window of tokens, beside full ones, and the rotary rule of their own.

    size: default of the config's `sliding_window`. pattern: the default of `pattern_key`; where the config has no
    `layer_types`, every pattern-th layer is full. theta: the default of `theta_key`, the window layers' rotary base.
    """

    size: int
    pattern_key: str
    pattern: int
    theta_key: str
    theta: float


@dataclass(frozen=True, slots=True)
class Unrotated:
    """Layers without rotary embedding. key: the config's list of a number a layer, 0 for those; where there is none,
    every interval-th layer is one. interval: the default of `interval_key`."""

    key: str
    interval_key: str
    interval: int


@dataclass(frozen=True, slots=True)
class Family:
    """A decoder layer's differences, transformers' classes, and its defaults for what a config leaves out.

    In every family a layer has self_attn.{q,k,v,o}_proj and mlp.{gate,up,down}_proj. Modules that hold weights are
    known by the exact names of their classes: `torch.nn.Linear` and `torch.nn.Embedding`, and those named here.
    """

    name: str  # the config's model_type
    norm: Norm
    rotary: str  # class name
    embedding: ScaledEmbedding | None = None  # None: torch.nn.Embedding
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")  # of a layer, beside q's and k's
    mlp_norm: str = "post_attention_layernorm"  # the one that the MLP reads
    qkv_bias: bool = False
    qk_norm: bool = False
    off: tuple[str, ...] = ()  # switches of config.json that change the layer and must be false
    null: tuple[str, ...] = ()  # numbers of config.json that change the model and must be null
    activation: str = "silu"  # of the MLP; transformers' name
    activation_key: str = "hidden_act"
    head_dim: int | None = None  # None: hidden / heads
    kv_heads: int | None = None  # `num_key_value_heads` where config.json leaves it out; None: as many as heads
    null_kv_heads: bool = True  # whether it may be null, which is as many as heads
    tied: bool = False
    theta: float = 10_000.0  # rotary base
    windows: Windows | None = None  # None: full attention only
    window: int | None = None  # `sliding_window` where config.json leaves it out, if windows is None
    window_used: bool = True  # `use_sliding_window` where config.json leaves it out, if windows is None
    unrotated: Unrotated | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()


def shapes(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that a checkpoint of `spec` must hold, by name; matrices are [out, in].

    One by one: a config may claim any number of layers.
    """
    joined = spec.pard is not None and spec.pard.features is not None and spec.pard.features.join == "concat"
    yield "model.embed_tokens.weight", (spec.vocabulary.rows, spec.hidden)
    for index in range(spec.layers):
        for name, shape in _layer(spec, 2 * spec.hidden if joined and index == 0 else spec.hidden).items():
            yield f"model.layers.{index}.{name}", shape
    yield "model.norm.weight", (spec.hidden,)
    if not spec.tied:
        yield "lm_head.weight", (spec.vocabulary.rows, spec.hidden)
    if spec.pard and (features := spec.pard.features):
        yield f"{PROJECTION}.weight", (spec.hidden, features.width)
        if features.bias:
            yield f"{PROJECTION}.bias", (spec.hidden,)
        if joined:
            yield f"{FEATURE_NORM}.weight", (spec.hidden,)
            yield MASK_FEATURE, (features.width,)


def _layer(spec: ModelSpec, attention_input: int) -> dict[str, tuple[int, ...]]:
    """attention_input: columns of what q, k and v are projected from."""
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    widths = {"q": queries, "k": keys, "v": keys}
    before, *after = spec.norms
    found: dict[str, tuple[int, ...]] = {f"{before}.weight": (spec.hidden,)}
    found |= {f"self_attn.{name}_proj.weight": (width, attention_input) for name, width in widths.items()}
    if spec.qkv_bias:
        found |= {f"self_attn.{name}_proj.bias": (width,) for name, width in widths.items()}
    if spec.qk_norm:
        found |= {f"self_attn.{name}_norm.weight": (spec.head_dim,) for name in "qk"}
    found["self_attn.o_proj.weight"] = (spec.hidden, queries)
    found |= {f"{name}.weight": (spec.hidden,) for name in after}
    return found | {
        "mlp.gate_proj.weight": (spec.intermediate, spec.hidden),
        "mlp.up_proj.weight": (spec.intermediate, spec.hidden),
        "mlp.down_proj.weight": (spec.hidden, spec.intermediate),
    }
