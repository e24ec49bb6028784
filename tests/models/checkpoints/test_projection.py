"""PARD-2 drafts: what config.json and the projection's file say, and where they contradict one another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import edit_json, make_pard2, save_in_hub_cache, save_safetensors

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.tensors import read_tensor
from pard_onnx.models.errors import BadCheckpoint
from pard_onnx.models.spec import TargetFeatures

Tiny = Callable[..., Path]
NAMES = ("pard2_scale", "pard2_proj_bias", "pard2_target_dim", "pard2_target_layers")
INNER = "pard_warp_model/model.safetensors"


@pytest.fixture
def draft(tmp_path: Path, tiny: Tiny) -> Path:
    return make_pard2(tiny(tmp_path / "draft", "qwen3", "draft"), bias=True)


def features(folder: Path) -> TargetFeatures | None:
    pard = Checkpoint.open(folder).spec.pard
    assert pard is not None
    return pard.features


def refusal(folder: Path) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def test_the_published_layout(draft: Path) -> None:
    checkpoint = Checkpoint.open(draft)
    assert checkpoint.spec.pard is not None
    assert checkpoint.spec.pard.features == TargetFeatures((-1, -2, -3), 192, 0.5, bias=True)
    assert checkpoint.spec.pard.spd_type == "pard2"
    assert checkpoint.tensors["target_proj.weight"].shape == (64, 192)
    assert checkpoint.as_role("target").spec.pard is None


@pytest.mark.parametrize("stored", ("F32", "F16", "BF16"))
def test_both_files_hold_the_same(tmp_path: Path, tiny: Tiny, stored: str) -> None:
    one = make_pard2(tiny(tmp_path / "one", "qwen3", "draft"), bias=True, stored=stored)
    other = make_pard2(tiny(tmp_path / "other", "qwen3", "draft"), bias=True, stored=stored, file=INNER)
    for name in ("target_proj.weight", "target_proj.bias"):
        arrays = [read_tensor(Checkpoint.open(folder).tensors[name]) for folder in (one, other)]
        assert np.array_equal(*arrays)
    make_pard2(one, bias=True, stored="F32", file=INNER)
    if stored == "F32":
        assert features(one) == features(other)
    else:  # rounded in one of them
        assert "hold different projections; remove the one" in refusal(one)


@pytest.mark.parametrize(
    "config",
    (
        {"pard_scale": 0.5, "proj_bias": True, "pard_target_dim": 192, "target_layers": [-1, -2, -3]},
        {"feat_scale": 0.5, "target_layers": [-1, -2, -3]},
        {"feat_scale": 0.5, "target_layers": [-1, -2, -3], "spd_type": "pard", "pard2": ...},
        {"feat_scale": 0.5, "target_layers": [-1, -2, -3], "spd_type": ..., "pard2": ...},
    ),
)
def test_earlier_names_mean_the_same(draft: Path, config: dict[str, Any]) -> None:
    wanted = features(draft)
    edit_json(draft / "config.json", **(dict.fromkeys(NAMES, ...) | config))
    assert features(draft) == wanted


@pytest.mark.parametrize(("ml", "layers"), ((True, (-1, -8, -16, -24)), (False, (-1,))))
def test_ml_says_how_many_layers(draft: Path, ml: bool, layers: tuple[int, ...]) -> None:
    edit_json(draft / "config.json", **dict.fromkeys(NAMES, ...), ml=ml)
    assert features(draft) == TargetFeatures(layers, 192, 0.02, bias=True)


def test_a_draft_without_a_projection_reads_tokens_alone(draft: Path) -> None:
    (draft / "warp_model.bin").unlink()
    assert "pard2_target_layers is there, but neither warp_model.bin nor pard_warp_model" in refusal(draft)
    edit_json(draft / "config.json", **dict.fromkeys(NAMES, ...))
    assert features(draft) is None


def test_a_target_and_a_plain_draft_have_no_features(draft: Path) -> None:
    edit_json(draft / "config.json", pard2=False, spd_type="pard")
    assert features(draft) is None
    edit_json(draft / "config.json", pard_token=..., spd_type=...)
    assert Checkpoint.open(draft).spec.pard is None


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "another width": ({"pard2_target_dim": 256}, r"pard2_target_dim is 256, but target_proj\.weight is \[64, 192\]"),
    "no layers": ({"pard2_target_layers": []}, "pard2_target_layers has 0 layers"),
    "many layers": ({"pard2_target_layers": list(range(-65, 0))}, "has 65 layers; it must have 1 to 64"),
    "layers that are not named": ({"pard2_target_layers": ...}, "pard2_target_layers is missing: whose"),
    "a layer from the front": ({"pard2_target_layers": [-1, 2, -3]}, "has 2; layers are counted from the last one"),
    "a layer that is true": ({"pard2_target_layers": [-1, True, -3]}, "has True; layers"),
    "a layer in text": ({"pard2_target_layers": "-1"}, "has '-1'; layers"),
    "a layer twice": ({"pard2_target_layers": [-1, -2, -1]}, "each layer may be there once"),
    "layers of no size": ({"pard2_target_layers": [-1, -2, -3, -4, -5]}, "192, which 5 target layers of one size"),
    "a scale in text": ({"pard2_scale": "0.02"}, "pard2_scale is '0.02'; it must be a positive number"),
    "a bias in text": ({"pard2_proj_bias": "yes"}, "pard2_proj_bias is 'yes'; it must be true or false"),
    "an unknown kind": ({"spd_type": "eagle"}, "spd_type is 'eagle'; only 'pard' and 'pard2' are supported"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_contradictions_are_refused(draft: Path, fault: str) -> None:
    changes, message = FAULTS[fault]
    edit_json(draft / "config.json", **changes)
    with pytest.raises(BadCheckpoint, match=message):
        Checkpoint.open(draft)


def put(folder: Path, **tensors: tuple[int, ...]) -> None:
    """A projection of tensors of these shapes."""
    (folder / "warp_model.bin").unlink()
    (folder / "pard_warp_model").mkdir()
    save_safetensors(folder / INNER, {f"target_proj.{n}": np.ones(s, np.float32) for n, s in tensors.items()})


def test_tensors_of_another_draft_are_refused(draft: Path) -> None:
    put(draft, weight=(32, 192), bias=(64,))
    assert "hidden_size is 64, but target_proj.weight is [32, 192]" in refusal(draft)


def test_a_bias_that_is_not_there_is_refused(draft: Path) -> None:
    put(draft, weight=(64, 192))
    assert "pard2_proj_bias is true, but" in refusal(draft)


def test_a_bias_of_another_size_is_refused(draft: Path) -> None:
    put(draft, weight=(64, 192), bias=(63,))
    assert "target_proj.bias is [63]; config.json says [64]" in refusal(draft)


def test_a_file_without_the_projection_is_refused(draft: Path) -> None:
    put(draft, bias=(64,))
    assert "has no tensor target_proj.weight" in refusal(draft)


def test_a_bias_that_config_json_switches_off_is_not_read(draft: Path) -> None:
    edit_json(draft / "config.json", pard2_proj_bias=False)
    assert features(draft) == TargetFeatures((-1, -2, -3), 192, 0.5)


def test_a_file_that_is_a_fifo_or_a_link_out_of_the_folder_is_refused(draft: Path, tmp_path: Path) -> None:
    shutil.move(draft / "warp_model.bin", tmp_path / "elsewhere.bin")
    (draft / "warp_model.bin").symlink_to(tmp_path / "elsewhere.bin")
    assert "is a link to" in refusal(draft)
    (draft / "warp_model.bin").unlink()
    (tmp_path / "inner").mkdir()
    (draft / "pard_warp_model").symlink_to(tmp_path / "inner")
    assert "pard_warp_model: is a link" in refusal(draft)


def test_the_hub_cache_keeps_a_folder_of_links(draft: Path, tmp_path: Path) -> None:
    snapshot = save_in_hub_cache(draft, tmp_path / "cache", "amd/PARD2-tiny")
    wanted = features(snapshot)
    assert wanted is not None
    (snapshot / "warp_model.bin").unlink()
    make_pard2(draft, bias=True, file=INNER)
    blob = snapshot.parent.parent / "blobs" / "inner"
    shutil.copyfile(draft / INNER, blob)
    (snapshot / "pard_warp_model").mkdir()
    (snapshot / INNER).symlink_to(Path("../../../blobs/inner"))
    assert features(snapshot) == wanted
    assert json.loads((snapshot / "config.json").read_text(encoding="utf-8"))["pard2"] is True
