"""Metadata of GGUF files: the same spec as of the checkpoint in transformers' form; what is not supported is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
from tiny import LLAMA3, YARN, edit_json

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadCheckpoint
from pard_onnx.models.spec import Llama3Scaling, ModelSpec

Tiny = Callable[..., Path]
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "smollm3", "gemma3_text")


def specs(tmp_path: Path, folder: Path, **options: Any) -> tuple[ModelSpec, ModelSpec]:
    """Of the GGUF file, and of the folder; without what GGUF has no words for."""
    path = tmp_path / "model.gguf"
    edit_json(folder / "generation_config.json", eos_token_id=[299, 297])  # <|endoftext|> ends texts in llama.cpp
    truth = Checkpoint.open(gguf_files.write(path, folder, **options)).spec
    return Checkpoint.open(path).spec, replace(truth, family="llama" if truth.family == "mistral" else truth.family)


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tiny: Tiny, tmp_path: Path, family: str, tied: bool) -> None:
    folder = tiny(tmp_path / "tiny", family, tied=tied, layers=8, rms_norm_eps=1e-5, bos_token_id=1)
    if family == "smollm3":  # llama.cpp knows no other places of layers without rotary embedding
        edit_json(folder / "config.json", no_rope_layers=[1, 1, 1, 0] * 2)
    if family == "gemma3_text":
        kinds = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 2
        edit_json(folder / "config.json", layer_types=kinds, query_pre_attn_scalar=16)
    found, truth = specs(tmp_path, folder)
    assert truth == found


@pytest.mark.parametrize("head_dim", (16, 64, 128))
@pytest.mark.parametrize(
    "own", ({}, {"factor": 32.0}, {"high_freq_factor": 2.5, "original_max_position_embeddings": 512})
)
def test_llama3_scaling_is_read_from_its_factors(
    tiny: Tiny, tmp_path: Path, head_dim: int, own: Mapping[str, float]
) -> None:
    rope = {**LLAMA3, **own}
    folder = tiny(tmp_path / "tiny", "llama", rope=rope, head_dim=head_dim, max_positions=131072)
    factors = gguf_files.rope_factors(rope, head_dim)
    found, _ = specs(tmp_path, folder, tensors={"rope_freqs.weight": factors})
    scaling = found.rope.llama3
    assert isinstance(scaling, Llama3Scaling) and found.rope.theta == rope["rope_theta"]
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    again = {"rope_theta": found.rope.theta, **{key: getattr(scaling, key) for key in keys}}
    np.testing.assert_allclose(gguf_files.rope_factors(again, head_dim), factors, rtol=1e-4)


def test_factors_of_one_change_nothing(tiny: Tiny, tmp_path: Path) -> None:
    found, truth = specs(tmp_path, tiny(tmp_path / "tiny", "llama"), tensors={"rope_freqs.weight": np.ones(8, "f4")})
    assert truth == found


def test_other_factors_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    for number, factors in enumerate(
        ([1, 4, 2, 8, 8, 8, 8, 8], [1, 1, 1, 0.5, 1, 1, 1, 1], [1] * 7, [1] * 7 + [np.nan])
    ):
        path = tmp_path / f"{number}.gguf"
        tensors = {"rope_freqs.weight": np.array(factors, np.float32)}
        gguf_files.write(path, tiny(tmp_path / str(number), "llama"), tensors=tensors)
        with pytest.raises(BadCheckpoint, match=r"the factors in rope_freqs.weight are not Llama 3's"):
            Checkpoint.open(path)


def test_yarn(tiny: Tiny, tmp_path: Path) -> None:
    for family in ("llama", "qwen2", "qwen3"):
        (tmp_path / family).mkdir()
        found, truth = specs(tmp_path / family, tiny(tmp_path / f"{family}.tiny", family, rope=YARN))
        assert truth == found and found.rope.yarn is not None


@pytest.mark.parametrize("mask", ("pard_token", "mask_token_id"))
def test_a_mask_id_makes_a_draft(tiny: Tiny, tmp_path: Path, mask: str) -> None:
    folder = tiny(tmp_path / "tiny", "qwen2", "draft")
    path = tmp_path / "draft.gguf"
    gguf_files.write(path, folder, metadata={f"qwen2.{mask}": 301})
    spec = Checkpoint.open(path).spec
    assert spec.role == "draft" and spec.pard is not None and spec.pard.mask_id == 301
    target = tmp_path / "target.gguf"
    gguf_files.write(target, folder)
    assert Checkpoint.open(target).spec.role == "target"
    with pytest.raises(BadCheckpoint, match=rf"{target}: a draft without a mask id: none of pard_token"):
        Checkpoint.open(target).as_role("draft")


def test_biases_in_llama_are_qwen2s(tiny: Tiny, tmp_path: Path) -> None:
    found, truth = specs(tmp_path, tiny(tmp_path / "tiny", "qwen2"), architecture="llama")
    assert truth == found


def test_a_head_dimension_of_its_own(tiny: Tiny, tmp_path: Path) -> None:
    found, truth = specs(tmp_path, tiny(tmp_path / "tiny", "qwen3", head_dim=32))
    assert truth == found
    absent = {
        "qwen3.attention.key_length": None,
        "qwen3.attention.value_length": None,
        "qwen3.rope.dimension_count": None,
    }
    (tmp_path / "plain").mkdir()
    found, truth = specs(tmp_path / "plain", tiny(tmp_path / "plain.tiny", "qwen3"), metadata=absent)
    assert truth == found  # hidden / heads


REFUSED = {
    "general.architecture": ("qwen2moe", "general.architecture is 'qwen2moe'; supported: llama, qwen2, qwen3, smollm3"),
    "llama.rope.scaling.type": ("longrope", "llama.rope.scaling.type is 'longrope'; supported: none, yarn"),
    "llama.rope.scaling.factor": (2.0, "llama.rope.scaling.factor is 2, of linear scaling; supported: none, yarn"),
    "llama.rope.scale_linear": (4.0, "llama.rope.scaling.factor is 4, of linear scaling"),
    "llama.rope.dimension_count": (8, "llama.rope.dimension_count is 8, of 16; only whole-head rotation is supported"),
    "llama.attention.value_length": (
        8,
        "llama.attention.value_length is 8, and the keys' length is 16; they must be equal",
    ),
    "llama.expert_count": (8, "llama.expert_count is 8, which is not supported"),
    "llama.attention.scale": (0.5, "llama.attention.scale is 0.5; only 1 / sqrt(16) is supported"),
    "llama.attention.causal": (False, "llama.attention.causal is false; only causal attention is supported"),
    "llama.attention.head_count_kv": ([2, 4], "llama.attention.head_count_kv differs from layer to layer"),
    "llama.attention.sliding_window": (64, "sliding_window is 64; only full attention is supported"),
    "llama.logit_scale": (8.0, "llama.logit_scale is 8.0, which is not supported"),
    "llama.block_count": (None, "llama.block_count is missing"),
    "llama.context_length": ("long", "llama.context_length is 'long'; it must be a whole number, at least 1"),
    "llama.attention.layer_norm_rms_epsilon": (0.0, "epsilon is 0.0; it must be a positive number"),
    "llama.embedding_length": (32, "tensor token_embd.weight is [320, 64]; the metadata says [320, 32]"),
    "llama.pard_token": (400, "pard_token is 400, outside the vocabulary of 320 rows"),
    "general.alignment": (48, "general.alignment is 48; it must be a power of two"),
    "tokenizer.ggml.model": ("bert", "tokenizer.ggml.model is 'bert'; supported: gpt2, llama"),
    "tokenizer.ggml.pre": ("qwen3", "tokenizer.ggml.pre is 'qwen3'; supported: llama-bpe"),
    "tokenizer.ggml.merges": (None, "tokenizer.ggml.merges is missing; convert the model again"),
    "tokenizer.ggml.tokens": ([1, 2], "tokenizer.ggml.tokens is no list of texts; convert the model again"),
    "tokenizer.ggml.token_type": ([1, 1], "tokenizer.ggml.token_type is no list of 320 numbers, one a token"),
    "tokenizer.ggml.eos_token_id": (400, "tokenizer.ggml.eos_token_id is 400, outside the vocabulary of 320 rows"),
    "tokenizer.chat_template": (7, "tokenizer.chat_template is no text in UTF-8"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_refused_is_named(tiny: Tiny, tmp_path: Path, key: str) -> None:
    value, message = REFUSED[key]
    path = tmp_path / "model.gguf"
    gguf_files.write(path, tiny(tmp_path / "tiny", "llama"), metadata={key: value})
    with pytest.raises(BadCheckpoint) as caught:
        Checkpoint.open(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_tensors_of_another_model_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    vector, matrix = np.zeros(64, np.float32), np.zeros((64, 64), np.float32)
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "unknown": (
            {"blk.0.ffn_gate_inp.weight": matrix},
            "tensor blk.0.ffn_gate_inp.weight is none of a llama model's",
        ),
        "bias": ({"blk.0.attn_output.bias": vector}, "has blk.0.attn_output.bias, which a llama model"),
        "layer": ({"blk.2.attn_norm.weight": vector}, "has blk.2.attn_norm.weight, which a llama model"),
        "absent": (
            {"blk.1.ffn_up.weight": None},
            "no tensor blk.1.ffn_up.weight; a llama checkpoint needs",
        ),
        "shape": (
            {"blk.1.ffn_up.weight": matrix},
            "tensor blk.1.ffn_up.weight is [64, 64]; the metadata says [96, 64]",
        ),
        "rows": ({"blk.1.attn_q.weight": matrix[:60]}, "attn_q.weight is [60, 64], whose rows are not 4 heads"),
        "embedding": ({"token_embd.weight": None}, "has no tensor token_embd.weight; convert the model again"),
    }
    for name, (tensors, message) in cases.items():
        path = tmp_path / f"{name}.gguf"
        gguf_files.write(path, tiny(tmp_path / name, "llama"), tensors=tensors)
        with pytest.raises(BadCheckpoint) as caught:
            Checkpoint.open(path)
        assert message in str(caught.value) and str(path) in str(caught.value)


def test_the_folder_is_what_transformers_reads(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    gguf_files.write(path, tiny(tmp_path / "tiny", "llama"))
    folder = Checkpoint.open(path).folder
    assert folder == Checkpoint.open(path).folder
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["tie_word_embeddings"]) == (["LlamaForCausalLM"], False)
    assert sorted(f.name for f in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
