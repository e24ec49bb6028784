"""Model families: one entry each, and the tensors that a model of it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Family:
    """What sets a family's decoder layer apart, and transformers' defaults for what its config leaves out.

    off: switches of config.json that change the layer and must be false; head_dim None: hidden / heads.
    """

    name: str  # the config's model_type
    qkv_bias: bool = False
    qk_norm: bool = False
    off: tuple[str, ...] = ()
    head_dim: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", off=("attention_bias", "mlp_bias"), bos_id=1, eos_ids=(2,)),
        Family("qwen2", qkv_bias=True),
        Family("qwen3", qk_norm=True, off=("attention_bias",), head_dim=128),
    )
}


def shapes(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that a checkpoint of `spec` must hold, by name; matrices are [out, in].

    One by one: a config may claim any number of layers.
    """
    yield "model.embed_tokens.weight", (spec.vocabulary.rows, spec.hidden)
    for index in range(spec.layers):
        for name, shape in _layer(spec).items():
            yield f"model.layers.{index}.{name}", shape
    yield "model.norm.weight", (spec.hidden,)
    if not spec.tied:
        yield "lm_head.weight", (spec.vocabulary.rows, spec.hidden)


def _layer(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    widths = {"q": queries, "k": keys, "v": keys}
    found: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (spec.hidden,)}
    found |= {f"self_attn.{name}_proj.weight": (width, spec.hidden) for name, width in widths.items()}
    if spec.qkv_bias:
        found |= {f"self_attn.{name}_proj.bias": (width,) for name, width in widths.items()}
    if spec.qk_norm:
        found |= {f"self_attn.{name}_norm.weight": (spec.head_dim,) for name in "qk"}
    return found | {
        "self_attn.o_proj.weight": (spec.hidden, queries),
        "post_attention_layernorm.weight": (spec.hidden,),
        "mlp.gate_proj.weight": (spec.intermediate, spec.hidden),
        "mlp.up_proj.weight": (spec.intermediate, spec.hidden),
        "mlp.down_proj.weight": (spec.hidden, spec.intermediate),
    }
