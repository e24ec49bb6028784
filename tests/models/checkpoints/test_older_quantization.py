"""Older and rarer places and forms of what says how a checkpoint is quantized."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized
from tiny import edit_json, save_json

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadCheckpoint


def described(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return value


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("named", (False, True))
def test_gptqs_own_file(tmp_path: Path, layout: str, named: bool) -> None:
    folder, _ = quantized.write(tmp_path, layout)
    expected, value = Checkpoint.open(folder), described(folder)
    if not named:
        del value["quant_method"]
    edit_json(folder / "config.json", quantization_config=...)
    save_json(folder / "quantize_config.json", value)
    assert expected == Checkpoint.open(folder)
    save_json(folder / "quantize_config.json", value | {"bits": 3})
    with pytest.raises(BadCheckpoint, match=r"quantize_config\.json: bits is 3; integer weights of 4 and 8"):
        Checkpoint.open(folder)


def test_config_json_comes_before_the_file(tmp_path: Path) -> None:
    folder, _ = quantized.write(tmp_path, "awq")
    expected = Checkpoint.open(folder)
    save_json(folder / "quantize_config.json", {"bits": 3, "group_size": 128})
    assert expected == Checkpoint.open(folder)


def test_a_file_beside_floats_is_a_leftover(tiny: Callable[..., Path], tmp_path: Path) -> None:
    expected = Checkpoint.open(tiny(tmp_path))
    save_json(tmp_path / "quantize_config.json", {"bits": 4, "group_size": 128})
    assert expected == Checkpoint.open(tmp_path)


@pytest.mark.parametrize("named", (False, True))
def test_compression_config(tmp_path: Path, named: bool) -> None:
    transformers = pytest.importorskip("transformers")
    folder, _ = quantized.write(tmp_path, "compressed-tensors")
    expected, value = Checkpoint.open(folder), described(folder)
    if not named:
        del value["quant_method"]
    edit_json(folder / "config.json", quantization_config=..., compression_config=value)
    assert expected == Checkpoint.open(folder)
    assert transformers.AutoConfig.from_pretrained(folder).vocab_size == 320
    edit_json(folder / "config.json", compression_config=value | {"format": "float-quantized"})
    with pytest.raises(BadCheckpoint, match=r"config\.json: compression_config\.format is 'float-quantized'"):
        Checkpoint.open(folder)


def test_mixed_precision_of_packed_groups(tmp_path: Path) -> None:
    folder, _ = quantized.write(tmp_path, "compressed-tensors")
    expected, value = Checkpoint.open(folder), described(folder)
    group = value["config_groups"]["group_0"]

    def write(*forms: str | None) -> None:
        groups = {f"group_{index}": group | {"format": form} for index, form in enumerate(forms)}
        mixed = value | {"format": "mixed-precision", "config_groups": groups}
        edit_json(folder / "config.json", quantization_config=mixed)

    write("pack-quantized")
    assert expected == Checkpoint.open(folder)
    write("pack-quantized", "pack-quantized")
    assert expected.packed == Checkpoint.open(folder).packed
    for other in ("float-quantized", None):
        write("pack-quantized", other)
        problem = rf"config_groups\.group_1\.format is '{other or 'mixed-precision'}'; only 'pack-quantized'"
        with pytest.raises(BadCheckpoint, match=problem):
            Checkpoint.open(folder)
