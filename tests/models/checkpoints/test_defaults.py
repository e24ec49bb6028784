"""Keys that config.json leaves out: each means what the family's config class in transformers says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import edit_json

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadCheckpoint
from pard_onnx.models.families import FAMILIES

Tiny = Callable[..., Path]
KV_HEADS = {"llama": 32, "qwen2": 32, "qwen3": 32, "mistral": 8, "smollm3": 4, "gemma3_text": 4}


def refusal(folder: Path) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_kv_heads(tiny: Tiny, tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    tiny(tmp_path, family, heads=32, kv_heads=KV_HEADS[family], head_dim=4)
    edit_json(tmp_path / "config.json", num_key_value_heads=...)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert KV_HEADS[family] == config.num_key_value_heads == Checkpoint.open(tmp_path).spec.kv_heads


@pytest.mark.parametrize("family", FAMILIES)
def test_kv_heads_that_are_null(tiny: Tiny, tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    tiny(tmp_path, family, heads=4, kv_heads=4)
    edit_json(tmp_path / "config.json", num_key_value_heads=None)
    if family in ("mistral", "gemma3_text"):
        with pytest.raises(Exception, match="num_key_value_heads"):
            transformers.AutoConfig.from_pretrained(tmp_path)
        assert f"num_key_value_heads is None, which transformers refuses for {family}" in refusal(tmp_path)
    else:
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        assert 4 == config.num_key_value_heads == Checkpoint.open(tmp_path).spec.kv_heads


def test_a_default_that_does_not_divide_the_heads(tiny: Tiny, tmp_path: Path) -> None:
    tiny(tmp_path, "qwen2", heads=4, kv_heads=4)
    edit_json(tmp_path / "config.json", num_key_value_heads=...)
    problem = "num_key_value_heads is missing, and qwen2's default is 32, which does not divide 4 heads"
    assert f"config.json: {problem}" in refusal(tmp_path)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize(
    ("changes", "full"),
    [
        ({"sliding_window": 64, "use_sliding_window": ..., "max_window_layers": 0}, True),
        ({"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0}, False),
        ({"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, True),
    ],
)
def test_windows(tiny: Tiny, tmp_path: Path, family: str, changes: dict[str, Any], full: bool) -> None:
    transformers = pytest.importorskip("transformers")
    tiny(tmp_path, family)
    edit_json(tmp_path / "config.json", **changes)
    kinds = set(transformers.AutoConfig.from_pretrained(tmp_path).layer_types)
    assert (kinds == {"full_attention"}) == full
    if full:
        Checkpoint.open(tmp_path)
    else:
        assert "sliding_window is 64; only full attention is supported" in refusal(tmp_path)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_window_that_is_used_and_not_named(tiny: Tiny, tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    tiny(tmp_path, family, max_positions=8192)
    edit_json(tmp_path / "config.json", use_sliding_window=True, max_window_layers=0)
    assert transformers.AutoConfig.from_pretrained(tmp_path).sliding_window == 4096
    assert "sliding_window is 4096; only full attention is supported" in refusal(tmp_path)
