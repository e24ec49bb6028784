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
from peagle_reference import forward
from safetensors.torch import load_file

from pard_onnx.models.manifest import Manifest

Exported = Callable[..., tuple[Path, Path]]
MASK, K, TOKENS = 300, 4, 12
IDS = np.arange(20, 20 + TOKENS)
slow = pytest.mark.slow


def published(folder: Path, ids: NDArray[np.int64], features: NDArray[np.float32], masks: int) -> NDArray[np.float32]:
    """The logits of the ids and of masks after them: masks have `mask_hidden` where ids have features."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    held = {
        name.replace("midlayer.", "layers.0."): value for name, value in load_file(folder / "model.safetensors").items()
    }
    rows = torch.cat([torch.from_numpy(features), held["mask_hidden"].reshape(1, -1).expand(masks, -1)])
    read, n = torch.tensor([*ids, *[MASK] * masks]), len(ids) + masks
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    return forward(raw, held, read[None], rows[None], torch.arange(n), seen)[0].numpy()


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
    ("family", "before", "speculators", "device"),
    (
        pytest.param("llama", False, False, "cpu", marks=slow),
        ("qwen3", True, True, "cpu"),
        pytest.param("llama", True, True, "cpu", marks=slow),
        pytest.param("llama", True, False, "webgpu", marks=slow),
        pytest.param("qwen3", False, True, "webgpu", marks=slow),
    ),
)
def test_its_logits_are_those_of_the_published_code(
    exported: Exported, family: str, before: bool, speculators: bool, device: str
) -> None:
    eagle = {"norm_before_residual": before, "speculators": speculators}
    checkpoint, folder = exported(family, "draft", "fp32", peagle=eagle, device=device)
    features = Manifest.read(folder).spec.pard.features  # type: ignore[union-attr]
    assert features is not None
    for given in (fed(features.width), None):
        wanted = published(checkpoint, IDS, np.zeros_like(fed(features.width)) if given is None else given, K - 1)
        found = logits(folder, given)[:, :TOKENIZER]
        assert np.abs(found - wanted[-K:, :TOKENIZER]).max() < 1e-4


TOKENIZER = 300
