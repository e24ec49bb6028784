"""Tiny GGUF files of every architecture and type, written from the checkpoints of `tiny`.

`truth = write(tmp_path / "model.gguf", folder, "Q4_0")`: truth is a folder like `folder`, with the floats that the
file's tensors stand for, as the gguf package has them. Bytes of types that the package cannot quantize to are random.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tiny import edit_json, save_safetensors

from pard_onnx.benchmarks.peers.forms import NAMES
from pard_onnx.models.checkpoints.gguf.parts import CONTROL, NORMAL, UNUSED, USER_DEFINED

Float = NDArray[np.float32]
ARCHITECTURE = {"mistral": "llama", "gemma3_text": "gemma3"}  # by family, where the names differ
NEIGHBOURS = ("llama", "smollm3")  # architectures whose rotary pairs are neighbours
SHORT = {"Q4_K": 2, "Q5_K": 2, "Q6_K": 1}  # scales in float16 in a block: at its beginning, of Q6_K at its end
GEMMA3 = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write(
    path: Path,
    folder: Path,
    kind: str = "F32",
    *,
    architecture: str | None = None,
    kinds: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, NDArray[Any] | None] | None = None,
) -> Path:
    """Write `folder` as a GGUF file; the folder of its floats.

    kind: of matrices. kinds: of tensors by a part of their GGUF names. metadata: entries beside the usual ones, or
    in their place; None leaves one out. tensors: the same of tensors in float32.
    """
    config = json.loads((folder / "config.json").read_text())
    family = config["model_type"]
    name = architecture or ARCHITECTURE.get(family, family)
    writer = gguf.GGUFWriter(path, name)
    for key, value in {**_facts(name, config), **_vocabulary(folder, config), **(metadata or {})}.items():
        add(writer, key, value)
    truth = {}
    stored = load_file(folder / "model.safetensors")
    for own, values in stored.items():
        theirs = gguf_name(own, family)
        if tensors and theirs in tensors:
            continue
        plain = values.ndim == 1
        chosen = next((k for part, k in (kinds or {}).items() if f".{part}" in f".{theirs}"), "F32" if plain else kind)
        heads = _heads(own, config) if name in NEIGHBOURS else 0
        added = np.float32(family == "gemma3_text" and own.endswith("norm.weight"))
        data = encoded(_permuted(values + added, heads), chosen)
        writer.add_tensor(theirs, data, raw_dtype=Kind[chosen])
        truth[own] = _restored(decoded(data, chosen), heads).reshape(values.shape) - added
    for own, array in (tensors or {}).items():
        if array is not None:
            writer.add_tensor(own, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    floats = path.with_name(f"{path.name}.floats")
    shutil.copytree(folder, floats)
    save_safetensors(floats / "model.safetensors", truth)
    edit_json(floats / "config.json", dtype="float32")
    return floats


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a metadata entry of the type that llama.cpp's converter gives it."""
    adders: tuple[tuple[type, Callable[[str, Any], None]], ...] = (
        (bool, writer.add_bool),
        (int, writer.add_uint32),
        (float, writer.add_float32),
        (str, writer.add_string),
        (Sequence, writer.add_array),
    )
    if value is not None:
        next(adder for of, adder in adders if isinstance(value, of))(key, value)


def gguf_name(name: str, family: str) -> str:
    stem, _, end = name.rpartition(".")
    names = {**NAMES, **(GEMMA3 if family == "gemma3_text" else {})}
    if not stem.startswith("model.layers."):
        return f"{names[stem]}.{end}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{names[part]}.{end}"


def _facts(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta")}
    windowed = "full_attention" in rope
    full = rope["full_attention"] if windowed else rope
    found = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.dimension_count": config["head_dim"],
        "rope.freq_base": full["rope_theta"],
    }
    if windowed:
        found["attention.sliding_window"] = config["sliding_window"]
        found["rope.freq_base_swa"] = rope["sliding_attention"]["rope_theta"]
    if full.get("rope_type") == "yarn":
        found["rope.scaling.type"] = "yarn"
        found["rope.scaling.factor"] = full["factor"]
        found["rope.scaling.original_context_length"] = full["original_max_position_embeddings"]
    return {f"{name}.{key}": value for key, value in found.items()}


def _vocabulary(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    value = json.loads((folder / "tokenizer.json").read_text())
    rows = config["vocab_size"]
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for token, i in value["model"]["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in value["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in value["model"]["merges"]]
    ids = {"eos": config["eos_token_id"], "bos": config["bos_token_id"], "padding": config["pad_token_id"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": json.loads((folder / "tokenizer_config.json").read_text())["chat_template"],
        **{f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items()},
    }


def rope_factors(scaling: Mapping[str, Any], head_dim: int) -> Float:
    """Llama 3's divisors of the rotary frequencies, as llama.cpp's converter writes them."""
    low, high, original = (
        scaling[f"{k}"] for k in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    found = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * scaling["rope_theta"] ** (i / head_dim)
        if wavelength < original / high:
            found.append(1.0)
        elif wavelength > original / low:
            found.append(scaling["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(found, np.float32)


def encoded(values: Float, kind: str) -> NDArray[Any]:
    if kind == "F32":
        return values
    if kind == "F16":
        return values.astype(np.float16)
    if kind not in SHORT:
        return gguf.quants.quantize(values, Kind[kind])
    block, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    rng = np.random.default_rng(values.size)
    rows, blocks = values.shape[0], values.shape[1] // block
    data = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    scales = rng.uniform(0.5, 1.5, (rows, blocks, SHORT[kind])).astype(np.float16) / np.float16(8000)
    at = slice(0, 4) if SHORT[kind] == 2 else slice(size - 2, size)
    data[..., at] = scales.view(np.uint8)
    return data.reshape(rows, blocks * size)


def decoded(data: NDArray[Any], kind: str) -> Float:
    found: Float = gguf.quants.dequantize(data, Kind[kind])
    return found


def _heads(name: str, config: Mapping[str, Any]) -> int:
    part = name.split(".")[-2]
    return {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(part, 0)


def _permuted(values: Float, heads: int) -> Float:
    """Rows i and i + head_dim / 2 of a head become rows 2i and 2i + 1."""
    if not heads:
        return values
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return np.ascontiguousarray(np.stack([halves[:, 0], halves[:, 1]], axis=2)).reshape(values.shape)


def _restored(values: Float, heads: int) -> Float:
    if not heads:
        return values
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(values.shape)


def split(path: Path, stem: Path, count: int) -> list[Path]:
    """Write a file again as `count` parts, named as llama.cpp names them."""
    reader = gguf.GGUFReader(path)
    parts = [stem.with_name(f"{stem.name}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    for index, part in enumerate(parts):
        writer = gguf.GGUFWriter(part, str(reader.fields["general.architecture"].contents()))
        if index == 0:
            for key, field in reader.fields.items():
                if not key.startswith("GGUF.") and key != "general.architecture":
                    add(writer, key, field.contents())
        for tensor in reader.tensors[index::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts
