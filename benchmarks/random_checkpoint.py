"""A checkpoint of true shape with random weights: for measuring what exporting and running cost.

    python benchmarks/random_checkpoint.py --like Qwen2.5-1.5B --output DIR

The tokenizer is the demo pair's, so most ids are padding; costs do not depend on that. Weights are one
block of noise repeated, written tensor by tensor.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from pard_onnx.models.demo import TARGET

# Public facts of the models' config.json.
FACTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
)
SHAPES = {
    name: dict(zip(FACTS, facts, strict=True))
    for name, facts in {
        "Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151936, True),
        "Qwen2.5-1.5B": (1536, 28, 12, 2, 8960, 151936, True),
        "Qwen2.5-3B": (2048, 36, 16, 2, 11008, 151936, True),
        "Qwen2.5-7B": (3584, 28, 28, 4, 18944, 152064, False),
    }.items()
}
NOISE = 1 << 22  # values


def tensors(shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    head = hidden // shape["num_attention_heads"]
    wide, narrow = hidden, shape["num_key_value_heads"] * head
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape["vocab_size"], hidden)}
    for i in range(shape["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, rows in (("q", wide), ("k", narrow), ("v", narrow)):
            out[f"{layer}.self_attn.{name}_proj.weight"] = (rows, hidden)
            out[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        out[f"{layer}.self_attn.o_proj.weight"] = (hidden, wide)
        out[f"{layer}.mlp.gate_proj.weight"] = out[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
        out[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        out[f"{layer}.input_layernorm.weight"] = out[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    out["model.norm.weight"] = (hidden,)
    if not shape["tie_word_embeddings"]:
        out["lm_head.weight"] = (shape["vocab_size"], hidden)
    return out


def write(name: str, folder: Path, draft: bool = False) -> None:
    shape = SHAPES[name]
    folder.mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(TARGET / file, folder / file)
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        **shape,
    }
    if draft:
        config |= {
            "pard_token": json.loads((TARGET.parent / "draft" / "config.json").read_text())["pard_token"],
            "spd_type": "pard",
        }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shapes = tensors(shape)
    header, offset = {}, 0
    for tensor, dims in shapes.items():
        size = 2 * int(np.prod(dims))
        header[tensor] = {"dtype": "BF16", "shape": dims, "data_offsets": [offset, offset + size]}
        offset += size
    noise = np.random.default_rng(0).standard_normal(NOISE, dtype=np.float32) * 0.02
    block = (noise.view(np.uint32) >> 16).astype("<u2")
    ones = np.full(NOISE, 0x3F80, "<u2")
    with (folder / "model.safetensors").open("wb") as file:
        text = json.dumps(header).encode()
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor, dims in shapes.items():
            source = ones if "norm" in tensor else block
            left = int(np.prod(dims))
            while left:
                source[: min(left, NOISE)].tofile(file)
                left -= min(left, NOISE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", choices=SHAPES, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--draft", action="store_true", help="give it a mask token")
    options = parser.parse_args()
    write(options.like, options.output, options.draft)


if __name__ == "__main__":
    main()
