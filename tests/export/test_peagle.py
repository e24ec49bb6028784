"""P-EAGLE drafts in exported graphs, against a torch reference that follows vLLM's and speculators' published code."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
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
MASK, TOKENIZER, K, TOKENS = 300, 300, 4, 12
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


@slow
@pytest.mark.parametrize(("family", "before"), (("qwen3", True), ("llama", False)))
def test_its_logits_are_those_of_the_speculators_package(
    exported: Exported, family: str, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package itself, where it is installed: its config's defaults, its training's forward pass."""
    config_module = pytest.importorskip("speculators.models.peagle.config", exc_type=ImportError)
    core = pytest.importorskip("speculators.models.peagle.core", exc_type=ImportError)
    eagle = {"norm_before_residual": before, "speculators": True}
    checkpoint, folder = exported(family, "draft", "fp32", peagle=eagle)
    raw = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    raw["transformer_layer_config"] |= {"_attn_implementation": "eager", "pad_token_id": None}
    config = config_module.PEagleSpeculatorConfig(**(raw | {"mask_token_id": MASK}))
    config.transformer_layer_config._attn_implementation = "eager"
    model = core.PEagleDraftModel(config).float().eval()
    held = load_file(checkpoint / "model.safetensors")
    loaded = model.load_state_dict(held, strict=False)
    assert not loaded.unexpected_keys and all("verifier" in name for name in loaded.missing_keys)
    assert not config_module.PEagleSpeculatorConfig.model_fields["norm_before_residual"].default
    features = Manifest.read(folder).spec.pard.features  # type: ignore[union-attr]
    assert features is not None
    given, seen = fed(features.width), {}
    # One chain of masks after the last token; its training draws chains at random
    anchors = torch.tensor([*range(TOKENS), *[TOKENS - 1] * (K - 1)])
    depths = torch.tensor([*[0] * TOKENS, *range(1, K)])
    monkeypatch.setattr(core, "generate_cod_sample_indices", lambda **_: (anchors, depths))
    monkeypatch.setattr(core, "compute_metrics", lambda **found: (seen.update(found), (torch.zeros(()), {}))[1])
    n = TOKENS + K - 1
    masks = partial(model._create_mask_fn, dtype=torch.float32)
    monkeypatch.setattr(model, "_create_mask_fn", masks)
    with torch.inference_mode():
        rows = torch.from_numpy(np.concatenate([given, np.zeros((K - 1, features.width), np.float32)]))[None]
        ids = torch.tensor([*IDS, *[MASK] * (K - 1)])[None]
        hidden = torch.zeros(1, n, model.hidden_size)
        model(rows, ids, torch.zeros(1, n, dtype=torch.long), verifier_last_hidden_states=hidden)
    wanted = seen["logits"][0, -K:, :TOKENIZER].numpy()
    assert np.abs(logits(folder, given)[:, :TOKENIZER] - wanted).max() < 1e-4
