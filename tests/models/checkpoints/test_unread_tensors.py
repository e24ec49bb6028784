"""Tensors of a checkpoint that are no part of its model are told of, as transformers does; none changes it silently."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantized
from safetensors.numpy import load_file, save_file
from tiny import edit_json

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadCheckpoint, PardWarning
from pard_onnx.models.families import FAMILIES

Tiny = Callable[..., Path]


def add(folder: Path, **tensors: np.ndarray) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, {"format": "pt"})


def unread(folder: Path) -> list[str]:
    """The warnings of opening the checkpoint."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Checkpoint.open(folder)
    assert all(one.category is PardWarning for one in caught)
    return [str(one.message) for one in caught]


LAYER = "model.layers.1"
EXTRAS = {
    "a bias that config.json does not announce": f"{LAYER}.self_attn.o_proj.bias",
    "a norm of another family": f"{LAYER}.self_attn.sub_norm.weight",
    "a layer too many": "model.layers.2.input_layernorm.weight",
    "another module": "model.visual.patch.weight",
    "a module beside the model": "score.weight",
    "another type": f"{LAYER}.mlp.experts.0.scale",
    "rotary frequencies": f"{LAYER}.self_attn.rotary_emb.inv_freq",
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("extra", EXTRAS)
def test_the_names_are_those_that_transformers_warns_of(extra: str, family: str, tiny: Tiny, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder, name = tiny(tmp_path, family), EXTRAS[extra]
    assert unread(folder) == []
    add(folder, **{name: np.ones(64, np.int8 if "scale" in name else np.float32)})
    _, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    found = unread(folder)
    told = extra != "rotary frequencies" or family == "gemma3_text"  # which computes two kinds under other names
    assert len(found) == len(info["unexpected_keys"]) == told
    for message, key in zip(found, info["unexpected_keys"], strict=True):
        assert f": {key};" in message and key == name and "\n" not in message


def test_many_names_are_one_line(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(tmp_path)
    add(folder, **{f"model.layers.{i}.input_layernorm.weight": np.ones(64, np.float32) for i in range(2, 12)})
    (message,) = unread(folder)
    assert "model.layers.10.input_layernorm.weight, model.layers.11" in message and "and 7 more" in message


def test_biases_of_zeros_are_nothing_to_tell_of(tmp_path: Path) -> None:
    """GPTQ tools write them for every matrix."""
    folder, truth = quantized.write(tmp_path, "gptq", family="llama")
    add(folder, **{f"{name}.bias": np.zeros(len(matrix.levels), np.float16) for name, matrix in truth.items()})
    assert unread(folder) == []
    add(folder, **{f"{next(iter(truth))}.bias": np.ones(64, np.float16)})
    assert len(unread(folder)) == 1


@pytest.mark.parametrize("end", ("lora_A.weight", "lora_B.default.weight", "qweight", "weight_packed"))
def test_what_makes_another_model_is_refused(end: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(tmp_path)
    name = f"{LAYER}.self_attn.q_proj.{end}"
    add(folder, **{name: np.ones((8, 64), np.int32)})
    with pytest.raises(BadCheckpoint, match=f"tensor {name} would be left out"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("layout", quantized.LAYOUTS)
def test_all_parts_of_a_quantized_checkpoint_are_read(layout: str, tmp_path: Path) -> None:
    assert unread(quantized.write(tmp_path, layout, group=32)[0]) == []


@pytest.mark.parametrize("family", ("llama", "gemma3_text"))
@pytest.mark.parametrize("layout", ("gptq", "awq", "compressed-tensors"))
def test_a_quantized_head_beside_a_tied_config_is_taken(layout: str, family: str, tmp_path: Path) -> None:
    folder, _ = quantized.write(tmp_path, layout, family=family, quantized_head=True)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    checkpoint = Checkpoint.open(folder)
    assert not checkpoint.spec.tied
    assert "lm_head" in checkpoint.packed
    assert unread(folder) == []


def test_a_quantized_head_that_config_json_does_not_announce_is_refused(tmp_path: Path) -> None:
    folder, _ = quantized.write(tmp_path, "gptq", quantized_head=True)
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    held = load_file(folder / "model.safetensors")
    floats = {name: array for name, array in held.items() if name.startswith("lm_head") or array.dtype == np.float16}
    quantized_parts = [name for name in held if name.endswith("qweight") and name.startswith("model")]
    assert quantized_parts and floats
    edit_json(folder / "config.json", quantization_config=..., tie_word_embeddings=True)
    with pytest.raises(BadCheckpoint):
        Checkpoint.open(folder)
    assert values["quantization_config"]
