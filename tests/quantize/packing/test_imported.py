"""Quantized checkpoints of every layout: the integers are taken bit for bit, in any block of rows."""

from pathlib import Path

import numpy as np
import pytest
import quantized
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny import edit_json

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadCheckpoint
from pard_onnx.quantize.packing.imported import ImportedMatrices, imported_matrices
from pard_onnx.quantize.packing.pack import nibbles

EIGHT_BITS = ("gptq", "gptq_v2", "compressed-tensors", "auto-round", "auto-round gptq")
SORTED = ("gptq", "gptq_v2", "compressed-tensors")
CASES = [
    *((layout, {"symmetric": symmetric}) for layout in quantized.LAYOUTS for symmetric in (False, True)),
    *((layout, {"bits": 8, "symmetric": symmetric}) for layout in EIGHT_BITS for symmetric in (False, True)),
    *((layout, {"sorted_columns": True}) for layout in SORTED),
    *((layout, {"group": -1}) for layout in ("awq", "gptq", "compressed-tensors")),
    ("gptq", {"group": 16}),
    ("gptq", {"quantized_head": True}),
    ("gptq", {"bits": 8, "group": -1, "sorted_columns": True}),
]
WANTED = ("q_proj", "down_proj", "lm_head")  # of layer 0; tests of all matrices export whole models


def opened(folder: Path) -> ImportedMatrices:
    found = imported_matrices(Checkpoint.open(folder))
    assert found is not None
    return found


def levels_of(packed: np.ndarray, bits: int) -> np.ndarray:
    return nibbles(packed, bits).reshape(len(packed), -1)


@pytest.mark.parametrize(("layout", "options"), CASES)
def test_integers_are_taken_bit_for_bit(tmp_path: Path, layout: str, options: dict[str, object]) -> None:
    folder, truth = quantized.write(tmp_path / "model", layout, layers=1, **options)
    held = opened(folder)
    assert held.checkpoint.packed.keys() == truth.keys()
    for name, true in truth.items():
        if not name.endswith(WANTED):
            continue
        fmt, order = held.format(name), held.order(name)
        assert fmt is not None and (fmt.kind, fmt.bits) == ("nbits", true.bits)
        assert fmt.symmetric == bool((true.zeros == 1 << (true.bits - 1)).all())
        columns = np.arange(true.levels.shape[1]) if order is None else order
        assert (order is None) == (not (np.diff(true.group_of) < 0).any())
        assert sorted(columns) == list(range(len(columns)))
        for rows in (slice(0, len(true.levels)), slice(3, 21), slice(8, 9)):
            packed = held.rows(name, rows)
            np.testing.assert_array_equal(levels_of(packed.weight, fmt.bits), true.levels[rows][:, columns])
            # Each block's scale and zero point are those of all its columns
            blocks = true.group_of[columns].reshape(-1, fmt.block)
            assert (blocks == blocks[:, :1]).all()
            np.testing.assert_array_equal(packed.scale, true.scales[rows][:, blocks[:, 0]].astype(np.float32))
            if packed.zero_point is not None:
                zeros = levels_of(packed.zero_point, fmt.bits)[:, : len(blocks)]
                np.testing.assert_array_equal(zeros, true.zeros[rows][:, blocks[:, 0]])
            np.testing.assert_array_equal(held.dequantized(name, rows), true.floats[rows])


@given(bits=st.sampled_from((4, 8)), columns=st.integers(1, 9), seed=st.integers(0, 2**32))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
def test_zero_points_come_back_from_borrowed_words(tmp_path: Path, bits: int, columns: int, seed: int) -> None:
    """GPTQ stores zero points less one, as a subtraction of whole words: below a zero the next level is one less."""
    zeros = np.random.default_rng(seed).integers(0, 1 << bits, (1, columns * (32 // bits)))
    less = quantized.words(zeros, bits, minus=1).view(np.uint32)
    more = less + np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    np.testing.assert_array_equal(more.view(np.int32), quantized.words(zeros, bits))


def test_layers_may_differ_where_config_says_so(tmp_path: Path) -> None:
    """GPTQ's `dynamic` and its like: each matrix's bits and groups are those of its tensors."""
    folder, _ = quantized.write(tmp_path / "model", "gptq", layers=1)
    other, truth = quantized.write(tmp_path / "other", "gptq", layers=1, bits=8, group=16)
    name = "model.layers.0.mlp.down_proj"
    tensors = load_file(folder / "model.safetensors") | {
        key: array for key, array in load_file(other / "model.safetensors").items() if key.startswith(name)
    }
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=f"{name} is .* which is 8 bits a weight; quantization_config says 4"):
        Checkpoint.open(folder)
    dynamic = {"+:.*down_proj": {"bits": 8, "group_size": 16}}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": dynamic}
    edit_json(folder / "config.json", quantization_config=config)
    held = opened(folder)
    fmt = held.format(name)
    assert fmt is not None and (fmt.bits, fmt.block) == (8, 16)
    np.testing.assert_array_equal(held.dequantized(name, slice(0, 64)), truth[name].floats)


def refusal(folder: Path) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        held = opened(folder)
        for name in held.checkpoint.packed:
            held.format(name)
            held.order(name)
            held.rows(name, slice(0, 8))
    (line,) = str(caught.value).splitlines()
    return line


Q = "model.layers.0.self_attn.q_proj"
BAD_CONFIGS = [
    ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'; supported: awq, gptq, auto-round"),
    ({"quant_method": "autoround"}, "the nearest is 'auto-round'"),
    ({"quant_method": None}, "quant_method is None; supported"),
    ({"quant_method": "awq", "version": "gemv", "bits": 4}, "version is 'gemv'; only 'gemm' is supported"),
    ({"quant_method": "awq", "bits": 8}, "bits is 8; the gemm layout has 4"),
    ({"quant_method": "gptq"}, "quantization_config.bits is missing"),
    ({"quant_method": "gptq", "bits": 3}, "bits is 3; integer weights of 4 and 8 bits are taken"),
    ({"quant_method": "gptq", "bits": 8, "group_size": 32}, "which is 4 bits a weight; quantization_config says 8"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size is 0; it must be"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 16}, "says groups of 16, which would be 4"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 48}, "says groups of 48, which do not divide them"),
    ({"quant_method": "gptq", "bits": 4, "group_size": -1}, "says groups of -1"),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; supported"),
    ({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:fp8"}, "packing_format is"),
    ({"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp"}, "data_type is 'mx_fp'; only 'int'"),
    ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "format is 'float-quantized'; only"),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "config_groups has no group"),
    (quantized._quark_config("fp4", "reorder", 32), "weight.dtype is 'fp4'; supported: 'uint4', 'int4'"),
    (quantized._quark_config("uint4", "sorted", 32), "export.pack_method is 'sorted'; supported"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "message"), BAD_CONFIGS)
def test_configs_that_are_refused(tmp_path: Path, config: dict[str, object], message: str) -> None:
    folder, _ = quantized.write(tmp_path / "model", "gptq", layers=1)
    edit_json(folder / "config.json", quantization_config=config)
    assert message in refusal(folder)


BAD_TENSORS = [
    ("gptq", f"{Q}.qzeros", None, f"no tensor {Q}.qzeros beside {Q}.qweight; download it again"),
    ("gptq", f"{Q}.scales", None, f"no tensor {Q}.scales beside {Q}.qweight"),
    ("gptq", f"{Q}.qweight", None, f"no tensor {Q}.weight"),
    ("gptq", f"{Q}.scales", lambda a: a[:, :-1], f"tensor {Q}.scales is [2, 63]; a matrix [64, 64] of 4 bits"),
    ("gptq", f"{Q}.scales", lambda a: np.repeat(a, 3, 0)[:3], "its 64 columns do not divide into 3 groups"),
    ("gptq", f"{Q}.scales", lambda a: a * np.float16(np.nan), f"tensor {Q}.scales holds values that are not finite"),
    ("gptq", f"{Q}.qweight", lambda a: a[:-1], "which is 3 bits a weight"),
    ("gptq", f"{Q}.qzeros", lambda a: a.astype(np.int64), f"tensor {Q}.qzeros is stored as I64, not I32"),
    ("gptq", f"{Q}.g_idx", lambda a: a * 0, f"tensor {Q}.g_idx does not give each of 2 groups 32 columns"),
    ("gptq", f"{Q}.g_idx", lambda a: a - 1, f"tensor {Q}.g_idx does not give each"),
    ("compressed-tensors", f"{Q}.weight_zero_point", None, f"no tensor {Q}.weight_zero_point beside"),
    ("quark", f"{Q}.weight_scale", None, f"no tensor {Q}.weight_scale beside"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "tensor", "change", "message"), BAD_TENSORS)
def test_tensors_that_are_refused(tmp_path: Path, layout: str, tensor: str, change: object, message: str) -> None:
    folder, _ = quantized.write(tmp_path / "model", layout, layers=1)
    tensors = load_file(folder / "model.safetensors")
    found = tensors.pop(tensor)
    if callable(change):
        tensors[tensor] = np.ascontiguousarray(change(found))
    save_file(tensors, folder / "model.safetensors")
    assert message in refusal(folder)


def test_groups_too_small_for_blocks(tmp_path: Path) -> None:
    folder, _ = quantized.write(tmp_path / "model", "awq", layers=1, group=8)
    assert "groups of 8 weights; MatMulNBits takes multiples of 16" in refusal(folder)


def test_a_quantization_config_without_integers(tmp_path: Path, tiny: object) -> None:
    folder = tiny(tmp_path / "model")  # type: ignore[operator]
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})
    assert "quantization_config says gptq, but no matrix is stored in integers" in refusal(folder)
