"""P-EAGLE drafts in exported graphs, against a torch reference that follows vLLM's and speculators' published code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from pard_onnx.models.manifest import Manifest

Exported = Callable[..., tuple[Path, Path]]
MASK, K, TOKENS = 300, 4, 12
IDS = np.arange(20, 20 + TOKENS)
slow = pytest.mark.slow


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def published(folder: Path, ids: NDArray[np.int64], features: NDArray[np.float32], masks: int) -> NDArray[np.float32]:
    """The logits of the ids and of masks after them: masks have `mask_hidden` where ids have features."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = LlamaConfig(**{k: v for k, v in raw.get("transformer_layer_config", raw).items() if k != "model_type"})
    held = {
        name.replace("midlayer.", "layers.0."): value for name, value in load_file(folder / "model.safetensors").items()
    }
    hidden = torch.cat([torch.from_numpy(features), held["mask_hidden"].reshape(1, -1).expand(masks, -1)])
    hidden = functional.linear(hidden, held["fc.weight"])
    embedded = held["embed_tokens.weight"][torch.tensor([*ids, *[MASK] * masks])]
    cos, sin = LlamaRotaryEmbedding(config)(hidden[None], torch.arange(len(hidden))[None])
    for index in range(config.num_hidden_layers):
        part = {n.removeprefix(f"layers.{index}."): v for n, v in held.items() if n.startswith(f"layers.{index}.")}
        first, epsilon = index == 0, config.rms_norm_eps
        if first:
            normed = norm(hidden, part["hidden_norm.weight"], epsilon)
            hidden = normed if raw["norm_before_residual"] else hidden
            x = torch.cat([norm(embedded, part["input_layernorm.weight"], epsilon), normed], -1)
        else:
            x = norm(hidden, part["input_layernorm.weight"], epsilon)
        heads = [
            functional.linear(x, part[f"self_attn.{n}_proj.weight"])
            .view(1, len(x), -1, config.head_dim)
            .transpose(1, 2)
            for n in "qkv"
        ]
        q, k = apply_rotary_pos_emb(heads[0], heads[1], cos, sin)
        seen = functional.scaled_dot_product_attention(q, k, heads[2], is_causal=True, enable_gqa=True)
        hidden = hidden + functional.linear(seen.transpose(1, 2).reshape(len(x), -1), part["self_attn.o_proj.weight"])
        x = norm(hidden, part["post_attention_layernorm.weight"], epsilon)
        gate, up = (functional.linear(x, part[f"mlp.{n}_proj.weight"]) for n in ("gate", "up"))
        hidden = hidden + functional.linear(functional.silu(gate) * up, part["mlp.down_proj.weight"])
    return functional.linear(norm(hidden, held["norm.weight"], epsilon), held["lm_head.weight"]).numpy()


def fed(width: int) -> NDArray[np.float32]:
    found = np.random.default_rng(3).normal(size=(TOKENS, width)).astype(np.float32)
    found[0] = 0  # no token is before the first one
    return found


def logits(folder: Path, features: NDArray[np.float32] | None) -> NDArray[Any]:
    """Of the last token and the masks after it, in one step of the exported graph."""
    manifest = Manifest.read(folder)
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    portable, spec = manifest.attention == "portable", manifest.spec
    ids = [*IDS, *[MASK] * (K - 1)] if portable else IDS
    given: dict[str, Any] = {"input_ids": np.array(ids)[None], "attention_mask": np.ones((1, len(ids)), np.int64)}
    given |= {"position_ids": np.arange(len(ids))[None]} if portable else {"draft_length": np.array([K])}
    cache = np.zeros((1, spec.kv_heads, 96, spec.head_dim), np.float32)
    given |= {f"past_key_values.{i}.{part}": cache for i in range(spec.layers) for part in ("key", "value")}
    if features is not None:
        rows = np.concatenate([features, np.repeat(features[-1:], K - 1, 0)]) if portable else features
        given["target_features"] = rows[None]
    return np.asarray(session.run(["logits"], given)[0])[0][-K:]


@pytest.mark.parametrize(
    ("before", "speculators", "device"),
    (
        pytest.param(False, False, "cpu", marks=slow),
        (True, True, "cpu"),
        pytest.param(True, False, "webgpu", marks=slow),
        pytest.param(False, True, "webgpu", marks=slow),
    ),
)
def test_its_logits_are_those_of_the_published_code(
    exported: Exported, before: bool, speculators: bool, device: str
) -> None:
    eagle = {"norm_before_residual": before, "speculators": speculators}
    checkpoint, folder = exported("llama", "draft", "fp32", peagle=eagle, device=device)
    features = Manifest.read(folder).spec.pard.features  # type: ignore[union-attr]
    assert features is not None
    for given in (fed(features.width), None):
        wanted = published(checkpoint, IDS, np.zeros_like(fed(features.width)) if given is None else given, K - 1)
        found = logits(folder, given)[:, :TOKENIZER]
        assert np.abs(found - wanted[-K:, :TOKENIZER]).max() < 1e-4


TOKENIZER = 300
