"""P-EAGLE checkpoints: what is read of both published layouts, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import edit_json, make_peagle, save_safetensors

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadCheckpoint
from pard_onnx.models.spec import Pard, TargetFeatures

Tiny = Callable[..., Path]


@pytest.mark.parametrize("speculators", [False, True])
def test_both_layouts_are_the_same_draft(tmp_path: Path, tiny: Tiny, speculators: bool) -> None:
    folder = make_peagle(tiny(tmp_path / "draft", "llama", "draft"), layers=(2, 9, 20), speculators=speculators)
    opened = Checkpoint.open(folder)
    features = TargetFeatures((2, 9, 20), 192, scale=1.0, join="concat")
    assert opened.spec.pard == Pard(300, "p-eagle", features)
    assert features.layers_of(24) == (-23, -16, -5)
    assert opened.tensors["mask_hidden"].shape == (192,)
    assert opened.tensors["model.layers.0.self_attn.k_proj.weight"].shape == (32, 128)
    assert opened.tensors["model.layers.1.self_attn.k_proj.weight"].shape == (32, 64)


@pytest.mark.parametrize("speculators", [False, True])
def test_the_residual_is_not_normed_where_no_key_says_it(tmp_path: Path, tiny: Tiny, speculators: bool) -> None:
    """The default of `PEagleSpeculatorConfig`, and of vLLM for both layouts."""
    folder = make_peagle(tiny(tmp_path / "draft", "llama", "draft"), speculators=speculators, norm_before_residual=True)
    assert _features(folder).norm_before_residual
    for absent in (None, ...):
        edit_json(folder / "config.json", norm_before_residual=absent)
        assert not _features(folder).norm_before_residual


def test_layers_are_in_rising_order_whatever_the_config_says(tmp_path: Path, tiny: Tiny) -> None:
    """vLLM collects hidden states from layer to layer."""
    folder = make_peagle(tiny(tmp_path / "draft", "llama", "draft"), layers=(20, 2, 9, 0))
    assert _features(folder).layers == (0, 2, 9, 20)


@pytest.mark.parametrize("speculators", [False, True])
def test_a_draft_may_have_the_layers_of_qwen3(tmp_path: Path, tiny: Tiny, speculators: bool) -> None:
    opened = Checkpoint.open(make_peagle(tiny(tmp_path / "draft", "qwen3", "draft"), speculators=speculators))
    assert opened.spec.family == "qwen3" and opened.spec.pard and opened.spec.pard.spd_type == "p-eagle"
    assert opened.tensors["model.layers.0.self_attn.q_norm.weight"].shape == (16,)


def _features(folder: Path) -> TargetFeatures:
    pard = Checkpoint.open(folder).spec.pard
    assert pard and pard.features
    return pard.features


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"ptd_token_id": None}, "mask_token_id is missing: an EAGLE-3 draft without it proposes token by token"),
        ({"eagle_aux_hidden_state_layer_ids": None}, "eagle_aux_hidden_state_layer_ids is missing: whose hidden"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, r"is \[64, 192\]; config.json says \[64, 128\]"),
        ({"eagle_aux_hidden_state_layer_ids": []}, "must be a list of different layers"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 1, 2]}, "a list of different layers"),
        ({"eagle_aux_hidden_state_layer_ids": [-1, 1, 2]}, "counted from 0"),
        ({"eagle_aux_hidden_state_layer_ids": [True, 1, 2]}, "a list of different layers"),
        ({"eagle_aux_hidden_state_layer_ids": "all"}, "is 'all'"),
        ({"draft_vocab_size": 100}, "draft_vocab_size is 100, and vocab_size 320"),
        ({"target_hidden_size": 32}, r"target_proj.weight is \[64, 192\]; config.json says \[64, 96\]"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'; P-EAGLE drafts are llama or qwen3"),
        ({"norm_before_fc": True}, "norm_before_fc is true; only drafts without a norm before the projection"),
        ({"fc_norm": True}, "fc_norm is true; only drafts without a norm before the projection"),
        ({"fc_norm": 1}, "fc_norm is 1; it must be true or false"),
        ({"norm_before_residual": "yes"}, "norm_before_residual is 'yes'; it must be true or false"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state is false"),
        ({"speculators_model_type": "eagle3"}, "speculators_model_type is 'eagle3'; only 'peagle'"),
        ({"speculators_model_type": "peagle"}, "transformer_layer_config is missing"),
        ({"dflash_config": {"block_size": 16}}, "dflash_config says DFlash, which is not supported yet"),
        ({"speculators_model_type": "dflash"}, "says DFlash"),
    ),
)
def test_a_config_of_another_draft_is_refused(
    tmp_path: Path, tiny: Tiny, changes: dict[str, Any], message: str
) -> None:
    folder = make_peagle(tiny(tmp_path / "draft", "llama", "draft"))
    edit_json(folder / "config.json", **changes)
    with pytest.raises(BadCheckpoint, match=message):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("dropped", "message"),
    (
        ("mask_hidden", "no tensor mask_hidden"),
        ("fc.weight", "no tensor target_proj.weight"),
        ("embed_tokens.weight", "no tensor embed_tokens.weight in its safetensors; copy the target's"),
        ("midlayer.hidden_norm.weight", "no tensor model.layers.0.hidden_norm.weight"),
    ),
)
def test_missing_tensors_are_named(tmp_path: Path, tiny: Tiny, dropped: str, message: str) -> None:
    folder = make_peagle(tiny(tmp_path / "draft", "llama", "draft"))
    tensors = load_file(folder / "model.safetensors")
    del tensors[dropped]
    save_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(BadCheckpoint, match=message):
        Checkpoint.open(folder)


def test_a_vocabulary_of_its_own_is_refused(tmp_path: Path, tiny: Tiny) -> None:
    folder = make_peagle(tiny(tmp_path / "draft", "llama", "draft"))
    tensors = load_file(folder / "model.safetensors")
    save_safetensors(folder / "model.safetensors", tensors | {"d2t": np.zeros(320, np.float32)})
    with pytest.raises(BadCheckpoint, match="tensor d2t: a P-EAGLE draft with a vocabulary of its own"):
        Checkpoint.open(folder)
