"""Configs of each family's own kind: windows, layers without rotary embedding, YaRN, defaults, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import YARN, edit_json, save_json, save_safetensors, weights

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.tensors import rounded
from pard_onnx.models.errors import BadCheckpoint
from pard_onnx.models.records import from_json, to_json
from pard_onnx.models.spec import LayerAttention, ModelSpec, Rope, Yarn

Tiny = Callable[..., Path]
FULL, UNTURNED = LayerAttention(), LayerAttention(rotary=None)
WINDOWED = LayerAttention(8, "window_rope")
OLD_YARN = {"type": "yarn", "factor": 4.0}


def opened(tiny: Tiny, folder: Path, family: str, layers: int = 2, **changes: Any) -> ModelSpec:
    tiny(folder, family, layers=layers)
    edit_json(folder / "config.json", **changes)
    return Checkpoint.open(folder).spec


def refusal(tiny: Tiny, folder: Path, family: str, **changes: Any) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        opened(tiny, folder, family, **changes)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(str(folder / "config.json"))
    return text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (WINDOWED, FULL, WINDOWED, FULL)),
        ({"layer_types": ...}, (WINDOWED,) * 4),  # every sixth layer is full
        ({"layer_types": None, "sliding_window_pattern": 2}, (WINDOWED, FULL, WINDOWED, FULL)),
        ({"layer_types": ..., "sliding_window_pattern": 1}, ()),
        ({"layer_types": ["full_attention"] * 4}, ()),
        ({"sliding_window": ...}, (LayerAttention(4096, "window_rope"), FULL) * 2),
    ],
)
def test_windows_of_gemma3(tiny: Tiny, tmp_path: Path, changes: dict[str, Any], expected: tuple[Any, ...]) -> None:
    spec = opened(tiny, tmp_path, "gemma3_text", 4, **changes)
    assert expected == spec.attention
    assert spec.attention_of(3) == (expected[3] if expected else FULL)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (Rope(10_000.0), Rope(100.0))),
        ({"rope_parameters": ...}, (Rope(1e6), Rope(1e4))),
        ({"rope_parameters": ..., "rope_theta": 5e5, "rope_local_base_freq": 7}, (Rope(5e5), Rope(7.0))),
        (
            {"rope_parameters": ..., "rope_scaling": OLD_YARN | {"original_max_position_embeddings": 64}},
            (Rope(1e6, yarn=Yarn(4.0, 64)), Rope(1e4)),
        ),
    ],
)
def test_rotary_rules_of_gemma3(tiny: Tiny, tmp_path: Path, changes: dict[str, Any], expected: tuple[Any, Any]) -> None:
    spec = opened(tiny, tmp_path, "gemma3_text", **changes)
    assert expected == (spec.rope, spec.window_rope)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_embeddings_factor_is_rounded_as_the_checkpoint_is(tiny: Tiny, tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    for hidden in (48, 64, 80):
        folder = tiny(tmp_path / str(hidden), "gemma3_text", dtype=dtype, hidden=hidden)
        expected = float(torch.tensor(hidden**0.5).to(getattr(torch, dtype)))
        assert expected == Checkpoint.open(folder).spec.embedding_scale == rounded(hidden**0.5, dtype)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (UNTURNED, FULL, UNTURNED, FULL)),
        ({"no_rope_layers": ...}, (FULL, FULL, FULL, UNTURNED)),
        ({"no_rope_layers": None, "no_rope_layer_interval": 2}, (FULL, UNTURNED) * 2),
        ({"no_rope_layers": [1, 1, 1, 1, 0]}, ()),
    ],
)
def test_layers_without_rotary_embedding(
    tiny: Tiny, tmp_path: Path, changes: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    assert expected == opened(tiny, tmp_path, "smollm3", 4, **changes).attention


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 512}, {"sliding_window": 4096}, {"sliding_window": ...}])
def test_mistral_without_a_window_that_matters(tiny: Tiny, tmp_path: Path, changes: dict[str, Any]) -> None:
    spec = opened(tiny, tmp_path, "mistral", head_dim=None, **changes)
    assert (spec.head_dim, spec.attention) == (16, ())


@pytest.mark.parametrize(
    ("family", "tied", "head_dim", "theta", "eos", "bos"),
    [
        ("mistral", False, 16, 1e4, (2,), 1),
        ("smollm3", True, 16, 2e6, (128_001,), 128_000),
        ("gemma3_text", True, 256, 1e6, (1,), 2),
    ],
)
def test_defaults_are_those_of_transformers(
    tiny: Tiny, tmp_path: Path, family: str, tied: bool, head_dim: int, theta: float, eos: tuple[int], bos: int
) -> None:
    transformers = pytest.importorskip("transformers")
    tiny(tmp_path, family, head_dim=head_dim, tied=tied)
    (tmp_path / "generation_config.json").unlink()
    edit_json(
        tmp_path / "config.json",
        **dict.fromkeys(("tie_word_embeddings", "head_dim", "rope_parameters", "eos_token_id", "bos_token_id"), ...),
    )
    spec, config = Checkpoint.open(tmp_path).spec, transformers.AutoConfig.from_pretrained(tmp_path)
    assert (tied, head_dim, theta) == (spec.tied, spec.head_dim, spec.rope.theta)
    assert (eos, bos) == (spec.vocabulary.eos_ids, spec.vocabulary.bos_id)
    assert (config.tie_word_embeddings, config.eos_token_id, config.bos_token_id) == (tied, eos[0], bos)
    rope = config.rope_parameters
    assert rope.get("full_attention", rope)["rope_theta"] == theta
    assert (getattr(config, "head_dim", None) or 64 // 4) == head_dim


@pytest.mark.parametrize(
    ("changes", "expected", "positions"),
    [
        ({"rope_parameters": YARN}, Yarn(4.0, 64), 512),  # max_position_embeddings says more
        ({"rope_parameters": YARN | {"original_max_position_embeddings": 512}}, Yarn(4.0, 512), 2048),
        ({"rope_parameters": ..., "rope_theta": 1e4, "rope_scaling": OLD_YARN}, Yarn(4.0, 512), 2048),
        ({"rope_parameters": YARN, "original_max_position_embeddings": 256}, Yarn(4.0, 256), 1024),
        (
            {"rope_parameters": YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False, "attention_factor": 1.5}},
            Yarn(4.0, 64, 16.0, 2.0, 1.5, truncate=False),
            512,
        ),
        (
            {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
            Yarn(4.0, 64, mscale=1.0, mscale_all_dim=0.5),
            512,
        ),
    ],
)
def test_yarn(tiny: Tiny, tmp_path: Path, changes: dict[str, Any], expected: Yarn, positions: int) -> None:
    spec = opened(tiny, tmp_path, "qwen2", **changes)
    assert (Rope(10_000.0, yarn=expected), positions) == (spec.rope, spec.max_positions)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; gemma3_text checkpoints"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0; gemma3_text checkpoints"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ("gemma3_text", {"attention_bias": True}, "attention_bias is true"),
        ("gemma3_text", {"hidden_activation": "silu"}, "hidden_activation is 'silu'; only 'gelu_pytorch_tanh'"),
        (
            "gemma3_text",
            {"layer_types": ["full_attention"]},
            "layer_types is ['full_attention']; it must be a list of 2",
        ),
        (
            "gemma3_text",
            {"layer_types": ["full_attention", "chunked_attention"]},
            "layer_types has 'chunked_attention'",
        ),
        ("gemma3_text", {"sliding_window": 0}, "sliding_window is 0; it must be a whole number, at least 1"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters.rope_type is not a kind of"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}},
            "rope_parameters.full_attention.rope_type is 'linear'; supported:",
        ),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers is [1]; it must be a list of 0 and 1"),
        ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers is [1, 2]; it must be"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window is 64; only full attention"),
        ("mistral", {"sliding_window": 64}, "sliding_window is 64; only full attention is supported"),
        ("mistral", {"sliding_window": ..., "max_position_embeddings": 8192}, "sliding_window is 4096; only full"),
        ("mistral", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ("qwen2", {"rope_parameters": YARN | {"factor": 0.5}}, "rope_parameters.factor is 0.5; YaRN stretches by at"),
        ("qwen2", {"rope_parameters": YARN | {"factor": None}}, "rope_parameters.factor is missing"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "longrope"}},
            "rope_parameters.rope_type is 'longrope'; supported:",
        ),
    ],
)
def test_refused(tiny: Tiny, tmp_path: Path, family: str, changes: dict[str, Any], message: str) -> None:
    assert f"config.json: {message}" in refusal(tiny, tmp_path, family, **changes)


def test_a_tensor_of_a_family_that_is_not_there(tiny: Tiny, tmp_path: Path) -> None:
    tiny(tmp_path, "gemma3_text")
    tensors = weights(json.loads((tmp_path / "config.json").read_text()))
    del tensors["model.layers.1.post_feedforward_layernorm.weight"]
    save_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(BadCheckpoint, match=r"no tensor model\.layers\.1\.post_feedforward_layernorm\.weight"):
        Checkpoint.open(tmp_path)


def test_manifests_of_before_are_read(tiny: Tiny, tmp_path: Path) -> None:
    """Those that were written without the fields that came with these families."""
    spec = opened(tiny, tmp_path / "new", "gemma3_text")
    assert spec == from_json(ModelSpec, json.loads(json.dumps(to_json(spec))))
    plain = opened(tiny, tmp_path / "old", "llama")
    written = to_json(plain)
    for name in ("attention", "window_rope", "embedding_scale", "norm_offset", "norms", "mlp_norm"):
        del written[name]
    del written["rope"]["yarn"]
    assert plain == from_json(ModelSpec, written)


def test_gemmas_tokenizer_has_an_id_that_its_text_models_have_not(tiny: Tiny, tmp_path: Path) -> None:
    """<image_soft_token>, one past the embedding's rows."""
    tiny(tmp_path, "gemma3_text", vocab_rows=300)
    value = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    value["added_tokens"].append(value["added_tokens"][0] | {"id": 300, "content": "<image_soft_token>"})
    save_json(tmp_path / "tokenizer.json", value)
    assert (
        Checkpoint.open(tmp_path).spec.vocabulary.rows,
        Checkpoint.open(tmp_path).spec.vocabulary.size,
    ) == (300, 300)


def test_rounding_to_bfloat16_is_to_even() -> None:
    assert rounded(1 + 2**-8, "bfloat16") == 1.0 and rounded(1 + 3 * 2**-8, "bfloat16") == 1 + 2**-6
    assert rounded(0.1, "float32") == float(np.float32(0.1)) and rounded(33.94, "bfloat16") == 34.0
