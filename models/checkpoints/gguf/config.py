"""A GGUF file's metadata as the config.json of the same model in transformers: a table of architectures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pard_onnx.models.checkpoints.config import MASK_KEYS
from pard_onnx.models.checks import nearest_name
from pard_onnx.models.errors import BadCheckpoint

from .file import Described, GgufFile
from .metadata import Own
from .rope import FACTORS, rope_parameters
from .types import GgufTensor

ARCHITECTURE = "general.architecture"
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA3 = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Numbers that change the model, by the ends of their keys, and what they are in a model of a supported family
NEUTRAL = {
    "expert_count": 0,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "logit_scale": 1,
    "residual_scale": 1,
    "embedding_scale": 1,
    "rope.scaling.alpha": 0,
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """How llama.cpp's architecture differs from the family of transformers' that it is read as."""

    family: str
    class_name: str
    neighbours: bool = False  # rotary pairs are neighbouring rows of q and k in the file
    added: float = 0.0  # what the file's norms have more than transformers'
    layer: Mapping[str, str] = field(default_factory=lambda: LAYER)  # names of a layer's tensors, without endings


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", neighbours=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", neighbours=True),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", added=1.0, layer={**LAYER, **GEMMA3}),
}


def architecture_of(file: GgufFile) -> tuple[str, Architecture]:
    """llama.cpp's name of the file's architecture, and its row. Raises BadCheckpoint for an unsupported one."""
    name = file.metadata.values.get(ARCHITECTURE)
    found = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if found is None:
        nearest = nearest_name(name, ARCHITECTURES)
        hint = f"; the nearest is {nearest!r}" if nearest else ""
        raise file.metadata.fault(ARCHITECTURE, f"is {name!r}; supported: {', '.join(ARCHITECTURES)}{hint}")
    if name == "llama" and "blk.0.attn_q.bias" in file.tensors:  # a layer of Qwen2's, whose q and k llama.cpp permutes
        return "llama", Architecture("qwen2", "Qwen2ForCausalLM", neighbours=True)
    return str(name), found


def named_tensors(file: GgufFile, architecture: Architecture, heads: int, kv_heads: int) -> dict[str, GgufTensor]:
    """The file's tensors by transformers' names. Raises BadCheckpoint for one that no supported model has."""
    found: dict[str, GgufTensor] = {}
    for name, tensor in file.tensors.items():
        if name == FACTORS:
            continue
        own = _name(name, architecture)
        if own is None:
            raise BadCheckpoint(f"{file.path}: tensor {name} is none of a {architecture.family} model's")
        if len(tensor.shape) == 1 and tensor.kind.block > 1:
            raise BadCheckpoint(f"{file.path}: tensor {name} is stored as {tensor.kind.name}; vectors must be floats")
        part = own.split(".")[-2]
        count = {"q_proj": heads, "k_proj": kv_heads}.get(part, 0) if architecture.neighbours else 0
        if count and tensor.shape[0] % (2 * count):
            raise BadCheckpoint(f"{file.path}: tensor {name} is {list(tensor.shape)}, whose rows are not {count} heads")
        added = architecture.added if part.endswith("norm") else 0.0
        found[own] = GgufTensor(tensor.file, tensor.kind, tensor.shape, tensor.offset, count, added)
    return found


def _name(name: str, architecture: Architecture) -> str | None:
    stem, _, end = name.rpartition(".")
    if end not in ("weight", "bias"):
        return None
    if stem in OUTER:
        return f"{OUTER[stem]}.{end}"
    block, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    if block != "blk" or not layer.isdecimal() or str(int(layer)) != layer or part not in architecture.layer:
        return None
    return f"model.layers.{layer}.{architecture.layer[part]}.{end}"


def stored_name(name: str, architecture: Architecture) -> str:
    """The name that transformers' tensor has in the file."""
    stem, _, end = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{_key(architecture.layer, part)}.{end}"
    return f"{_key(OUTER, stem)}.{end}"


def _key(names: Mapping[str, str], value: str) -> str:
    return next(key for key, name in names.items() if name == value)


def config_values(file: GgufFile, ids: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the same model. ids: of special tokens, by config.json's keys."""
    name, architecture = architecture_of(file)
    own = Own(file.metadata, f"{name}.")
    embedding = _required(file, "token_embd.weight")
    if own.integer("block_count") > len(file.tensors):
        raise own.fault("block_count", f"is {own.integer('block_count')}, but the file has {len(file.tensors)} tensors")
    heads = own.integer("attention.head_count")
    head_dim = own.integer("attention.key_length", max(1, own.integer("embedding_length") // heads))
    own.require_neutral(NEUTRAL)
    _require_plain_attention(own, head_dim)
    own.require("attention.value_length", head_dim, f"and the keys' length is {head_dim}; they must be equal")
    own.require("rope.dimension_count", head_dim, f"of {head_dim}; only whole-head rotation is supported")
    found = {
        "architectures": [architecture.class_name],
        "model_type": architecture.family,
        "dtype": "float32",  # what llama.cpp computes in, and what quantized tensors stand for
        "vocab_size": embedding.shape[0],
        "hidden_size": own.integer("embedding_length"),
        "intermediate_size": own.integer("feed_forward_length"),
        "num_hidden_layers": own.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": own.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": own.integer("context_length"),
        "rms_norm_eps": own.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
    }
    rope = rope_parameters(file, own, head_dim)
    found |= _gemma3(own, rope, head_dim) if name == "gemma3" else {"rope_parameters": rope}
    if name != "gemma3" and (window := own.integer("attention.sliding_window", 0, least=0)):
        found |= {"sliding_window": window, "use_sliding_window": True}  # which the family refuses if it is narrow
    found |= {
        key: file.metadata.values[f"{name}.{key}"] for key in MASK_KEYS if f"{name}.{key}" in file.metadata.values
    }
    return found | dict(ids)


def _require_plain_attention(own: Own, head_dim: int) -> None:
    scale = own.value("attention.scale")
    if scale not in (None, 0) and not math.isclose(own.number("attention.scale"), head_dim**-0.5, rel_tol=1e-5):
        raise own.fault("attention.scale", f"is {scale}; only 1 / sqrt({head_dim}) is supported")
    if own.value("attention.causal") is False:
        raise own.fault("attention.causal", "is false; only causal attention is supported")


def _required(file: GgufFile, name: str) -> Described:
    if name not in file.tensors:
        raise BadCheckpoint(f"{file.path}: has no tensor {name}; convert the model again")
    return file.tensors[name]


def _gemma3(own: Own, rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    layers, window = own.integer("block_count"), own.integer("attention.sliding_window", 0, least=0)
    pattern = own.integer("attention.sliding_window_pattern", 6)
    kinds = ["sliding_attention" if window and (i + 1) % pattern else "full_attention" for i in range(layers)]
    local = {"rope_type": "default", "rope_theta": own.number("rope.freq_base_swa", 10_000.0)}
    scalar = own.integer("embedding_length") / own.integer("attention.head_count") if layers == 62 else head_dim
    return {
        "layer_types": kinds,
        "rope_parameters": {"full_attention": rope, "sliding_attention": local},
        "sliding_window": window or own.integer("context_length"),
        "query_pre_attn_scalar": int(scalar),  # as llama.cpp has it: of the 27B model alone it is another
        "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh",
    }
