"""A P-EAGLE draft in torch, by the published code of vLLM and speculators: its forward pass, and a short training.

Weights are a dict of tensors by the names of a published checkpoint (`layers.0`, not `midlayer`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import save_json, save_safetensors
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

Weights = Mapping[str, Tensor]
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}
DEPTHS = 5  # tokens that a chain of the training proposes: one from its anchor, the others from masks
NOISE = 0.5  # the share of real tokens that are exchanged while training: the draft has to read features


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def forward(
    raw: Mapping[str, Any], held: Weights, ids: Tensor, features: Tensor, positions: Tensor, seen: Tensor
) -> Tensor:
    """The logits of ids [batch, n], each read with its row of features [batch, n, width].

    raw: config.json; positions: [n]; seen: [n, n], which tokens (columns) a token (row) attends to.
    """
    inner = dict(raw.get("transformer_layer_config", raw))
    config = CONFIGS[inner.pop("model_type")](**inner)
    epsilon, batch, n = config.rms_norm_eps, *ids.shape
    hidden = functional.linear(features, held["fc.weight"])
    embedded = held["embed_tokens.weight"][ids]
    cos, sin = LlamaRotaryEmbedding(config)(hidden, positions[None])
    for index in range(config.num_hidden_layers):
        part = {name.removeprefix(f"layers.{index}."): w for name, w in held.items() if f"layers.{index}." in name}
        if index == 0:
            normed = norm(hidden, part["hidden_norm.weight"], epsilon)
            hidden = normed if raw["norm_before_residual"] else hidden
            x = torch.cat([norm(embedded, part["input_layernorm.weight"], epsilon), normed], -1)
        else:
            x = norm(hidden, part["input_layernorm.weight"], epsilon)
        q, k, v = (
            functional.linear(x, part[f"self_attn.{name}_proj.weight"]).view(batch, n, -1, config.head_dim)
            for name in "qkv"
        )
        if "self_attn.q_norm.weight" in part:
            q, k = norm(q, part["self_attn.q_norm.weight"], epsilon), norm(k, part["self_attn.k_norm.weight"], epsilon)
        q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        found = functional.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=seen, enable_gqa=True)
        found = found.transpose(1, 2).reshape(batch, n, -1)
        hidden = hidden + functional.linear(found, part["self_attn.o_proj.weight"])
        x = norm(hidden, part["post_attention_layernorm.weight"], epsilon)
        gate, up = (functional.linear(x, part[f"mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        hidden = hidden + functional.linear(functional.silu(gate) * up, part["mlp.down_proj.weight"])
    return functional.linear(norm(hidden, held["norm.weight"], epsilon), held["lm_head.weight"])


def overfit(raw: Mapping[str, Any], texts: Sequence[tuple[Tensor, Tensor]], steps: int, seed: int = 0) -> Weights:
    """Weights that know these texts by heart: (ids [n], the target's features [n, width]), as the published training.

    Row t of a chain's anchors has token t + 1 and the features of token t; the first token is in no row. Each anchor
    begins a chain of masks, which see the anchors up to their own and the masks of their chain.
    """
    torch.manual_seed(seed)
    held = {name: parameter.requires_grad_() for name, parameter in _random(raw).items()}
    most = max(len(ids) for ids, _ in texts)
    ids = torch.zeros(len(texts), most + DEPTHS, dtype=torch.long)
    features, lengths = torch.zeros(len(texts), most - 1, texts[0][1].shape[1]), torch.zeros(len(texts), 1)
    for row, (text, given) in enumerate(texts):
        ids[row, : len(text)], features[row, : len(text) - 1], lengths[row] = text, given[:-1], len(text)
    anchor, depth = torch.arange(most - 1).repeat(DEPTHS), torch.arange(DEPTHS).repeat_interleave(most - 1)
    own = (anchor[:, None] == anchor) & (depth[:, None] >= depth)
    seen = own | ((depth == 0) & (anchor[:, None] >= anchor))
    place = anchor + depth + 1  # of the token that is read
    wanted = ids[:, place + 1]
    counted = place + 1 < lengths
    real, mask_id = depth == 0, raw["mask_token_id"]
    optimizer = torch.optim.Adam(held.values(), lr=4e-3)
    for step in range(steps):
        noise = torch.randint(0, mask_id, ids.shape)
        shown = torch.where(torch.rand(ids.shape) < NOISE, noise, ids)[:, place]
        fed = torch.where(real, shown, torch.tensor(mask_id))
        rows = torch.where(real[:, None], features[:, anchor], held["mask_hidden"])
        logits = forward(raw, held, fed, rows, place, seen)
        loss = functional.cross_entropy(logits[counted], wanted[counted])
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in held.items()}


def save(folder: Path, raw: Mapping[str, Any], held: Weights) -> None:
    """The published checkpoint: config.json and model.safetensors."""
    save_json(folder / "config.json", raw)
    save_safetensors(folder / "model.safetensors", {n: np.ascontiguousarray(w.numpy()) for n, w in held.items()})


def _random(raw: Mapping[str, Any]) -> dict[str, Tensor]:
    inner = raw["transformer_layer_config"]
    hidden, inter, dim = inner["hidden_size"], inner["intermediate_size"], inner["head_dim"]
    queries, keys = inner["num_attention_heads"] * dim, inner["num_key_value_heads"] * dim
    width = len(raw["eagle_aux_hidden_state_layer_ids"]) * raw["target_hidden_size"]

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns) / columns**0.5

    held = {"fc.weight": matrix(hidden, width), "mask_hidden": torch.randn(1, 1, width)}
    held |= {"embed_tokens.weight": torch.randn(inner["vocab_size"], hidden), "norm.weight": torch.ones(hidden)}
    held |= {"lm_head.weight": matrix(inner["vocab_size"], hidden), "layers.0.hidden_norm.weight": torch.ones(hidden)}
    for index in range(inner["num_hidden_layers"]):
        read = 2 * hidden if index == 0 else hidden
        shapes = {"self_attn.q": (queries, read), "self_attn.k": (keys, read), "self_attn.v": (keys, read)}
        shapes |= {"self_attn.o": (hidden, queries), "mlp.gate": (inter, hidden), "mlp.up": (inter, hidden)}
        shapes |= {"mlp.down": (hidden, inter)}
        held |= {f"layers.{index}.{name}_proj.weight": matrix(*shape) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            held[f"layers.{index}.{name}.weight"] = torch.ones(hidden)
    return held
