"""Tiny GGUF files in llama.cpp: its logits in floats are torch's of the checkpoint that is read from the same file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import torch
from tiny import LLAMA3

from pard_onnx.export.verify.reference import reference_logits
from pard_onnx.models.checkpoints.checkpoint import Checkpoint

pytestmark = pytest.mark.real
Tiny = Callable[..., Path]
IDS = [5, 17, 250, 3, 99, 99, 41, 8, 120, 7, 64, 200, 33, 12, 9, 77]
SHAPE = {"layers": 6, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab_rows": 320}
SCALED = {**LLAMA3, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tied": True}),
    "llama 3's factors": ("llama", {"rope": SCALED}),
    "llama, YaRN": ("llama", {"rope": LONG}),
    "qwen2": ("qwen2", {}),
    "qwen2 as llama": ("qwen2", {"architecture": "llama"}),
    "qwen2, YaRN": ("qwen2", {"rope": LONG}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "mistral": ("mistral", {}),
    "smollm3": ("smollm3", {"no_rope_layers": None}),
    "gemma3": ("gemma3_text", {"tied": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_llama_cpps(tiny: Tiny, tmp_path: Path, case: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    family, options = CASES[case]
    own = (
        {"layer_types": None, "sliding_window_pattern": 6, "query_pre_attn_scalar": 16}
        if family == "gemma3_text"
        else {}
    )
    if family == "gemma3_text":
        own["layer_types"] = ["sliding_attention"] * 5 + ["full_attention"]
    architecture = options.get("architecture")
    options = {key: value for key, value in options.items() if key != "architecture"}
    folder, path = tiny(tmp_path / "tiny", family, **{**SHAPE, **own, **options}), tmp_path / "model.gguf"
    factors = gguf_files.rope_factors(SCALED, 16) if options.get("rope") is SCALED else None
    tensors = None if factors is None else {"rope_freqs.weight": factors}
    gguf_files.write(path, folder, tensors=tensors, architecture=architecture)
    wanted = reference_logits(Checkpoint.open(path), torch.tensor([IDS]))[0].numpy()
    floats = {"type_k": 0, "type_v": 0, "flash_attn": False}  # of the KV cache
    model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, **floats)
    model.eval(IDS)
    found = np.array(model.scores[: len(IDS)])
    model.close()
    np.testing.assert_allclose(found, wanted, atol=2e-3 * float(wanted.std()))
