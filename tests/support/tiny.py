"""Tiny random checkpoints of every family, in the true Hugging Face schema, written without torch.

Tests take them through the `tiny` fixture: `folder = tiny(tmp_path / "target", "qwen3", "target", layers=3)`.
A draft and a target of the same `tokenizer_size` share their tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # the tokenizer's last ids, in this order
TEXT = "def the quick brown fox jumps over lazy dogs: return self import for value in range print format string of it "
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
QKV_BIAS = ("qwen2",)
QK_NORM = ("qwen3", "gemma3_text")
FEEDFORWARD_NORMS = ("gemma3_text",)  # two norms more a layer
WINDOW = 8  # tokens, of gemma3_text's window layers: far fewer than the parity check's text has
SHA = "0123456789abcdef0123456789abcdef01234567"  # of the hub cache's one commit
BLOB = "f" * 40
STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write(
    folder: Path,
    family: str = "qwen2",
    role: Literal["target", "draft"] = "target",
    *,
    dtype: str = "float32",
    vocab_rows: int = 320,
    tokenizer_size: int = 300,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    intermediate: int = 96,
    tied: bool = False,
    rope: Mapping[str, Any] | None = None,
    shards: int = 1,
    eos: Sequence[int] | None = None,
    max_positions: int = 512,
    std: float = 0.12,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a checkpoint and return its folder.

    rope: `rope_parameters`, e.g. LLAMA3; default: plain, theta 10000. eos: written to generation_config.json;
    default: <|im_end|>. A draft's mask id is `tokenizer_size`, its first padding row. `config` overrides
    entries of config.json; a `rope_theta` among them leaves `rope_parameters` out, as in older checkpoints.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "dtype": dtype,
        "vocab_size": vocab_rows,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": tokenizer_size - 1,
        "pad_token_id": tokenizer_size - 3,
    }
    values |= _own(family, layers, head_dim)
    if "rope_theta" not in config:
        values["rope_parameters"] = dict(rope or {"rope_type": "default", "rope_theta": 10000.0})
        if family == "gemma3_text":
            local = {"rope_type": "default", "rope_theta": 100.0}
            values["rope_parameters"] = {"full_attention": values["rope_parameters"], "sliding_attention": local}
    if role == "draft":
        values |= {"pard_token": tokenizer_size, "spd_type": "pard"}
    values |= config
    save_json(folder / "config.json", values)
    save_json(
        folder / "generation_config.json",
        {"eos_token_id": list(eos) if eos is not None else tokenizer_size - 1, "do_sample": False},
    )
    _save_tokenizer(folder, tokenizer_size)
    _save_weights(folder, weights(values, std, seed), STORED[dtype], shards)
    return folder


def _own(family: str, layers: int, head_dim: int) -> dict[str, Any]:
    """What the family's config has beside the others'."""
    if family == "mistral":
        return {"sliding_window": None}
    if family == "smollm3":
        return {"no_rope_layers": [index % 2 for index in range(layers)], "use_sliding_window": False}
    if family == "gemma3_text":
        kinds = [("sliding_attention", "full_attention")[index % 2] for index in range(layers)]
        own = {"layer_types": kinds, "sliding_window": WINDOW, "query_pre_attn_scalar": head_dim + 8}
        return own | {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": None}
    return {}


def weights(config: Mapping[str, Any], std: float = 0.12, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random tensors by name, as the family of `config` needs them."""
    rng = np.random.default_rng(seed)
    hidden, intermediate, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    found: dict[str, NDArray[np.float32]] = {}
    family = config["model_type"]
    one = 0 if family == "gemma3_text" else 1  # its norms add it to their weights

    def normal(name: str, *shape: int, mean: float = 0.0) -> None:
        found[name] = rng.normal(mean, std, shape).astype(np.float32)

    normal("model.embed_tokens.weight", config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        normal(f"{layer}.input_layernorm.weight", hidden, mean=one)
        normal(f"{layer}.post_attention_layernorm.weight", hidden, mean=one)
        for name in ("pre", "post") if family in FEEDFORWARD_NORMS else ():
            normal(f"{layer}.{name}_feedforward_layernorm.weight", hidden, mean=one)
        for name, width in (("q", queries), ("k", keys), ("v", keys)):
            normal(f"{layer}.self_attn.{name}_proj.weight", width, hidden)
            if family in QKV_BIAS:
                normal(f"{layer}.self_attn.{name}_proj.bias", width)
            if family in QK_NORM and name != "v":
                normal(f"{layer}.self_attn.{name}_norm.weight", dim, mean=one)
        normal(f"{layer}.self_attn.o_proj.weight", hidden, queries)
        normal(f"{layer}.mlp.gate_proj.weight", intermediate, hidden)
        normal(f"{layer}.mlp.up_proj.weight", intermediate, hidden)
        normal(f"{layer}.mlp.down_proj.weight", hidden, intermediate)
    normal("model.norm.weight", hidden, mean=one)
    if not config["tie_word_embeddings"]:
        normal("lm_head.weight", config["vocab_size"], hidden)
    return found


def make_pard2(
    folder: Path,
    *,
    layers: Sequence[int] = (-1, -2, -3),
    target_hidden: int = 64,
    scale: float = 0.5,
    bias: bool = False,
    file: Literal["warp_model.bin", "pard_warp_model/model.safetensors"] = "warp_model.bin",
    stored: str = "F32",
    seed: int = 7,
) -> Path:
    """Give the draft in `folder` a projection of its target's hidden states, as PARD-2's checkpoints have it.

    The scale is larger than the published 0.02, so that a wrong feature shows.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rng, width = np.random.default_rng(seed), len(layers) * target_hidden
    tensors = {"target_proj.weight": rng.normal(0, 0.1, (config["hidden_size"], width)).astype(np.float32)}
    if bias:
        tensors["target_proj.bias"] = rng.normal(0, 1, config["hidden_size"]).astype(np.float32)
    edit_json(
        folder / "config.json",
        spd_type="pard2",
        pard2=True,
        pard2_scale=scale,
        pard2_proj_bias=bias,
        pard2_target_dim=width,
        pard2_target_layers=list(layers),
    )
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".bin":
        import torch  # it writes the only format that is read

        kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored]
        torch.save({name: torch.from_numpy(array).to(kind) for name, array in tensors.items()}, path)
    else:
        save_safetensors(path, tensors, stored)
    return folder


def make_peagle(
    folder: Path,
    *,
    layers: Sequence[int] = (0, 1, 2),
    target_hidden: int = 64,
    norm_before_residual: bool = False,
    speculators: bool = False,
    seed: int = 7,
) -> Path:
    """Make the llama draft in `folder` a P-EAGLE draft with random weights, in vLLM's or in speculators' layout."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rng, hidden, width = np.random.default_rng(seed), config["hidden_size"], len(layers) * target_hidden
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors.setdefault("lm_head.weight", tensors["embed_tokens.weight"][::-1].copy())
    for name in ("q_proj", "k_proj", "v_proj"):
        key = f"layers.0.self_attn.{name}.weight"
        tensors[key] = np.concatenate([tensors[key], rng.normal(0, 0.12, tensors[key].shape)], 1).astype(np.float32)
    tensors["layers.0.hidden_norm.weight"] = rng.normal(1, 0.2, hidden).astype(np.float32)
    tensors["fc.weight"] = rng.normal(0, 0.1, (hidden, width)).astype(np.float32)
    tensors["mask_hidden"] = rng.normal(0, 1, (1, 1, width)).astype(np.float32)
    if not speculators:
        tensors = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}
    own = {
        "eagle_aux_hidden_state_layer_ids": list(layers),
        "target_hidden_size": target_hidden,
        "norm_before_residual": norm_before_residual,
        "draft_vocab_size": config["vocab_size"],
        "ptd_token_id": config.pop("pard_token"),
    }
    config.pop("spd_type", None)
    config["tie_word_embeddings"] = False
    config["architectures"] = ["LlamaForCausalLMEagle3"]
    if speculators:
        inner = {key: value for key, value in config.items() if key != "architectures"}
        config = {"architectures": ["PEagleSpeculator"], "speculators_model_type": "peagle"}
        config |= {"model_type": "speculator_model", "tie_word_embeddings": False, "transformer_layer_config": inner}
    save_json(folder / "config.json", config | own)
    save_safetensors(folder / "model.safetensors", tensors)
    return folder


def save_safetensors(path: Path, tensors: Mapping[str, NDArray[np.float32]], stored: str = "F32") -> None:
    """Write float32 arrays as F32, F16 or BF16 (rounded to even); safetensors.numpy cannot write bfloat16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, offset = [], 0
    for name, array in tensors.items():
        blobs.append(_encode(array, stored))
        header[name] = {
            "dtype": stored,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(blobs[-1])],
        }
        offset += len(blobs[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def save_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8", newline="\n")


def edit_json(path: Path, **changes: Any) -> None:
    """Change entries of a JSON object; the value ... removes one."""
    value = json.loads(path.read_text(encoding="utf-8")) | changes
    save_json(path, {key: item for key, item in value.items() if item is not ...})


def _encode(array: NDArray[np.float32], stored: str) -> bytes:
    if stored == "BF16":
        bits = array.astype("<f4").view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return array.astype({"F32": "<f4", "F16": "<f2"}[stored]).tobytes()


def _save_weights(folder: Path, tensors: Mapping[str, NDArray[np.float32]], stored: str, shards: int) -> None:
    if shards == 1:
        save_safetensors(folder / "model.safetensors", tensors, stored)
        return
    names = list(tensors)
    files = [f"model-{index + 1:05}-of-{shards:05}.safetensors" for index in range(shards)]
    for index, file in enumerate(files):
        save_safetensors(folder / file, {name: tensors[name] for name in names[index::shards]}, stored)
    shard_of = {name: files[index % shards] for index, name in enumerate(names)}
    size = sum(array.size for array in tensors.values()) * (4 if stored == "F32" else 2)
    index_file = {"metadata": {"total_size": size}, "weight_map": shard_of}
    save_json(folder / "model.safetensors.index.json", index_file)


@cache
def _tokenizer(size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - len(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    short = size - tokenizer.get_vocab_size()  # the text has no more merges to give
    assert short >= 0, f"the bytes and special tokens alone take {size - short} ids"
    if short:
        raise ValueError(f"tokenizer_size {size}: at most {size - short}")
    return tokenizer


def _save_tokenizer(folder: Path, size: int) -> None:
    _tokenizer(size).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }
    save_json(folder / "tokenizer_config.json", config)


def save_in_hub_cache(source: Path, cache: Path, name: str) -> Path:
    """Lay out `source` as huggingface_hub's cache does: links in a snapshot to blobs; without links, copies."""
    repo = cache / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    for folder in ("refs", "blobs"):
        (repo / folder).mkdir()
    (repo / "refs" / "main").write_text(SHA)
    for file in source.iterdir():
        blob = repo / "blobs" / (file.name + BLOB)
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot
